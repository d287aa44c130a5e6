"""Competition problems (Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH Dataset")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prompts.answers import boxed
from lightning_prompts.datamodules.problems import WorkedProblems
from lightning_prompts.datamodules.sources import HubSource


class Math(WorkedProblems):
    r"""MATH: a problem, a solution with ``\boxed{}``, a level and a subject.

    From the hub (``nlile/hendrycks-MATH-benchmark``), or from local files with the fields ``problem`` and ``solution``.

    Args:
        subjects: Keep only these subjects (``Algebra``, ...), by the field ``type`` or ``subject``.
        max_level: Keep problems up to this level (1 to 5).
    """

    def __init__(self, subjects: list[str] | None = None, max_level: int = 5, **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.subjects = None if subjects is None else {subject.casefold() for subject in subjects}
        self.max_level = max_level

    @property
    def hub(self) -> HubSource:
        """The dataset on the hub."""
        return HubSource("nlile/hendrycks-MATH-benchmark", None, {"train": "train", "test": "test"})

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have."""
        return ("problem", "solution")

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """Select by subject and level; rows without them are kept."""
        subject, level = raw.get("type", raw.get("subject")), str(raw.get("level", ""))
        if self.subjects is not None and subject is not None and str(subject).casefold() not in self.subjects:
            return False
        digits = level.removeprefix("Level").strip()
        return not digits.isdigit() or int(digits) <= self.max_level

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """Take the final answer from the last box."""
        solution = str(raw["solution"])
        return str(raw["problem"]), solution, boxed(solution) or ""
