"""The score function estimator (REINFORCE; Williams 1992) for prompts of independently sampled tokens.

The policy consists of ``P`` independent categorical distributions over ``V`` tokens. All computations use float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.estimators.relaxations import Noise, gumbel_like


def sample(scores: Tensor, count: int, generator: Noise = None) -> Tensor:
    """Sample prompts by the Gumbel-max trick, which does not need normalised probabilities.

    Args:
        scores: Unnormalised log-probabilities, ``[B, P, V]``.
        count: ``K``.
        generator: Generator of the noise; ``None`` for torch's default generator.

    Returns:
        Indices ``[B, K, P]``.
    """
    repeated = scores.float()[:, None].expand(-1, count, -1, -1)
    return (repeated + gumbel_like(repeated, generator)).argmax(-1)


def log_probability(scores: Tensor, prompts: Tensor) -> Tensor:
    """Compute log-probabilities ``[B, K]`` of prompts ``[B, K, P]`` under scores ``[B, P, V]``, differentiable.

    >>> policy = torch.tensor([[[0.25, 0.75]]]).log()  # one question, one position, two tokens
    >>> log_probability(policy, torch.tensor([[[1], [0]]])).exp()
    tensor([[0.7500, 0.2500]])
    """
    normalized = torch.log_softmax(scores.float(), -1)[:, None].expand(-1, prompts.shape[1], -1, -1)
    return normalized.gather(-1, prompts[..., None])[..., 0].sum(-1)


def entropy(scores: Tensor) -> Tensor:
    """Compute the entropy of the policy in nats, ``[B]``, summed over positions.

    >>> entropy(torch.zeros(1, 1, 2))  # a fair coin
    tensor([0.6931])
    """
    normalized = torch.log_softmax(scores.float(), -1)
    return -(normalized.exp() * normalized).sum((-1, -2))


def surrogate_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """Compute a scalar whose gradient estimates the negative gradient of the expected reward.

    Args:
        log_probabilities: ``[B, K]``.
        advantages: Rewards minus their baseline, ``[B, K]``; no gradient flows through them.
    """
    return -(advantages.detach() * log_probabilities).mean()


class Support(ABC):
    """Selects the tokens that the policy may choose, by its initial scores."""

    @abstractmethod
    def keep(self, log_probabilities: Tensor) -> Tensor:
        """Select the indices ``[S]`` of the tokens to keep from log-probabilities ``[V]``."""


@dataclass(frozen=True)
class TopK(Support):
    """The likeliest tokens.

    Attributes:
        count: Number of tokens, at least 2.
    """

    count: int = 500

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count < 2:
            raise UserError(f"support.count must be at least 2, so that there is a choice, got {self.count}")

    def keep(self, log_probabilities: Tensor) -> Tensor:
        """See `Support`."""
        if self.count > len(log_probabilities):
            raise UserError(f"support.count ({self.count}) is more than the {len(log_probabilities)} allowed tokens")
        return log_probabilities.topk(self.count).indices


@dataclass(frozen=True)
class TopP(Support):
    """The likeliest tokens with a given total probability (nucleus; Holtzman et al. 2020).

    Attributes:
        mass: Total probability, above 0 and at most 1.
    """

    mass: float = 0.9

    def __post_init__(self) -> None:
        """Check the mass."""
        if not 0 < self.mass <= 1:
            raise UserError(f"support.mass must be above 0 and at most 1, got {self.mass}")

    def keep(self, log_probabilities: Tensor) -> Tensor:
        """See `Support`; at least two tokens."""
        ordered, indices = log_probabilities.sort(descending=True)
        before = ordered.exp().cumsum(0) - ordered.exp()
        return indices[: max(2, int((before < self.mass).sum()))]


class Shaping(ABC):
    """Transforms rewards before the baseline is subtracted."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Shape rewards ``[B, K]``."""


@dataclass(frozen=True)
class ZScore(Shaping):
    """Standardise the rewards of the prompts of each question (RLPrompt, Deng et al. 2022, section 3.3)."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """See `Shaping`."""
        centered = rewards - rewards.mean(1, keepdim=True)
        return centered / (rewards.std(1, keepdim=True, unbiased=False) + 1e-6)


@dataclass(frozen=True)
class Piecewise(Shaping):
    """Give correct answers another weight than wrong ones (RLPrompt, Deng et al. 2022, section 3.3).

    Attributes:
        threshold: Smallest reward of a correct answer.
        wrong: Factor of rewards below the threshold.
        right: Factor of the other rewards.
    """

    threshold: float = 0.5
    wrong: float = 1.0
    right: float = 2.0

    def __post_init__(self) -> None:
        """Check the factors."""
        for name in ("wrong", "right"):
            check_finite(f"shaping.{name}", getattr(self, name))

    def __call__(self, rewards: Tensor) -> Tensor:
        """See `Shaping`."""
        return rewards * torch.where(rewards >= self.threshold, self.right, self.wrong)


def whiten(advantages: Tensor, batch: Tensor | None = None) -> Tensor:
    """Standardise advantages over the whole batch; return them unchanged if they are all equal.

    >>> whiten(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.,  1.]])

    Args:
        advantages: ``[B, K]``.
        batch: Advantages of the whole batch, if ``advantages`` are the part of one process; ``None`` otherwise.
    """
    batch = advantages if batch is None else batch
    deviation = batch.std(unbiased=False)
    return (advantages - batch.mean()) / deviation if deviation > 1e-8 else advantages
