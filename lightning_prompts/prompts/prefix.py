"""Trainable prefixes: keys and values of each layer, optionally reparametrised by a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError
from lightning_prompts.lm import KeyValues
from lightning_prompts.randomness import from_run_seed


@dataclass(frozen=True)
class PrefixMLP:
    """``W2 tanh(W1 e)`` of one embedding ``e`` per position (Li & Liang 2021, section 4.3); merged on export.

    Attributes:
        width: Width of the embeddings.
        hidden: Hidden width of the network.
    """

    width: int = 256
    hidden: int = 256

    def __post_init__(self) -> None:
        """Check the widths."""
        if min(self.width, self.hidden) < 1:
            raise UserError(f"model.mlp: width ({self.width}) and hidden ({self.hidden}) must be at least 1")

    def build(self, length: int, outputs: int) -> nn.Module:
        """Make a module without inputs whose output ``[P, W]`` is zero initially."""
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


class Prefix(nn.Module):
    """Trainable keys and values in float32, independent of the precision of the LM.

    The parameters are offsets from the initial prefix in units of the scale of the LM's keys and values in each layer.
    These scales differ by orders of magnitude between layers, but all layers have the same learning rate.

    Args:
        initial: The initial prefix.
        like: Keys and values of a text, to measure their scale.
        mlp: The network, or ``None`` to train the keys and values directly.
        frozen: Number of first positions that stay as they are.
    """

    initial: Tensor
    scale: Tensor

    def __init__(self, initial: KeyValues, like: KeyValues, mlp: PrefixMLP | None, frozen: int = 0) -> None:
        """Start at ``initial``."""
        super().__init__()
        self.frozen = frozen
        self.widths = initial.widths
        flat = initial.flatten()
        self.register_buffer("initial", flat)
        # One scale for the keys and one for the values of each layer. Checkpoints contain them, because they depend on
        # the random text of ``like``.
        parts = [part for pair in like.layers for part in pair]
        self.register_buffer("scale", torch.stack([part.float().std() for part in parts]))
        self.sizes = [part[0].numel() for part in parts]
        outputs = flat.shape[-1]
        self.network = (_Free(len(flat), outputs) if mlp is None else mlp.build(len(flat), outputs)).to(flat.device)

    def forward(self) -> KeyValues:
        """Return the current prefix."""
        scale = torch.cat([number.expand(size) for number, size in zip(self.scale, self.sizes, strict=True)])
        flat = self.initial + scale * self.network()
        if self.frozen:
            flat = torch.cat([self.initial[: self.frozen], flat[self.frozen :]])
        return KeyValues.unflatten(flat, self.widths)

    def start(self) -> KeyValues:
        """Return the initial prefix."""
        return KeyValues.unflatten(self.initial, self.widths)
