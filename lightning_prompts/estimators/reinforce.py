"""The score function estimator (REINFORCE; Williams 1992) for prompts of tokens drawn position by position.

The policy is ``P`` independent categorical distributions over ``V`` tokens; everything is computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.estimators.relaxations import Noise, gumbel_like


def sample(scores: Tensor, count: int, generator: Noise = None) -> Tensor:
    """Draw prompts by the Gumbel-max trick, which has no probabilities that could be invalid.

    Args:
        scores: ``[B, P, V]``, unnormalised log-probabilities.
        count: ``K``.
        generator: Of the noise; ``None`` for torch's own.

    Returns:
        Indices ``[B, K, P]``.
    """
    repeated = scores.float()[:, None].expand(-1, count, -1, -1)
    return (repeated + gumbel_like(repeated, generator)).argmax(-1)


def log_probability(scores: Tensor, prompts: Tensor) -> Tensor:
    """Log-probability of prompts ``[B, K, P]`` under scores ``[B, P, V]``: ``[B, K]``, differentiable.

    >>> policy = torch.tensor([[[0.25, 0.75]]]).log()  # one question, one position, two tokens
    >>> log_probability(policy, torch.tensor([[[1], [0]]])).exp()
    tensor([[0.7500, 0.2500]])
    """
    normalized = torch.log_softmax(scores.float(), -1)[:, None].expand(-1, prompts.shape[1], -1, -1)
    return normalized.gather(-1, prompts[..., None])[..., 0].sum(-1)


def entropy(scores: Tensor) -> Tensor:
    """Entropy of the policy in nats, ``[B]``, summed over positions.

    >>> entropy(torch.zeros(1, 1, 2))  # a fair coin
    tensor([0.6931])
    """
    normalized = torch.log_softmax(scores.float(), -1)
    return -(normalized.exp() * normalized).sum((-1, -2))


def surrogate_loss(log_probabilities: Tensor, advantages: Tensor) -> Tensor:
    """A scalar whose gradient is the estimate of minus the expected reward's.

    Args:
        log_probabilities: ``[B, K]``.
        advantages: Rewards less their baseline, ``[B, K]``; constants.
    """
    return -(advantages.detach() * log_probabilities).mean()


class Support(ABC):
    """Which tokens the policy may choose, by its initial scores."""

    @abstractmethod
    def keep(self, log_probabilities: Tensor) -> Tensor:
        """Indices ``[S]`` of the tokens to keep, of log-probabilities ``[V]``."""


@dataclass(frozen=True)
class TopK(Support):
    """The likeliest tokens.

    Attributes:
        count: How many.
    """

    count: int = 500

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count < 2:
            raise UserError(f"support.count must be at least 2, or there is nothing to choose; got {self.count}")

    def keep(self, log_probabilities: Tensor) -> Tensor:
        """See `Support`."""
        if self.count > len(log_probabilities):
            raise UserError(f"support.count ({self.count}) is more than the {len(log_probabilities)} allowed tokens")
        return log_probabilities.topk(self.count).indices


@dataclass(frozen=True)
class TopP(Support):
    """The likeliest tokens that have a given probability together (nucleus; Holtzman et al. 2020).

    Attributes:
        mass: The probability.
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
    """What happens to rewards before the baseline is taken off."""

    @abstractmethod
    def __call__(self, rewards: Tensor) -> Tensor:
        """Shaped rewards ``[B, K]``."""


@dataclass(frozen=True)
class ZScore(Shaping):
    """Mean 0 and standard deviation 1 over the prompts of each question (RLPrompt, Deng et al. 2022, section 3.3)."""

    def __call__(self, rewards: Tensor) -> Tensor:
        """See `Shaping`."""
        centered = rewards - rewards.mean(1, keepdim=True)
        return centered / (rewards.std(1, keepdim=True, unbiased=False) + 1e-6)


@dataclass(frozen=True)
class Piecewise(Shaping):
    """Right answers count for more (RLPrompt, Deng et al. 2022, section 3.3).

    Attributes:
        threshold: From which reward on an answer is right.
        wrong: Factor below.
        right: Factor from there on.
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
    """Mean 0 and standard deviation 1 over the whole batch; as they are where they do not differ.

    >>> whiten(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.,  1.]])

    Args:
        advantages: ``[B, K]``.
        batch: Those of the whole batch, where ``advantages`` are one process's part of them.
    """
    batch = advantages if batch is None else batch
    deviation = batch.std(unbiased=False)
    return (advantages - batch.mean()) / deviation if deviation > 1e-8 else advantages
