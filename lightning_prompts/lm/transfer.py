"""Asynchronous copies between the host and the device of the LM, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def to_device(values: Tensor | Sequence[float] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy numbers from the host to a device asynchronously.

    Args:
        values: A tensor, an array, or numbers: integers become int64, others float32.
        device: Target device. For the CPU, tensors and arrays are not copied.
    """
    tensor = torch.as_tensor(values, device="cpu")
    if device.type == "cuda":  # asynchronous copies need pinned memory
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device_together(parts: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Copy several arrays of integers in one transfer; the results keep their shapes and share one storage."""
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    return views(to_device(np.concatenate([part.ravel() for part in parts]), device), parts)


class Download:
    """An asynchronous copy of a tensor of integers to the host, which waits only when it reads the values.

    Args:
        tensor: A tensor on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy."""
        self._host = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list[int]:
        """Wait for the copy and return the numbers."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


def views(flat: Tensor, parts: Sequence[NDArray[np.int64]]) -> list[Tensor]:
    """Split a tensor ``[N]`` into views with the shapes of arrays that have ``N`` numbers in total."""
    sizes = [part.size for part in parts]
    return [piece.view(part.shape) for piece, part in zip(flat.split(sizes), parts, strict=True)]


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows ``[T, D]`` with zeros to one tensor ``[B, T, D]``; return it with its boolean mask ``[B, T]``."""
    lengths = to_device([len(part) for part in parts], parts[0].device)
    together = pad_sequence(list(parts), batch_first=True)
    return together, torch.arange(together.shape[1], device=together.device) < lengths[:, None]
