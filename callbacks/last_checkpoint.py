"""A checkpoint for resuming, independent of validation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.runs.names import CHECKPOINTS, LAST
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class LastCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` after each validation, every few minutes, and at the end of training.

    A killed run loses the time since the last save. A resumed run ends with the same prompt as an uninterrupted run.

    Args:
        minutes: Maximum number of minutes between checkpoints; ``None`` for no limit.
        steps: Maximum number of steps between checkpoints; ``None`` for no limit.
    """

    def __init__(self, minutes: float | None = 10.0, steps: int | None = None) -> None:
        """Check the intervals."""
        super().__init__()
        if minutes is not None:
            check_finite("checkpoint.minutes", minutes, above=True)
        if steps is not None and steps < 1:
            raise UserError(f"checkpoint.steps must be at least 1, got {steps}")
        self.minutes, self.steps = minutes, steps
        self._saved_at, self._time = 0, 0.0

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Return the path of the checkpoint."""
        return Path(trainer.default_root_dir).absolute() / CHECKPOINTS / LAST

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps and minutes."""
        self._saved_at, self._time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Save if a limit is reached.

        Do not save before a validation, because a resumed run would skip that validation.
        """
        if not (cast("PromptMethod", pl_module).accumulating or _validation_follows(trainer)):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, including the score of the best checkpoint."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last checkpoint, whatever the reason for the end of training."""
        if trainer.global_step > self._saved_at:
            self.save(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        steps = trainer.global_step - self._saved_at
        minutes = (time.monotonic() - self._time) / 60
        due = steps >= (self.steps or float("inf")) or minutes >= (self.minutes or float("inf"))
        if steps and trainer.strategy.broadcast(due):  # either all processes save, or none
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
        self._saved_at, self._time = trainer.global_step, time.monotonic()


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning runs a validation after this batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
