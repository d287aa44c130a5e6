"""Prefixes: keys and values of each layer, trained freely or through a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError
from lightning_prompts.lm import KeyValues
from lightning_prompts.randomness import from_run_seed


@dataclass(frozen=True)
class PrefixMLP:
    """``W2 tanh(W1 e)`` from an embedding ``e`` per position (Li & Liang 2021, section 4.3), folded away on export.

    Attributes:
        width: Of the embeddings.
        hidden: Of the network.
    """

    width: int = 256
    hidden: int = 256

    def __post_init__(self) -> None:
        """Check the widths."""
        if min(self.width, self.hidden) < 1:
            raise UserError(f"model.mlp: width ({self.width}) and hidden ({self.hidden}) must be at least 1")

    def build(self, length: int, outputs: int) -> nn.Module:
        """A module without inputs that gives ``[P, W]``, zeros at first: a prefix starts where it is initialised."""
        with from_run_seed():
            return _EmbeddingMLP(length, self.width, self.hidden, outputs)


class _EmbeddingMLP(nn.Module):
    def __init__(self, length: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(length, width))
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self) -> Tensor:
        return self.down(torch.tanh(self.up(self.embeddings)))  # type: ignore[no-any-return]


class _Free(nn.Module):
    def __init__(self, length: int, outputs: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(length, outputs))

    def forward(self) -> Tensor:
        return self.delta


class KeyValuePrompt(nn.Module):
    """Trainable keys and values, float32 whatever the LM's precision.

    What is trained is the distance from the start in units of the LM's own keys and values, layer by layer: their
    scales differ by orders of magnitude between layers, and one learning rate has to serve all.

    Args:
        initial: Where the prefix starts.
        like: Keys and values of some text, for their scale.
        mlp: The network, or ``None`` to train the keys and values themselves.
    """

    initial: Tensor
    scale: Tensor

    def __init__(self, initial: KeyValues, like: KeyValues, mlp: PrefixMLP | None) -> None:
        """Start at ``initial``."""
        super().__init__()
        self.widths = initial.widths
        flat = initial.flatten()
        self.register_buffer("initial", flat)
        # One number per layer, and for keys and values apart; a checkpoint holds them, as they depend on a draw.
        parts = [part for pair in like.layers for part in pair]
        self.register_buffer("scale", torch.stack([part.float().std() for part in parts]))
        self.sizes = [part[0].numel() for part in parts]
        outputs = flat.shape[-1]
        self.network = (_Free(len(flat), outputs) if mlp is None else mlp.build(len(flat), outputs)).to(flat.device)

    def forward(self) -> KeyValues:
        """The prefix."""
        scale = torch.cat([number.expand(size) for number, size in zip(self.scale, self.sizes, strict=True)])
        return KeyValues.unflatten(self.initial + scale * self.network(), self.widths)

    def start(self) -> KeyValues:
        """The prefix before training."""
        return KeyValues.unflatten(self.initial, self.widths)
