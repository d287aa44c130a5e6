"""Log sample generations during training."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_prompts.callbacks.files import RowLog, log_table
from lightning_prompts.runs.names import SAMPLES
from lightning_prompts.types import Batch


class SampleGenerations(RowLog):
    """Writes the first validation examples with their generated answers to ``samples.jsonl`` and the loggers.

    The rows come from validation, so they need no additional generation.

    Args:
        count: Number of examples.
    """

    def __init__(self, count: int = 5) -> None:
        """Start without rows."""
        super().__init__(SAMPLES)
        self.count = count
        self.samples: list[dict[str, Any]] = []  # of the present validation

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the first rows."""
        if dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit" or not outputs:
            return
        if not batch_idx:
            self.samples = []
        rows = outputs["rows"][: self.count - len(self.samples)]
        self.samples += [{"step": trainer.global_step, **row} for row in rows]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the collected rows."""
        samples, self.samples = self.samples, []
        if samples:
            self.add(trainer, samples)
            log_table(trainer, "samples", samples, ("question", "answer", "generated"))
