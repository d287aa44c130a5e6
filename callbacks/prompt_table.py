"""Which prompts were tried, and how good they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - Lightning's own convention

from lightning_prompts.callbacks.files import RowLog
from lightning_prompts.runs.names import CANDIDATES
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptTable(RowLog):
    """Keeps the candidates of every step with their scores in ``prompts.jsonl``, for methods that propose prompts.

    A row has the step, what the method says of a candidate (layer, kind, reward, whether it was chosen, its text), and,
    once per validation, the prompts of now with their accuracy and the best accuracy so far.
    """

    def __init__(self) -> None:
        """Start without rows."""
        super().__init__(CANDIDATES)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: PromptMethod, outputs: Any, batch: Batch, batch_idx: int,  # type: ignore[override]
    ) -> None:  # fmt: skip
        """Keep the candidates of a step."""
        rows = pl_module.proposed()
        if rows:
            self.add(trainer, [{"step": trainer.global_step, **row} for row in rows])

    def on_validation_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Keep what a validation has decided."""
        rows = pl_module.validated() if trainer.state.fn == "fit" and not trainer.sanity_checking else []
        if rows:
            self.add(trainer, [{"step": trainer.global_step, **row} for row in rows])
