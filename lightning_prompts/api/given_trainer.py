"""A `lightning.Trainer` that the user built: what it keeps, what is added, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar, RichModelSummary
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_prompts.errors import UserError

# Settings that a Trainer keeps under their own names.
KEPT = (
    "accumulate_grad_batches",
    "barebones",
    "check_val_every_n_epoch",
    "gradient_clip_val",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "num_sanity_val_steps",
    "overfit_batches",
    "precision",
    "val_check_interval",
)


def trainer_settings(trainer: L.Trainer) -> dict[str, Any]:
    """The settings of a Trainer as plain data, so that the config records them.

    Raises:
        UserError: The Trainer has run before, uses several processes, or an accelerator that a config cannot name.
    """
    if trainer.state.fn is not None:
        raise UserError("this Trainer has already run; make a new one for each call of fit")
    if trainer.world_size > 1:
        raise UserError(
            "a Trainer of several processes cannot be recorded; give its settings as a dict, such as "
            "trainer={'devices': 2, 'strategy': 'ddp'}"
        )
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError("fast_dev_run leaves no run; set max_steps=1 instead")
    accelerator = trainer.accelerator.name() if hasattr(trainer.accelerator, "name") else None
    if accelerator not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"{type(trainer.accelerator).__name__} cannot be recorded; take the accelerator cpu, cuda or mps"
        )
    algorithm = trainer.gradient_clip_algorithm
    deterministic: bool | str = torch.are_deterministic_algorithms_enabled()
    if deterministic and torch.is_deterministic_algorithms_warn_only_enabled():
        deterministic = "warn"
    found = {
        **{name: getattr(trainer, name) for name in KEPT},
        "accelerator": accelerator,
        "deterministic": deterministic,
        "devices": trainer.device_ids if accelerator == "cuda" else 1,
        "enable_checkpointing": bool(trainer.checkpoint_callbacks),
        "enable_progress_bar": any(isinstance(each, ProgressBar) for each in _callbacks(trainer)),
        "gradient_clip_algorithm": None if algorithm is None else str(algorithm.value),
    }
    return {name: -1 if value == math.inf else value for name, value in found.items()}


def folder_of(trainer: L.Trainer, folder: str | Path | None) -> str | Path | None:
    """The run folder: the one that is given, or the Trainer's ``default_root_dir``.

    Raises:
        UserError: Both are given, and differ.
    """
    own = Path(trainer.default_root_dir)
    if own.absolute() == Path.cwd():  # Lightning's default
        return folder
    if folder is not None and own.absolute() != Path(folder).absolute():
        raise UserError(f"folder is {folder}, but the Trainer's default_root_dir is {own}; leave out one of them")
    return own


def loggers_of(trainer: L.Trainer) -> Sequence[Logger] | bool | None:
    """The loggers that the user chose; ``None`` for Lightning's default, and ``False`` for none."""
    default = (TensorBoardLogger, CSVLogger)
    if not trainer.loggers:
        return False
    if len(trainer.loggers) == 1 and type(trainer.loggers[0]) in default:
        only: Any = trainer.loggers[0]
        if only.name == "lightning_logs" and only.root_dir == str(Path(trainer.default_root_dir) / "lightning_logs"):
            return None
    return trainer.loggers


def complete(
    trainer: L.Trainer,
    default_root_dir: str,
    callbacks: Sequence[L.Callback],
    enable_progress_bar: bool,
    **others: object,
) -> L.Trainer:
    """Add to a Trainer what every run needs.

    Args:
        trainer: The Trainer that the user built.
        default_root_dir: The run folder.
        callbacks: The callbacks of every run. The Trainer's own come after them, but before checkpoints, and replace
            those of the same class. Lightning's default checkpoint and model summary are removed.
        enable_progress_bar: Whether it may show a progress bar.
        others: The other settings, which `trainer_settings` read from the Trainer.

    Returns:
        The same Trainer.

    Raises:
        UserError: The Trainer has a checkpoint callback with the same monitor as that of every run.
    """
    del others
    trainer._default_root_dir = default_root_dir  # type: ignore[attr-defined]
    trainer.loggers = []  # see `loggers_of`
    own = [each for each in _callbacks(trainer) if not _is_default(each)]
    if not enable_progress_bar:
        own = [each for each in own if not isinstance(each, ProgressBar)]
    keys = {each.state_key for each in callbacks if isinstance(each, ModelCheckpoint)}
    if any(isinstance(each, ModelCheckpoint) and each.state_key in keys for each in own):
        raise UserError("every run saves the best checkpoint by this monitor; leave this ModelCheckpoint out")
    kinds = {type(each) for each in own if not isinstance(each, ModelCheckpoint)}
    together = [*(each for each in callbacks if type(each) not in kinds), *own]
    _callbacks(trainer)[:] = sorted(together, key=lambda each: isinstance(each, Checkpoint))
    return trainer


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _is_default(callback: L.Callback) -> bool:
    """Whether Lightning itself adds such a callback to every Trainer."""
    if type(callback) in (ModelSummary, RichModelSummary):
        return callback._max_depth == 1  # type: ignore[attr-defined, no-any-return]
    return type(callback) is ModelCheckpoint and callback.monitor is callback.dirpath is callback.filename is None
