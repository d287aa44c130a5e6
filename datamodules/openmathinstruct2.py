"""14 million synthetic problems (Toshniwal et al. 2024, "OpenMathInstruct-2")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prompts.datamodules.problems import WorkedProblems
from lightning_prompts.datamodules.sources import HubSource


class OpenMathInstruct2(WorkedProblems):
    r"""OpenMathInstruct-2: a problem, a generated solution, the expected answer, and the source of the problem.

    From the hub (``nvidia/OpenMathInstruct-2``), as a stream: set ``max_train_examples``, which then keeps the first
    rows that pass the filters; otherwise all rows of ``hub_split`` are read. Or from local files with its fields
    ``problem``, ``generated_solution``, ``expected_answer`` and ``problem_source``. There is no test split: without a
    ``test`` file, ``test_size`` rows (``val_size`` if it is ``None``) are held out of the training rows.

    Args:
        problem_sources: Keep only these sources: ``gsm8k``, ``math``, ``augmented_gsm8k``, ``augmented_math``.
        hub_split: The split on the hub; ``train_1M`` and others are fair samples of ``train``.
    """

    streamed = True

    def __init__(self, problem_sources: list[str] | None = None, hub_split: str = "train_1M", **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.problem_sources = problem_sources
        self.hub_split = hub_split

    @property
    def hub(self) -> HubSource:
        """The dataset on the hub."""
        return HubSource("nvidia/OpenMathInstruct-2", None, {"train": self.hub_split})

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have."""
        return ("problem", "generated_solution", "expected_answer")

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """Select by source."""
        return self.problem_sources is None or raw.get("problem_source") in self.problem_sources

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """Take all three from their fields."""
        return str(raw["problem"]), str(raw["generated_solution"]), str(raw["expected_answer"])
