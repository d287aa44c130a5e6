"""Write checkpoints atomically, and read them as data only, without running code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_prompts.errors import UserError
from lightning_prompts.files import write_atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, and renames it when it is complete.

    Lightning's plugin uses the temporary folder of the system, which may be on another disk or full.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Save a checkpoint; see `write_atomic`."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


# Entries that a checkpoint needs for resuming, with their types.
PARTS: dict[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "rng": dict,
    "epoch": int,
    "global_step": int,
}


def check_readable(path: Path, resume: bool = False) -> None:
    """Check that a checkpoint is complete and contains only data.

    Args:
        path: The file.
        resume: Whether training will resume from it, which needs all `PARTS`.

    Raises:
        UserError: The file is missing or truncated, lacks a part, or contains pickled code, which is not run.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint; use last.ckpt or best.ckpt of the run")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (at {damaged}); use last.ckpt or best.ckpt of the run")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} contains pickled code and is not loaded; no code in it was run") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"checkpoint {path} is not a checkpoint of a run: it has no state_dict")
    for name, kind in PARTS.items() if resume else ():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"cannot resume: checkpoint {path} has no valid {name} (expected a {kind.__name__})")
    for name, needed in (("loops", "fit_loop"), ("rng", "torch"), ("state_dict", "")):
        if resume and (not checkpoint[name] or (needed and needed not in checkpoint[name])):
            raise UserError(f"cannot resume: in checkpoint {path}, {name} is empty or lacks {needed}")
    if resume and not checkpoint["optimizer_states"]:
        raise UserError(f"cannot resume: checkpoint {path} has no optimiser state")


def between_batches(loops: dict[str, Any]) -> None:
    """Fix the progress in a checkpoint, so that training resumes with the next batch in the right epoch.

    From a checkpoint at the end of an epoch, Lightning would run an epoch of a single batch, or count one epoch too
    few. A run that ended within an epoch would count the epoch as finished.

    Args:
        loops: State of the loops in the checkpoint, changed in place.
    """
    epochs, batches = (loops["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress"))
    if batches["is_last_batch"]:  # the next epoch has not started
        for part in ("total", "current"):
            epochs[part] = dict.fromkeys(epochs[part], epochs[part]["ready"])
        batches["total"]["completed"] = batches["total"]["processed"]
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    elif epochs["current"]["processed"] == epochs["current"]["ready"]:  # the epoch goes on
        for part in ("total", "current"):
            epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["ready"] - 1
            batches[part]["completed"] = batches[part]["processed"] - 1


def does_not_fit(error: BaseException) -> UserError | None:
    """Return a `UserError` for an error while restoring a checkpoint; ``None`` for other errors."""
    trace = error.__traceback__
    while trace is not None:
        restoring = trace.tb_frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        if restoring and trace.tb_frame.f_globals.get("__name__", "").endswith("checkpoint_connector"):
            reason = " ".join(str(error).split())[:200]
            return UserError(
                f"the checkpoint does not match this run, or is damaged ({type(error).__name__}: {reason}); "
                "use it with the config.yaml of the run that wrote it"
            )
        trace = trace.tb_next
    return None
