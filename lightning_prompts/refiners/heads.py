"""Heads of a Refiner: from features to vectors or scores.

The head is the widest part of a Refiner, so its size is a choice. Every position has its own weights. All heads start
at zero, so that all questions have the same prompt before training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError, check_at_least


class Head(ABC):
    """Settings of a head; `build` makes its module."""

    @abstractmethod
    def outputs(self, width: int, vocabulary: int) -> int:
        """Return the number of outputs of the linear layer of a position."""

    def extra(self, vocabulary: int) -> int:
        """Return the number of parameters that all positions share."""
        del vocabulary
        return 0

    @abstractmethod
    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """Make a module from features ``[B, P, F]`` and directions ``[V, D]`` to scores ``[B, P, V]``.

        Args:
            features: ``F``.
            length: ``P``.
            width: ``D``.
            vocabulary: ``V``.
        """

    def size(self, features: int, length: int, width: int, vocabulary: int) -> int:
        """Return the number of parameters of the module."""
        return length * (features + 1) * self.outputs(width, vocabulary) + self.extra(vocabulary)


@dataclass(frozen=True)
class Tied(Head):
    """Vectors ``[P, D]`` whose dot products with the LM's embeddings are the scores, without parameters per token."""

    def outputs(self, width: int, vocabulary: int) -> int:
        """``D``."""
        return width

    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """See `Head`."""
        return _Tied(features, length, width)


class _Tied(nn.Module):
    def __init__(self, features: int, length: int, width: int) -> None:
        super().__init__()
        self.linear = PositionLinear(length, features, width)

    def vectors(self, features: Tensor) -> Tensor:
        """Compute vectors ``[B, P, D]``."""
        return self.linear(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor, directions: Tensor) -> Tensor:
        return self.vectors(features) @ directions.T


@dataclass(frozen=True)
class Factored(Head):
    """Low-rank scores: a linear layer to ``rank`` numbers, and a learned matrix ``[rank, V]``.

    Attributes:
        rank: Rank of the scores.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        """Check the rank."""
        check_at_least("head.rank", self.rank)

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
    """Separate weights for every token at every position, ``F * P * V``: the published head, usually too large.

    Attributes:
        max_parameters: Raise an error for a larger head.
    """

    max_parameters: float = 1e8

    def outputs(self, width: int, vocabulary: int) -> int:
        """``V``."""
        return vocabulary

    def build(self, features: int, length: int, width: int, vocabulary: int) -> nn.Module:
        """See `Head`.

        Raises:
            UserError: The head would exceed ``max_parameters``.
        """
        size = self.size(features, length, width, vocabulary)
        if not size <= self.max_parameters:
            raise UserError(
                f"the full head would have {size:,} parameters ({features} features x {length} positions x "
                f"{vocabulary:,} tokens), more than max_parameters ({self.max_parameters:,.0f}); use head: Tied or "
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
    """A linear layer for each position, ``[B, P, F]`` -> ``[B, P, O]``, initially zero."""

    def __init__(self, length: int, features: int, outputs: int) -> None:
        """Initialise all weights with zeros."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length, features, outputs))
        self.bias = nn.Parameter(torch.zeros(length, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer of each position, ``[B, P, F]`` -> ``[B, P, O]``."""
        return torch.einsum("bpf,pfo->bpo", features, self.weight) + self.bias
