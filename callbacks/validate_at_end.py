"""Validate at the end of training."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_prompts.types import Batch


class ValidateAtEnd(L.Callback):
    """Runs a validation after the last step if ``max_steps`` ends training within an epoch.

    Otherwise Lightning would stop without a validation, and the best checkpoint could not be the last one.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Request the stop at the last step, because a requested stop includes a validation."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
