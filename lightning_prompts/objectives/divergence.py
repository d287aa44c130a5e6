"""The divergence from a teacher along answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.distributions import Distributions
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.scores import row_means
from lightning_prompts.objectives.base import Objective
from lightning_prompts.objectives.likelihood import Likelihood


@dataclass(frozen=True)
class Divergence:
    """Mean Kullback-Leibler divergence of the teacher and the student at the tokens of answers, and at their ends.

    Attributes:
        direction: ``forward`` for ``KL(teacher || student)``, ``reverse`` for ``KL(student || teacher)``.
        top_k: Compare only the teacher's ``top_k`` likeliest tokens, and all other tokens as one; a lower bound of the
            whole divergence, see `Distributions`. ``None`` compares the whole vocabulary.
        mean_over: See `Likelihood`.
        end_weight: Weight of the text after ``{answer}`` in the template; see `Likelihood`.
    """

    direction: Literal["forward", "reverse"] = "forward"
    top_k: int | None = None
    mean_over: Literal["examples", "tokens"] = "examples"
    end_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.direction not in ("forward", "reverse"):
            raise UserError(f"objective.direction must be forward or reverse, got {self.direction!r}")
        if self.top_k is not None:
            check_at_least("objective.top_k", self.top_k)
        Likelihood(self.mean_over, self.end_weight)

    @property
    def name(self) -> str:
        """Name of the objective in the description of a method."""
        return "divergence from the teacher"

    @property
    def with_end(self) -> bool:
        """Whether to compare the ends of the answers."""
        return self.end_weight > 0

    def check(self, lm: FrozenLM) -> None:
        """Raise a `UserError` if the LM has no more than ``top_k`` tokens."""
        if self.top_k is not None and self.top_k >= lm.vocabulary:
            raise UserError(
                f"objective.top_k ({self.top_k}) must be below the vocabulary of {lm.name} ({lm.vocabulary}); leave "
                "it out to compare the whole vocabulary"
            )

    def against(self, teacher: Distributions) -> Objective:
        """Return the objective of a batch.

        Args:
            teacher: The teacher's distributions at the answer and end tokens of the batch, in order.
        """
        return _DivergenceFrom(self, teacher)


@dataclass(frozen=True)
class _DivergenceFrom(Objective):
    settings: Divergence
    teacher: Distributions

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def with_end(self) -> bool:
        return self.settings.with_end

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        del lm
        settings = self.settings
        answer, end = row_means(self.teacher.divergence(logits, settings.direction == "reverse"), rows)
        return Likelihood(settings.mean_over, settings.end_weight)(replace(scores, nll=answer, end_nll=end))
