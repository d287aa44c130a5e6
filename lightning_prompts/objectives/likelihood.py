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
    """Mean negative log-likelihood of the tokens of the reference answers, and of the ends of the answers.

    Attributes:
        mean_over: ``examples`` gives all examples equal weight, as in the reported NLL; ``tokens`` gives all answer
            tokens of a batch equal weight, so that long answers count more. If gradients are accumulated, each batch
            has the same weight, whatever its number of tokens.
        end_weight: Weight of the text after ``{answer}`` in the template, which the reported NLL does not include. With
            0, a prompt learns what to answer but not where to stop.
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
        """Whether to score the ends of the answers."""
        return self.end_weight > 0

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """See `Objective`."""
        return self(scores)

    def __call__(self, scores: Scores) -> Tensor:
        """Compute the scalar loss in nats."""
        mean_tokens = scores.tokens.float().mean() if scores.mean_tokens is None else scores.mean_tokens
        return self.per_example(scores, mean_tokens).mean()

    def per_example(self, scores: Scores, mean_tokens: float | Tensor) -> Tensor:
        """Compute the loss of each example in nats; the total loss is the mean.

        Args:
            scores: ``[B]``, or ``[C, B]`` for several prompts.
            mean_tokens: Mean number of answer tokens per example, over all examples of the mean loss.
        """
        nll = scores.nll if self.mean_over == "examples" else scores.nll * scores.tokens / mean_tokens
        return nll + self.end_weight * scores.end_nll
