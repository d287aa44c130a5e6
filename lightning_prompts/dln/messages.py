"""Messages that ask the proposer for a kind of change, and how to choose among them.

The paper cycles through its messages. As a bandit problem, each message has gains: the reward of a proposal minus the
reward of the prompt that it was made from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_prompts.errors import check_finite

MESSAGES = (
    "Make the instruction clearer, and keep it brief.",
    "Make the instruction better by adding examples of how to solve the task.",
    "Make the instruction shorter, and keep only what matters.",
    "Rewrite the instruction in detail, so that nothing about the task is left open.",
)


class BanditStats:
    """Running statistics of the messages' gains; checkpoints save them.

    Args:
        count: Number of messages.
    """

    def __init__(self, count: int = len(MESSAGES)) -> None:
        """Start without gains."""
        self.counts = [0] * count
        self.sums = [0.0] * count
        self.squares = [0.0] * count

    def update(self, message: int, gain: float) -> None:
        """Record a gain of a message."""
        self.counts[message] += 1
        self.sums[message] += gain
        self.squares[message] += gain * gain

    def mean(self, message: int) -> float:
        """Return the mean gain of a message so far; 0 before the first."""
        return self.sums[message] / max(self.counts[message], 1)

    def deviation(self) -> float:
        """Return the standard deviation of all gains around their message's mean; 1 while unknown."""
        total = sum(self.counts) - sum(count > 0 for count in self.counts)
        rest = sum(self.squares[m] - self.counts[m] * self.mean(m) ** 2 for m in range(len(self.counts)))
        return math.sqrt(max(rest, 0.0) / total) if total > 0 and rest > 0 else 1.0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"counts": self.counts, "sums": self.sums, "squares": self.squares}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.counts, self.sums, self.squares = (list(state[name]) for name in ("counts", "sums", "squares"))


class MessageChoice(ABC):
    """Chooses the message of a proposal."""

    @abstractmethod
    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """Choose the message of proposal ``index`` of a step; return ``None`` for no message."""


@dataclass(frozen=True)
class NoMessage(MessageChoice):
    """No message."""

    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return None


@dataclass(frozen=True)
class CycledMessages(MessageChoice):
    """All messages in turn, as in the paper."""

    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return index % len(stats.counts)


@dataclass(frozen=True)
class UniformMessages(MessageChoice):
    """A message chosen uniformly at random."""

    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return int(torch.randint(len(stats.counts), (1,), generator=generator, device="cpu"))


@dataclass(frozen=True)
class ThompsonSampling(MessageChoice):
    """Thompson sampling (Thompson 1933) with normal gains: the message with the largest sampled mean gain.

    Each message starts with ``prior`` gains of 0, so the sampled gains of untried messages have a large spread.

    Attributes:
        prior: Number of initial gains of 0.
    """

    prior: float = 1.0

    def __post_init__(self) -> None:
        """Check the setting."""
        check_finite("ThompsonSampling.prior", self.prior, above=True)

    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        noise = torch.randn(len(stats.counts), generator=generator, dtype=torch.double, device="cpu").tolist()
        deviation = stats.deviation()
        return _largest(
            [
                (stats.sums[m] + math.sqrt(stats.counts[m] + self.prior) * deviation * noise[m])
                / (stats.counts[m] + self.prior)
                for m in range(len(stats.counts))
            ]
        )


@dataclass(frozen=True)
class UpperConfidence(MessageChoice):
    """The message with the largest upper confidence bound (UCB1, Auer et al. 2002), untried ones first.

    Attributes:
        width: Width of the confidence interval, in standard deviations of the gains.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        """Check the setting."""
        check_finite("UpperConfidence.width", self.width)

    def choose(self, stats: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`; gains are known only after a step, so its proposals use the untried messages in turn."""
        tried = sum(stats.counts)
        bounds = [
            stats.mean(m) + self.width * stats.deviation() * math.sqrt(2 * math.log(tried) / count)
            if count
            else math.inf
            for m, count in enumerate(stats.counts)
        ]
        order = sorted(range(len(bounds)), key=lambda m: -bounds[m])
        untried = sum(math.isinf(bound) for bound in bounds)
        return order[index % untried] if untried else order[0]


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
