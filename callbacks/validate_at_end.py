"""Validate at the end of training."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_prompts.types import Batch


class ValidateAtEnd(L.Callback):
    """Runs a validation after the last step of training, if none is due there, unless validation is off.

    Otherwise Lightning would stop without a validation, and neither the best checkpoint nor the best prompt could be
    the last one.
    """

    def __init__(self) -> None:
        """Start without a validation."""
        super().__init__()
        self._validated_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from the step that a resumed run starts at."""
        self._validated_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Request the stop at the last step, because a requested stop includes a validation."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step."""
        self._validated_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate, before the last checkpoint is saved."""
        if not trainer.enable_validation or trainer.global_step <= self._validated_at:
            return
        loop = trainer.fit_loop.epoch_loop
        trainer.validating = True  # as Lightning does ahead of a validation
        loop._batches_that_stepped -= 1  # loggers get the same step as in a validation after a batch
        loop.val_loop.run()
        loop._batches_that_stepped += 1
        trainer.training = True
