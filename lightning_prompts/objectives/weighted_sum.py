"""A weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.objectives.base import Objective


@dataclass(frozen=True)
class WeightedSum(Objective):
    """The weighted sum of objectives.

    Attributes:
        objectives: At least one objective.
        weights: One weight per objective, at least 0.
    """

    objectives: list[Objective]
    weights: list[float]

    def __post_init__(self) -> None:
        """Check that the lists match."""
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"objective: {len(self.objectives)} objectives and {len(self.weights)} weights; give each a weight"
            )
        for weight in self.weights:
            check_finite("objective.weights", weight)
        if not any(self.weights):
            raise UserError("objective.weights must not all be 0")

    @property
    def name(self) -> str:
        """See `Objective`."""
        parts = zip(self.weights, self.objectives, strict=True)
        return " + ".join(f"{weight:g} {part.name}" for weight, part in parts)

    @property
    def with_end(self) -> bool:
        """Whether any objective scores the text after the answers."""
        return any(part.with_end for part in self.objectives)

    def check(self, lm: FrozenLM) -> None:
        """See `Objective`."""
        for part in self.objectives:
            part.check(lm)

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """See `Objective`."""
        parts = zip(self.weights, self.objectives, strict=True)
        return sum((weight * part.loss(lm, rows, logits, scores) for weight, part in parts), logits.new_zeros(()))
