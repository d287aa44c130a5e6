"""Record the candidate prompts of search methods with their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_prompts.callbacks.files import RowLog
from lightning_prompts.runs.names import CANDIDATES
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptTable(RowLog):
    """Writes the candidates of every step with their scores to ``prompts.jsonl``, for methods that propose prompts.

    A row contains the step and the method's record of a candidate (layer, kind, reward, whether it was chosen, text).
    After each validation, a row contains the current prompts with their accuracy and the best accuracy so far.
    """

    def __init__(self) -> None:
        """Start without rows."""
        super().__init__(CANDIDATES)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PromptMethod,  # type: ignore[override]
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Add the candidates of a step."""
        rows = pl_module.proposed()
        if rows:
            self.add(trainer, [{"step": trainer.global_step, **row} for row in rows])

    def on_validation_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Add the results of a validation."""
        rows = pl_module.validated() if trainer.state.fn == "fit" and not trainer.sanity_checking else []
        if rows:
            self.add(trainer, [{"step": trainer.global_step, **row} for row in rows])
