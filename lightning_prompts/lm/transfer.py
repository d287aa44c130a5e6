"""Copies between the host and the device of the LM that do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor | Sequence[float] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy numbers of the host to a device; the host does not wait for the copy.

    Args:
        values: Integers become int64, other numbers float32.
        device: Where they are needed. On the CPU a tensor or array is not copied.
    """
    tensor = torch.as_tensor(values, device="cpu")
    if device.type == "cuda":  # only pinned memory is copied while the host goes on
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device_together(parts: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Copy several arrays of integers at once; the results keep their shapes and share one block of memory."""
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in parts]
    return views(to_device(np.concatenate([part.ravel() for part in parts]), device), parts)


class Download:
    """A tensor of integers on its way to the host, which waits for it only when it reads it.

    Args:
        tensor: On any device.
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
        """The numbers."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


def views(flat: Tensor, parts: Sequence[NDArray[np.int64]]) -> list[Tensor]:
    """Parts of one block of memory ``[N]``, with the shapes of some arrays of ``N`` numbers in all."""
    sizes = [part.size for part in parts]
    return [piece.view(part.shape) for piece, part in zip(flat.split(sizes), parts, strict=True)]
