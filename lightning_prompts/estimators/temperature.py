"""Temperature schedules."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prompts.errors import UserError


@dataclass(frozen=True)
class Temperature:
    """Exponential decay from ``start`` to ``end``: the same factor at every step.

    Attributes:
        start: Temperature at the first step.
        end: Temperature at the last step and in evaluation after it.
    """

    start: float = 1.0
    end: float = 0.1

    def __post_init__(self) -> None:
        """Check the range."""
        if not (self.end > 0 and 0 < self.start < float("inf") and self.end < float("inf")):
            raise UserError(f"a temperature must be above 0: start {self.start}, end {self.end}")

    def at(self, progress: float) -> float:
        """Return the temperature at a fraction ``progress`` of the run.

        >>> Temperature(start=1.0, end=0.25).at(0.5)
        0.5
        """
        return float(self.start * (self.end / self.start) ** progress)
