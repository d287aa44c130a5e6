"""Prompts of the LM: vectors, or keys and values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyValues:
    """Keys and values that every token attends to, as if ``P`` tokens came before all others.

    The shapes are those of the KV cache of each layer, so models with fewer key/value heads than attention heads, or
    with different shapes per layer, need no special case.

    Attributes:
        layers: Keys ``[P, Hkv, Dh]`` and values ``[P, Hkv, Dh]`` of each layer.
    """

    layers: Sequence[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        """``P``."""
        return self.layers[0][0].shape[0]

    @property
    def widths(self) -> list[tuple[torch.Size, torch.Size]]:
        """Shapes ``[Hkv, Dh]`` of keys and values in each layer."""
        return [(key.shape[1:], value.shape[1:]) for key, value in self.layers]

    def flatten(self) -> Tensor:
        """Concatenate all layers to ``[P, W]`` in float32."""
        return torch.cat([part.flatten(1).float() for pair in self.layers for part in pair], -1)

    @classmethod
    def unflatten(cls, flat: Tensor, widths: Sequence[tuple[torch.Size, torch.Size]]) -> KeyValues:
        """Invert `flatten`."""
        sizes = [shape.numel() for pair in widths for shape in pair]
        shapes = [shape for pair in widths for shape in pair]
        parts = [part.unflatten(-1, shape) for part, shape in zip(flat.split(sizes, -1), shapes, strict=True)]
        return cls(list(zip(parts[::2], parts[1::2], strict=True)))


# Vectors in the prompt slot, [P, D] or [B, P, D]; or keys and values before all tokens.
Prompt: TypeAlias = Tensor | KeyValues


def slot_length(prompt: Prompt) -> int:
    """Tokens of the prompt slot: ``P`` for vectors, 0 for keys and values."""
    return 0 if isinstance(prompt, KeyValues) else prompt.shape[-2]


def prompt_length(prompt: Prompt) -> int:
    """``P``."""
    return prompt.length if isinstance(prompt, KeyValues) else prompt.shape[-2]


def same_for_all(prompt: Prompt) -> bool:
    """Whether all rows have the same prompt."""
    return isinstance(prompt, KeyValues) or prompt.dim() == 2


def ahead_of(prompt: Prompt) -> int:
    """Number of keys and values before all tokens: 0 for vectors, ``P`` for keys and values."""
    return prompt.length if isinstance(prompt, KeyValues) else 0
