"""Weights of the draws from a posterior (section 4.2 of the paper and its ablations)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import check_finite


class Sharpening(ABC):
    """Maps log-probabilities to weights.

    Attributes:
        prior: Whether the draws' own log-probabilities count; a server may not return them.
    """

    prior: bool = True

    @abstractmethod
    def score(self, answer: Tensor, prior: Tensor) -> Tensor:
        """Compute unnormalised log-weights ``[B, K]``.

        Args:
            answer: Log-probability per token of the target after each draw, ``[B, K]``.
            prior: Log-probability per token of each draw, ``[B, K]``.
        """

    def __call__(self, answer: Tensor, prior: Tensor, there: Tensor) -> Tensor:
        """Compute weights ``[B, K]`` that sum to 1 over the draws in the mask ``there`` ``[B, K]``; 0 without any."""
        scores = self.score(answer, prior).masked_fill(~there, float("-inf"))
        return torch.softmax(scores, -1).nan_to_num(0.0)


@dataclass(frozen=True)
class SoftmaxSharpening(Sharpening):
    """The softmax of ``alpha * (log p(target | draw) + log p(draw))``.

    Attributes:
        alpha: Larger values favour the best draws; 0 gives all the same weight.
        prior: Whether to include the second term, ``log p(draw)``.
    """

    alpha: float = 1.0
    prior: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        check_finite("sharpening.alpha", self.alpha)

    def score(self, answer: Tensor, prior: Tensor) -> Tensor:
        """See `Sharpening`."""
        return self.alpha * (answer + prior if self.prior else answer)


@dataclass(frozen=True)
class UniformWeights(Sharpening):
    """No sharpening: all draws have the same weight."""

    prior = False

    def score(self, answer: Tensor, prior: Tensor) -> Tensor:
        """See `Sharpening`."""
        return torch.zeros_like(answer)


@dataclass(frozen=True)
class ArgMaxWeights(Sharpening):
    """Only the best draw; ties go to the first.

    Attributes:
        prior: Whether the draws' own log-probabilities count.
    """

    prior: bool = True

    def score(self, answer: Tensor, prior: Tensor) -> Tensor:
        """See `Sharpening`."""
        return answer + prior if self.prior else answer

    def __call__(self, answer: Tensor, prior: Tensor, there: Tensor) -> Tensor:
        """See `Sharpening`."""
        scores = self.score(answer, prior).masked_fill(~there, float("-inf"))
        best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
        return best.to(answer.dtype) * there.any(-1, keepdim=True)
