"""Which prompts were good on validation: the best, the memory, and when to go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PromptMemory:
    """Keeps the best prompts, and counts validations without a better one.

    Strictly better is better; what is as good as the best changes nothing.

    Args:
        size: ``M``, prompts of all layers that are remembered, sorted by accuracy, the best first.
        tolerance: So many validations in a row without a better accuracy lead back to the best prompts, one at least;
            -1 for never.
    """

    def __init__(self, size: int, tolerance: int) -> None:
        """Nothing is known yet."""
        self.size, self.tolerance = size, tolerance
        self.best: list[str] | None = None
        self.best_accuracy = -1.0
        self.patience = 0
        self.entries: list[tuple[float, list[str]]] = []

    def update(self, prompts: Sequence[str], accuracy: float) -> list[str]:
        """Take note of a validation.

        Returns:
            The prompts to go on with: these, or the best ones.
        """
        if self.best is None or accuracy > self.best_accuracy:
            self.best, self.best_accuracy, self.patience = list(prompts), accuracy, 0
            self.entries.append((accuracy, list(prompts)))
            self.entries.sort(key=lambda entry: -entry[0])  # stable: of equals the earlier one stays ahead
            del self.entries[self.size :]
            return list(prompts)
        self.patience += 1
        if self.tolerance >= 0 and self.patience >= self.tolerance:
            self.patience = 0
            return list(self.best)
        return list(prompts)

    def of_layer(self, index: int) -> list[str]:
        """The remembered prompts of a layer, the best first."""
        return [prompts[index] for _, prompts in self.entries]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "best": self.best,
            "best_accuracy": self.best_accuracy,
            "patience": self.patience,
            "entries": [[accuracy, prompts] for accuracy, prompts in self.entries],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.best, self.best_accuracy, self.patience = state["best"], state["best_accuracy"], state["patience"]
        self.entries = [(accuracy, prompts) for accuracy, prompts in state["entries"]]
