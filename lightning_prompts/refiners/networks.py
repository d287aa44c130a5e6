"""Networks from the hidden states of a question to features for each position of its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError, check_at_least


class RefinerNetwork(ABC):
    """Settings of a network; `build` makes its module."""

    pooled: ClassVar[bool]  # whether the network reads only the mean of a question's hidden states

    @abstractmethod
    def build(self, width: int, length: int) -> nn.Module:
        """Make a module from hidden states ``[B, T, D]`` and their mask ``[B, T]`` to features ``[B, P, F]``.

        Args:
            width: ``D``.
            length: ``P``.
        """

    @property
    @abstractmethod
    def features(self) -> int:
        """``F``."""


@dataclass(frozen=True)
class MLPRefiner(RefinerNetwork):
    """A masked mean over the question and one hidden layer with ReLU; all positions have the same features.

    Attributes:
        hidden: ``F``.
    """

    hidden: int = 256
    pooled = True

    def __post_init__(self) -> None:
        """Check the width."""
        check_at_least("refiner.hidden", self.hidden)

    @property
    def features(self) -> int:
        """See `RefinerNetwork`."""
        return self.hidden

    def build(self, width: int, length: int) -> nn.Module:
        """See `RefinerNetwork`."""
        return _MLP(width, self.hidden, length)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        features = torch.relu(self.up(self.norm(masked_mean(states, mask))))
        return features[:, None].expand(-1, self.length, -1)


@dataclass(frozen=True)
class TransformerRefiner(RefinerNetwork):
    """``P`` learned queries, which attend to the question and then to each other in each layer.

    Attributes:
        width: ``F``, the width of the queries.
        layers: Number of layers.
        heads: Number of attention heads, a divisor of ``width``.
    """

    width: int = 256
    layers: int = 2
    heads: int = 4
    pooled = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise UserError(
                f"refiner: width ({self.width}), layers ({self.layers}) and heads ({self.heads}) must be at least 1, "
                "and width a multiple of heads"
            )

    @property
    def features(self) -> int:
        """See `RefinerNetwork`."""
        return self.width

    def build(self, width: int, length: int) -> nn.Module:
        """See `RefinerNetwork`."""
        return _Queries(width, length, self)


class _Queries(nn.Module):
    def __init__(self, width: int, length: int, shape: TransformerRefiner) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(length, shape.width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.final = nn.LayerNorm(shape.width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        memory = self.down(self.norm(states))
        x = self.queries.expand(len(states), -1, -1)
        for block in self.blocks:
            x = block(x, memory, ~mask)
        return self.final(x)  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Cross-attention, self-attention and feed-forward layer, each after its own norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, memory: Tensor, ignored: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.cross(y, memory, memory, key_padding_mask=ignored, need_weights=False)[0]
        y = self.norms[1](x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.feed(self.norms[2](x))  # type: ignore[no-any-return]


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean ``[B, D]`` of ``[B, T, D]`` over the positions in a mask ``[B, T]``."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)
