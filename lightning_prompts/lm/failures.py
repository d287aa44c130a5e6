"""Failures of a pass: out of memory, and outputs that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of torch, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def first_not_finite(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """Run a function and return the name of the first submodule whose output is not finite.

    Args:
        module: The module to watch.
        run: Function that runs the module.

    Returns:
        The name of the submodule within ``module``; ``None`` if all outputs are finite.
    """
    found: list[str] = []
    handles = [part.register_forward_hook(_watch(name, found)) for name, part in module.named_modules() if name]
    try:
        with ExitStack() as stack:
            for part in module.modules():
                by_module: Any = getattr(part, "by_module", None)
                if by_module is not None:  # a language model that may run as a CUDA graph
                    stack.enter_context(by_module())
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]) -> Any:  # noqa: ANN401 - a torch hook
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        tensors = output if isinstance(output, tuple) else (output,)
        numbers = [part for part in tensors if isinstance(part, Tensor) and part.is_floating_point()]
        if not all(bool(torch.isfinite(part).all()) for part in numbers):
            found.append(name)

    return hook
