"""Grade-school word problems (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_prompts.datamodules.problems import WorkedProblems
from lightning_prompts.datamodules.sources import HubSource

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class GSM8K(WorkedProblems):
    r"""GSM8K: a question, steps, and ``#### N``; 1,319 test rows.

    From the hub (``openai/gsm8k``), or from local files with its fields ``question`` and ``answer``.

    Args:
        calculator: Keep the calculator annotations (``<<48/2=24>>``) in solutions.
    """

    def __init__(self, calculator: bool = False, **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.calculator = calculator

    @property
    def hub(self) -> HubSource:
        """The dataset on the hub."""
        return HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"})

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have."""
        return ("question", "answer")

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """Take the final answer after ``####``, without its thousands separators."""
        solution = str(raw["answer"])
        if not self.calculator:
            solution = _CALCULATOR.sub("", solution)
        _, mark, final = solution.rpartition("####")
        return str(raw["question"]), solution, final.strip().replace(",", "") if mark else ""
