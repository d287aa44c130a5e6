"""Answer log-likelihood by teacher forcing."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_prompts.lm import Scores


class Likelihood:
    """Mean negative log-likelihood of the reference answers' tokens.

    Args:
        mean_over: ``examples`` weighs every example alike, as the reported NLL does; ``tokens`` weighs every answer
            token alike, so that long answers count more.
    """

    def __init__(self, mean_over: Literal["examples", "tokens"] = "examples") -> None:
        """Keep the weighting."""
        self.mean_over = mean_over

    def __call__(self, scores: Scores) -> Tensor:
        """The loss, a scalar in nats."""
        if self.mean_over == "tokens":
            return (scores.nll * scores.tokens).sum() / scores.tokens.sum()
        return scores.nll.mean()
