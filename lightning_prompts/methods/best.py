"""Methods that keep their best prompt by validation themselves, in every checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch.trainer.states import TrainerFn

from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.types import Batch


class KeepsBest(PromptMethod):
    """Takes the mean of a value over each validation of a training, and lets `keep` decide about the current prompt.

    The mean is exact, so that equally good prompts are equal; the logged metric is a float32 mean of means.

    Attributes:
        validated_by: The value of a row of `evaluate`: ``nll`` or ``correct``.
    """

    validated_by: ClassVar[str]
    _totals = (0.0, 0)

    @abstractmethod
    def keep(self, value: float) -> None:
        """Keep the current prompt if ``value``, its mean over validation, is better than the best so far."""

    def on_validation_epoch_start(self) -> None:
        """Start the mean."""
        self._totals = (0.0, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """NLL and exact match of the current prompt."""
        output = super().validation_step(batch, batch_idx)
        total, count = self._totals
        self._totals = total + sum(row[self.validated_by] for row in output["rows"]), count + len(output["rows"])
        return output

    def on_validation_epoch_end(self) -> None:
        """Keep the current prompt if it is the best."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            total, count = self._totals
            self.keep(total / count)
