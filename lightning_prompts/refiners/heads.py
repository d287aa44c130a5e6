"""From features to vectors or scores: the widest part of a Refiner, and so a choice.

Every position has weights of its own. All heads start at zero: before training, each question gets the same prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError


class Head(ABC):
    """A kind of head; `build` makes one."""

    @abstractmethod
    def outputs(self, width: int, vocabulary: int) -> int:
        """How many numbers each position's features become."""

    @abstractmethod
    def extra(self, vocabulary: int) -> int:
        """Further parameters, shared by all positions."""

    @abstractmethod
    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """A module from features ``[B, P, F]`` and directions ``[V, D]`` to scores ``[B, P, V]``.

        Args:
            features: ``F``.
            length: ``P``.
            width: ``D``.
            vocabulary: ``V``.
        """

    def size(self, features: int, length: int, width: int, vocabulary: int) -> int:
        """How many parameters `build` makes."""
        return length * (features + 1) * self.outputs(width, vocabulary) + self.extra(vocabulary)


@dataclass(frozen=True)
class Tied(Head):
    """A vector ``[P, D]``, compared with the LM's own embeddings: no parameter per token."""

    def outputs(self, width: int, vocabulary: int) -> int:
        """``D``."""
        return width

    def extra(self, vocabulary: int) -> int:
        """None."""
        return 0

    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """See `Head`."""
        return _Tied(features, length, width)


class _Tied(nn.Module):
    def __init__(self, features: int, length: int, width: int) -> None:
        super().__init__()
        self.linear = PositionLinear(length, features, width)

    def vectors(self, features: Tensor) -> Tensor:
        """``[B, P, D]``."""
        return self.linear(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor, directions: Tensor) -> Tensor:
        return self.vectors(features) @ directions.T


@dataclass(frozen=True)
class Factored(Head):
    """Scores of low rank: features to ``rank`` numbers, and a learned matrix ``[rank, V]``.

    Attributes:
        rank: Of the scores.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank < 1:
            raise UserError(f"head.rank must be at least 1, got {self.rank}")

    def outputs(self, width: int, vocabulary: int) -> int:
        """``rank``."""
        return self.rank

    def extra(self, vocabulary: int) -> int:
        """``rank * V``."""
        return self.rank * vocabulary

    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """See `Head`."""
        return _Factored(features, length, self.rank, vocabulary)


class _Factored(nn.Module):
    def __init__(self, features: int, length: int, rank: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = PositionLinear(length, features, rank)
        self.up = nn.Parameter(torch.randn(rank, vocabulary) / rank**0.5)

    def forward(self, features: Tensor, directions: Tensor) -> Tensor:
        del directions
        return self.linear(features) @ self.up  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Full(Head):
    """Weights for every token at every position, ``F * P * V``: what was published, and mostly too large.

    Attributes:
        max_parameters: Refuse to be built with more.
    """

    max_parameters: float = 1e8

    def outputs(self, width: int, vocabulary: int) -> int:
        """``V``."""
        return vocabulary

    def extra(self, vocabulary: int) -> int:
        """None."""
        return 0

    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """See `Head`.

        Raises:
            UserError: It would exceed ``max_parameters``.
        """
        size = self.size(features, length, width, vocabulary)
        if not size <= self.max_parameters:
            raise UserError(
                f"the full head would have {size:,} parameters ({features} features x {length} positions x "
                f"{vocabulary:,} tokens), more than max_parameters ({self.max_parameters:,.0f}): use head: Tied or "
                "Factored, or raise model.head.max_parameters"
            )
        return _Full(features, length, vocabulary)


class _Full(nn.Module):
    def __init__(self, features: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = PositionLinear(length, features, vocabulary)

    def forward(self, features: Tensor, directions: Tensor) -> Tensor:
        del directions
        return self.linear(features)  # type: ignore[no-any-return]


class PositionLinear(nn.Module):
    """A linear layer for each position, ``[B, P, F]`` -> ``[B, P, O]``, zero at first."""

    def __init__(self, length: int, features: int, outputs: int) -> None:
        """All zeros."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length, features, outputs))
        self.bias = nn.Parameter(torch.zeros(length, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """``[B, P, F]`` -> ``[B, P, O]``."""
        return torch.einsum("bpf,pfo->bpo", features, self.weight) + self.bias
