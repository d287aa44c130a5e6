"""Pad rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_prompts.lm.transfer import to_device


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows ``[T, D]`` with zeros to one tensor ``[B, T, D]``; return it with its boolean mask ``[B, T]``."""
    lengths = to_device([len(part) for part in parts], parts[0].device)
    together = pad_sequence(list(parts), batch_first=True)
    return together, torch.arange(together.shape[1], device=together.device) < lengths[:, None]
