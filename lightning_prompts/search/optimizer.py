"""A search as an optimiser, so that the Trainer counts, saves and limits its steps like any other's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SearchOptimizer(Optimizer):
    """An optimiser whose step searches with the gradient that the closure computes.

    Args:
        parameters: The parameters of the gradient.
        search: Runs the step, without gradient.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], search: Callable[[], None]) -> None:
        """Keep the search; the method's buffers hold its state."""
        super().__init__(parameters, {"lr": 1.0})
        self.search = search

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Compute the gradient, then search."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.search()
        return loss
