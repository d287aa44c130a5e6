"""Soft prompts: vectors where tokens would be."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """Reparametrisation of a prompt through a small network with a skip connection.

    ``x + W2 relu(W1 x)``, shared by all positions. ``W2`` starts at zero, so that the prompt starts where its
    initialiser put it. After training the result is a plain prompt again: the network is folded away on export.

    Args:
        hidden: Width of the network.
    """

    def __init__(self, hidden: int = 256) -> None:
        """Weights are made when the model's width is known, see `build`."""
        super().__init__()
        self.hidden = hidden

    def build(self, width: int) -> None:
        """Make the weights for vectors of ``width`` entries."""
        self.up = nn.Linear(width, self.hidden)
        self.down = nn.Linear(self.hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[P, D]`` -> ``[P, D]``."""
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class SoftPrompt(nn.Module):
    """``P`` trainable vectors, float32 whatever the LM's precision.

    Args:
        initial: ``[P, D]``, kept to tell how far the prompt has moved.
        reparametrization: A network between the parameters and the prompt, or ``None``.
    """

    initial: Tensor

    def __init__(self, initial: Tensor, reparametrization: ResidualMLP | None = None) -> None:
        """Start at ``initial``."""
        super().__init__()
        self.register_buffer("initial", initial.detach().float().clone())
        self.embeddings = nn.Parameter(self.initial.clone())
        self.reparametrization = reparametrization
        if reparametrization is not None:
            reparametrization.build(initial.shape[-1])

    def forward(self) -> Tensor:
        """The prompt, ``[P, D]``."""
        return self.embeddings if self.reparametrization is None else self.reparametrization(self.embeddings)
