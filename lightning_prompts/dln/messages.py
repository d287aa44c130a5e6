"""What the proposer is told to do with an instruction, and which message is told when.

The paper cycles through its messages. Treated as the arms of a bandit, they have measured gains: how much better the
batch scored under a proposal than under the prompt that it was made from.
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
    """Running statistics of the messages' gains; goes into checkpoints.

    Args:
        count: How many messages.
    """

    def __init__(self, count: int = len(MESSAGES)) -> None:
        """No gain is known yet."""
        self.counts = [0] * count
        self.sums = [0.0] * count
        self.squares = [0.0] * count

    def update(self, message: int, gain: float) -> None:
        """Take note of what a message brought."""
        self.counts[message] += 1
        self.sums[message] += gain
        self.squares[message] += gain * gain

    def mean(self, message: int) -> float:
        """The mean gain so far; 0 before the first."""
        return self.sums[message] / max(self.counts[message], 1)

    def deviation(self) -> float:
        """Standard deviation of the gains around their message's mean, over all messages; 1 while unknown."""
        total = sum(self.counts) - sum(count > 0 for count in self.counts)
        rest = sum(self.squares[m] - self.counts[m] * self.mean(m) ** 2 for m in range(len(self.counts)))
        return math.sqrt(max(rest, 0.0) / total) if total > 0 and rest > 0 else 1.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"counts": self.counts, "sums": self.sums, "squares": self.squares}

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.counts, self.sums, self.squares = (list(state[name]) for name in ("counts", "sums", "squares"))


class MessageChoice(ABC):
    """Which message a proposal gets."""

    @abstractmethod
    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """The message of proposal ``index`` of a step; ``None`` for none."""


@dataclass(frozen=True)
class NoMessage(MessageChoice):
    """No message."""

    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return None


@dataclass(frozen=True)
class CycledMessages(MessageChoice):
    """One after another, as the authors do."""

    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return index % len(arms.counts)


@dataclass(frozen=True)
class UniformMessages(MessageChoice):
    """Any, with the same probability."""

    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        return int(torch.randint(len(arms.counts), (1,), generator=generator, device="cpu"))


@dataclass(frozen=True)
class ThompsonSampling(MessageChoice):
    """The one whose gain is largest by a draw from what is known of it (Thompson 1933), gains taken as normal.

    A message counts as if ``prior`` gains of 0 had been seen, so that an untried one is drawn with a wide spread.

    Attributes:
        prior: How many.
    """

    prior: float = 1.0

    def __post_init__(self) -> None:
        """Check the setting."""
        check_finite("ThompsonSampling.prior", self.prior, above=True)

    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`."""
        noise = torch.randn(len(arms.counts), generator=generator, dtype=torch.double, device="cpu").tolist()
        deviation = arms.deviation()
        return _largest(
            [
                (arms.sums[m] + math.sqrt(arms.counts[m] + self.prior) * deviation * noise[m])
                / (arms.counts[m] + self.prior)
                for m in range(len(arms.counts))
            ]
        )


@dataclass(frozen=True)
class UpperConfidence(MessageChoice):
    """The one whose gain might be largest (UCB1, Auer et al. 2002), untried ones first.

    Attributes:
        width: Of the confidence interval, in standard deviations of the gains.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        """Check the setting."""
        check_finite("UpperConfidence.width", self.width)

    def choose(self, arms: BanditStats, index: int, generator: torch.Generator) -> int | None:
        """See `MessageChoice`; gains are known after a step, so the proposals of one step take the best in turn."""
        tried = sum(arms.counts)
        bounds = [
            math.inf if not count
            else arms.mean(m) + self.width * arms.deviation() * math.sqrt(2 * math.log(tried) / count)
            for m, count in enumerate(arms.counts)
        ]  # fmt: skip
        order = sorted(range(len(bounds)), key=lambda m: -bounds[m])
        untried = sum(math.isinf(bound) for bound in bounds)
        return order[index % untried] if untried else order[0]


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
