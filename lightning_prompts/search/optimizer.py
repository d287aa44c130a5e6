"""A search in the place of an optimiser, so that the Trainer counts, saves and limits its steps like any other's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SearchOptimizer(Optimizer):
    """An optimiser whose step looks for something better, knowing the gradient that the closure has left.

    Args:
        parameters: What the gradient is taken by.
        search: Does the step, without gradient.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], search: Callable[[], None]) -> None:
        """No state of its own: the method's buffers hold it."""
        super().__init__(parameters, {"lr": 1.0})
        self.search = search

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Gradient first, then the search."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.search()
        return loss
