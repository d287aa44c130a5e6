"""Where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """Run something, and name the first part of a module whose output is not finite.

    Args:
        module: Its parts are watched.
        run: What runs it.

    Returns:
        The part's name within ``module``; ``None`` where all outputs are finite.
    """
    found: list[str] = []
    handles = [part.register_forward_hook(_watch(name, found)) for name, part in module.named_modules() if name]
    try:
        with ExitStack() as stack:
            for part in module.modules():
                by_module: Any = getattr(part, "by_module", None)
                if by_module is not None:  # a language model, whose modules may run as one graph
                    stack.enter_context(by_module())
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _watch(name: str, found: list[str]) -> Any:  # noqa: ANN401 - torch's own hook
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(bool(torch.isfinite(part).all()) for part in tensors
                   if isinstance(part, Tensor) and part.is_floating_point()):  # fmt: skip
            found.append(name)

    return hook
