"""Answer log-likelihood by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_prompts.errors import check_finite
from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.objectives.base import Objective


@dataclass(frozen=True)
class Likelihood(Objective):
    """Mean negative log-likelihood of the reference answers' tokens, and of how the answers end.

    Attributes:
        mean_over: ``examples`` weighs every example alike, as the reported NLL does; ``tokens`` weighs every answer
            token alike, so that long answers count more.
        end_weight: Weight of the text after ``{answer}`` in the template, which is no part of the reported NLL. With 0
            a prompt learns what to answer and not where to stop.
    """

    mean_over: Literal["examples", "tokens"] = "examples"
    end_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight."""
        check_finite("objective.end_weight", self.end_weight)

    @property
    def name(self) -> str:
        """See `Objective`."""
        return "answer likelihood"

    @property
    def with_end(self) -> bool:
        """Whether the ends of answers are to be scored."""
        return self.end_weight > 0

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """See `Objective`."""
        return self(scores)

    def __call__(self, scores: Scores) -> Tensor:
        """The loss, a scalar in nats."""
        mean_tokens = scores.tokens.float().mean() if scores.mean_tokens is None else scores.mean_tokens
        return self.per_example(scores, mean_tokens).mean()

    def per_example(self, scores: Scores, mean_tokens: float | Tensor) -> Tensor:
        """What each example adds to the loss, in nats; the loss is the mean.

        Args:
            scores: ``[B]``, or ``[C, B]`` for several prompts.
            mean_tokens: Answer tokens per example, on average over all examples that the mean will be taken of.
        """
        nll = scores.nll if self.mean_over == "examples" else scores.nll * scores.tokens / mean_tokens
        return nll + self.end_weight * scores.end_nll
