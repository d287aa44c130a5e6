"""Baselines, which reduce the variance of the REINFORCE gradient without a bias."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.randomness import from_run_seed


class BaselineState(nn.Module):
    """The state of a baseline, which is part of checkpoints. The base class subtracts nothing."""

    def forward(self, rewards: Tensor, greedy: Tensor | None, states: Tensor) -> Tensor:
        """Compute the baseline of each reward.

        Args:
            rewards: ``[B, K]``.
            greedy: Rewards of the policy's likeliest prompts ``[B]``, if the baseline needs them.
            states: Pooled hidden states of the questions, ``[B, D]`` float32.

        Returns:
            A tensor that broadcasts to ``[B, K]``. A baseline must not depend on the prompt of its own reward.
        """
        del greedy, states
        return torch.zeros_like(rewards)

    def update(self, rewards: Tensor) -> None:
        """Update the state with the rewards of a step, after `forward` for the same step."""

    def loss(self, rewards: Tensor, states: Tensor) -> Tensor | None:
        """Compute an additional loss to minimise, or ``None``."""
        del rewards, states
        return None


class Baseline(ABC):
    """Settings of a baseline; `build` makes its state."""

    needs_greedy: ClassVar[bool] = False
    least_samples: ClassVar[int] = 1

    @abstractmethod
    def build(self, width: int) -> BaselineState:
        """Make the baseline for hidden states of width ``D``."""


@dataclass(frozen=True)
class NoBaseline(Baseline):
    """No baseline: rewards without a change."""

    def build(self, width: int) -> BaselineState:
        """See `Baseline`."""
        return BaselineState()


@dataclass(frozen=True)
class MovingAverage(Baseline):
    """An exponential moving average of the mean rewards of earlier steps.

    Attributes:
        decay: Weight of the old average in each step, at least 0 and below 1.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0 <= self.decay < 1:
            raise UserError(f"baseline.decay must be at least 0 and below 1, got {self.decay}")

    def build(self, width: int) -> BaselineState:
        """See `Baseline`."""
        return _MovingAverage(self.decay)


class _MovingAverage(BaselineState):
    total: Tensor
    weight: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("total", torch.zeros((), device="cpu"))
        # Divide by the sum of weights, which starts below 1, so that the average has no bias at the start.
        self.register_buffer("weight", torch.zeros((), device="cpu"))

    def forward(self, rewards: Tensor, greedy: Tensor | None, states: Tensor) -> Tensor:
        return (self.total / self.weight.clamp(min=1e-8)).expand_as(rewards)

    def update(self, rewards: Tensor) -> None:
        self.total.mul_(self.decay).add_((1 - self.decay) * rewards.mean())
        self.weight.mul_(self.decay).add_(1 - self.decay)


@dataclass(frozen=True)
class SelfCritical(Baseline):
    """Self-critical baseline: the reward of the policy's likeliest prompt for the question (Rennie et al. 2017)."""

    needs_greedy: ClassVar[bool] = True

    def build(self, width: int) -> BaselineState:
        """See `Baseline`."""
        return _SelfCritical()


class _SelfCritical(BaselineState):
    def forward(self, rewards: Tensor, greedy: Tensor | None, states: Tensor) -> Tensor:
        assert greedy is not None
        return greedy[:, None]


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    """Leave-one-out baseline: the mean reward of the other prompts for the question (RLOO; Kool et al. 2019)."""

    least_samples: ClassVar[int] = 2

    def build(self, width: int) -> BaselineState:
        """See `Baseline`."""
        return _LeaveOneOut()


class _LeaveOneOut(BaselineState):
    def forward(self, rewards: Tensor, greedy: Tensor | None, states: Tensor) -> Tensor:
        return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


@dataclass(frozen=True)
class ValueHead(Baseline):
    """A network that predicts the reward from the question.

    Attributes:
        hidden: Hidden width of the network.
    """

    hidden: int = 64

    def __post_init__(self) -> None:
        """Check the width."""
        check_at_least("baseline.hidden", self.hidden)

    def build(self, width: int) -> BaselineState:
        """See `Baseline`."""
        with from_run_seed():
            return _ValueHead(width, self.hidden)


class _ValueHead(BaselineState):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(0)
        )

    def forward(self, rewards: Tensor, greedy: Tensor | None, states: Tensor) -> Tensor:
        return self.network(states).detach()[:, None]  # type: ignore[no-any-return]

    def loss(self, rewards: Tensor, states: Tensor) -> Tensor | None:
        return functional.mse_loss(self.network(states), rewards.mean(1))
