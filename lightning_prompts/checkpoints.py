"""Reading checkpoints: data only, nothing in them is run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from lightning_prompts.errors import UserError


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
