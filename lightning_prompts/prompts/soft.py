"""Soft prompts: trainable vectors in the place of token embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prompts.errors import check_at_least
from lightning_prompts.randomness import from_run_seed


class Reparametrization(ABC):
    """A network between the parameters of a prompt and the prompt, merged on export."""

    @abstractmethod
    def build(self, width: int) -> nn.Module:
        """Make a module that maps ``[P, D]`` to ``[P, D]``, with ``D = width``."""


@dataclass(frozen=True)
class ResidualMLP(Reparametrization):
    """``x + W2 relu(W1 x)``, shared by all positions.

    ``W2`` starts at zero, so that the network does not change the initial prompt.

    Attributes:
        hidden: Hidden width of the network.
    """

    hidden: int = 32

    def __post_init__(self) -> None:
        """Check the width."""
        check_at_least("reparametrization.hidden", self.hidden)

    def build(self, width: int) -> nn.Module:
        """See `Reparametrization`."""
        with from_run_seed():
            return _Residual(width, self.hidden)


class _Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class SoftPrompt(nn.Module):
    """``P`` trainable vectors in float32, independent of the precision of the LM.

    Args:
        initial: Initial vectors ``[P, D]``, kept to measure how far the prompt has moved.
        reparametrization: A network between the parameters and the prompt, or ``None``.
        frozen: Number of first vectors that stay as they are.
    """

    initial: Tensor

    def __init__(self, initial: Tensor, reparametrization: Reparametrization | None = None, frozen: int = 0) -> None:
        """Start at ``initial``."""
        super().__init__()
        self.frozen = frozen
        self.register_buffer("initial", initial.detach().float().clone())
        self.embeddings = nn.Parameter(self.initial.clone())
        self.network = (
            None if reparametrization is None else reparametrization.build(initial.shape[-1]).to(initial.device)
        )

    def forward(self) -> Tensor:
        """Return the prompt ``[P, D]``."""
        vectors = self.embeddings if self.network is None else self.network(self.embeddings)
        return torch.cat([self.initial[: self.frozen], vectors[self.frozen :]]) if self.frozen else vectors
