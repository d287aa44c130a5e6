"""What the LM answers, as training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.files import write_jsonl
from lightning_prompts.types import Batch


class SampleGenerations(L.Callback):
    """Keeps the first few validation examples with their generated answers, in ``samples.jsonl`` and TensorBoard.

    They are the rows that validation has made anyway, so they cost nothing.

    Args:
        count: How many examples.
    """

    def __init__(self, count: int = 5) -> None:
        """Start without rows."""
        self.count = count
        self.rows: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the head of the first batch."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit" or not outputs:
            return
        samples = [{"step": trainer.global_step, **row} for row in outputs["rows"][: self.count]]
        self.rows.extend(samples)
        if not trainer.is_global_zero:
            return
        write_jsonl(Path(trainer.default_root_dir) / "samples.jsonl", self.rows)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                table = "\n".join(f"| {row['question']} | {row['answer']} | {row['generated']} |" for row in samples)
                logger.experiment.add_text(
                    "samples", f"| question | answer | generated |\n|---|---|---|\n{table}", trainer.global_step
                )

    def state_dict(self) -> dict[str, Any]:
        """The rows, so that a resumed run goes on with them."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows back."""
        self.rows = list(state_dict["rows"])
