"""The best prompts by validation, and when to return to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PromptMemory:
    """Keeps the best prompts, and counts validations without an improvement.

    Only a strictly better accuracy counts; ties change nothing.

    Args:
        size: ``M``, number of best prompts (of all layers) to remember, sorted by accuracy.
        tolerance: Return to the best prompts after this many validations in a row without a better accuracy (at least
            one); -1 for never.
    """

    def __init__(self, size: int, tolerance: int) -> None:
        """Start empty."""
        self.size, self.tolerance = size, tolerance
        self.best: list[str] | None = None
        self.best_accuracy = -1.0
        self.patience = 0
        self.entries: list[tuple[float, list[str]]] = []

    def update(self, prompts: Sequence[str], accuracy: float) -> list[str]:
        """Record the validation accuracy of prompts.

        Returns:
            The prompts to continue with: the given or the best ones.
        """
        if self.best is None or accuracy > self.best_accuracy:
            self.best, self.best_accuracy, self.patience = list(prompts), accuracy, 0
            self.entries.append((accuracy, list(prompts)))
            self.entries.sort(key=lambda entry: -entry[0])  # stable: the earlier of two equals stays first
            del self.entries[self.size :]
            return list(prompts)
        self.patience += 1
        if self.tolerance >= 0 and self.patience >= self.tolerance:
            self.patience = 0
            return list(self.best)
        return list(prompts)

    def of_layer(self, index: int) -> list[str]:
        """Return the remembered prompts of one layer, the best first."""
        return [prompts[index] for _, prompts in self.entries]

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "best": self.best,
            "best_accuracy": self.best_accuracy,
            "patience": self.patience,
            "entries": [[accuracy, prompts] for accuracy, prompts in self.entries],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.best, self.best_accuracy, self.patience = state["best"], state["best_accuracy"], state["patience"]
        self.entries = [(accuracy, prompts) for accuracy, prompts in state["entries"]]
