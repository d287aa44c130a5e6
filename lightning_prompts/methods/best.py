"""The base class of methods that save their best prompt by validation in every checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch.trainer.states import TrainerFn

from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.types import Batch


class KeepsBest(PromptMethod):
    """Averages a value over each validation during training, and lets `keep` decide about the current prompt.

    The mean is exact, so equally good prompts tie; the logged metric is a float32 mean of means.

    Attributes:
        validated_by: The column of `evaluate`'s rows to average: ``nll`` or ``correct``.
    """

    validated_by: ClassVar[str]
    _totals = (0.0, 0)

    @abstractmethod
    def validate_initial(self) -> None:
        """Validate the initial prompt, the first candidate for the best, unless a resumed run has done so."""

    def on_fit_start(self) -> None:
        """Validate the initial prompt, in the precision of all later validations."""
        with self.trainer.precision_plugin.val_step_context():
            self.validate_initial()

    @abstractmethod
    def keep(self, value: float) -> None:
        """Keep the current prompt if its validation mean ``value`` is better than the best so far."""

    def on_validation_epoch_start(self) -> None:
        """Reset the mean."""
        self._totals = (0.0, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Log NLL and exact match of the current prompt, and add them to the mean."""
        output = super().validation_step(batch, batch_idx)
        total, count = self._totals
        self._totals = total + sum(row[self.validated_by] for row in output["rows"]), count + len(output["rows"])
        return output

    def on_validation_epoch_end(self) -> None:
        """Keep the current prompt if it is the best."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            total, count = self._totals
            self.keep(total / count)
        super().on_validation_epoch_end()  # schedulers may monitor what `keep` logs
