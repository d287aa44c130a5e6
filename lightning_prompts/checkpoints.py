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


def check_readable(path: Path) -> None:
    """Make sure that a checkpoint is whole and holds nothing but data.

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
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds more than data (pickled code), so it is refused; nothing in it was run"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged: {' '.join(str(error).split())[:200]}") from error
