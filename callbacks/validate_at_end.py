"""No prompt leaves training unmeasured."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention

from lightning_prompts.types import Batch


class ValidateAtEnd(L.Callback):
    """Validates after the last step when ``max_steps`` ends training in the middle of an epoch.

    Without it, Lightning would stop without a look, and the best checkpoint could not be the last one.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop one step early, as it were: a stop by request comes with a validation."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
