"""Rows of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_prompts.lm.transfer import to_device


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows ``[T, D]`` as one tensor ``[B, T, D]``, zeros behind the shorter ones, and their mask ``[B, T]`` bool."""
    lengths = to_device([len(part) for part in parts], parts[0].device)
    together = pad_sequence(list(parts), batch_first=True)
    return together, torch.arange(together.shape[1], device=together.device) < lengths[:, None]
