"""Rows of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows ``[T, D]`` as one tensor ``[B, T, D]``, zeros behind the shorter ones, and their mask ``[B, T]`` bool."""
    lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
    together = pad_sequence(list(parts), batch_first=True)
    return together, torch.arange(together.shape[1], device=together.device) < lengths[:, None]
