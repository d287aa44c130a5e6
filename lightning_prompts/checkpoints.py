"""Checkpoints: written whole or not at all; read as data only, nothing in them is run."""

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
    """Writes a checkpoint beside the earlier one of its name, onto the disk, and renames it when it is whole.

    Lightning's own passes through the system's temporary folder, which may be another disk or a full one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Save; see `write_atomic`."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


# What going on from a checkpoint needs, and of what kind.
PARTS: dict[str, type] = {
    "state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "loops": dict, "callbacks": dict, "rng": dict,
    "epoch": int, "global_step": int,
}  # fmt: skip


def check_readable(path: Path, resume: bool = False) -> None:
    """Make sure that a checkpoint is whole and holds nothing but data.

    Args:
        path: The file.
        resume: Training is to go on from it, so it must have all parts.

    Raises:
        UserError: It is missing, truncated, or carries pickled code, which is refused without running it.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path} is damaged or no checkpoint; take last.ckpt or best.ckpt of the run")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (at {damaged}); take last.ckpt or best.ckpt of the run")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than data (pickled code), so it is refused; nothing in it was run"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"checkpoint {path} is none of a run: it has no state_dict")
    for name, kind in PARTS.items() if resume else ():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"checkpoint {path} cannot be gone on from: its {name} is missing or no {kind.__name__}")
    for name, needed in (("loops", "fit_loop"), ("rng", "torch"), ("state_dict", "")):
        if resume and (not checkpoint[name] or (needed and needed not in checkpoint[name])):
            raise UserError(f"checkpoint {path} cannot be gone on from: its {name} is empty or lacks {needed}")
    if resume and not checkpoint["optimizer_states"]:
        raise UserError(f"checkpoint {path} cannot be gone on from: it has no state of an optimiser")


def between_batches(loops: dict[str, Any]) -> None:
    """Let training go on from a checkpoint of any moment with the next batch, in the right epoch.

    Lightning goes on from the end of an epoch with an epoch of a single batch, or counts one too few; and a run that
    has ended within an epoch is at its end for it.

    Args:
        loops: The checkpoint's; changed in place.
    """
    epochs, batches = (loops["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress"))
    if batches["is_last_batch"]:  # the next epoch has not begun
        for part in ("total", "current"):
            epochs[part] = dict.fromkeys(epochs[part], epochs[part]["ready"])
        batches["total"]["completed"] = batches["total"]["processed"]
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    elif epochs["current"]["processed"] == epochs["current"]["ready"]:  # the epoch goes on
        for part in ("total", "current"):
            epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["ready"] - 1
            batches[part]["completed"] = batches[part]["processed"] - 1


def does_not_fit(error: BaseException) -> UserError | None:
    """What to tell about an error that came up while a checkpoint was put back; ``None`` for others."""
    trace = error.__traceback__
    while trace is not None:
        putting_back = trace.tb_frame.f_code.co_name.lstrip("_").startswith(("restore", "resume"))
        if putting_back and trace.tb_frame.f_globals.get("__name__", "").endswith("checkpoint_connector"):
            reason = " ".join(str(error).split())[:200]
            return UserError(
                f"the checkpoint does not fit this run, or is damaged ({type(error).__name__}: {reason}); "
                "use it with the config.yaml of the run that wrote it"
            )
        trace = trace.tb_next
    return None
