"""14 million synthetic problems (Toshniwal et al. 2024, "OpenMathInstruct-2")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_prompts.datamodules.hub import HubSource
from lightning_prompts.datamodules.problems import WorkedProblems


class OpenMathInstruct2(WorkedProblems):
    r"""OpenMathInstruct-2: a problem, a generated solution, the expected answer, and where the problem comes from.

    From the hub (``nvidia/OpenMathInstruct-2``), streamed: set ``max_train_examples``, or all 14 million are read. Or
    from local files with its fields ``problem``, ``generated_solution``, ``expected_answer`` and ``problem_source``.
    There is no test split; test rows are held out of the training rows unless ``test`` gives others.

    Args:
        train: Local training file instead of the hub's.
        test: Local test file.
        template: Text with ``{prompt}``, ``{question}`` and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        answer: Score the ``final`` (expected) answer, or the whole ``solution``.
        problem_sources: Keep these sources alone: ``gsm8k``, ``math``, ``augmented_gsm8k``, ``augmented_math``.
        hub_split: The hub's split; ``train_1M`` and others are fair samples of ``train``.
        max_characters: Drop problems whose question and answer have more characters together.
        val_size: Training rows held out for validation.
        test_size: Rows held out for testing, or the first so many of ``test``; ``None`` for as many as ``val_size``.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples; from the hub the first that pass the filters.
        seed: Seed of what is held out and of ``max_train_examples``.
    """

    def __init__(
        self,
        train: str | None = None,
        test: str | None = None,
        template: str = "{prompt}: {question}\nAnswer: {answer}\n\n",
        stop: str = r"\n\n",
        chat: bool = False,
        system: str | None = None,
        answer: Literal["final", "solution"] = "final",
        problem_sources: list[str] | None = None,
        hub_split: str = "train_1M",
        max_characters: int | None = None,
        val_size: int = 200,
        test_size: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        super().__init__(template, stop, chat, system, train, test, answer, max_characters, val_size, test_size,
                         batch_size, eval_batch_size, max_train_examples, seed)  # fmt: skip
        self.problem_sources = problem_sources
        self.hub_split = hub_split

    @property
    def source(self) -> HubSource:
        """See `WorkedProblems`."""
        return HubSource("nvidia/OpenMathInstruct-2", None, {"train": self.hub_split})

    @property
    def required(self) -> tuple[str, ...]:
        """See `WorkedProblems`."""
        return ("problem", "generated_solution", "expected_answer")

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """By source."""
        return self.problem_sources is None or raw.get("problem_source") in self.problem_sources

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """The fields say it all."""
        return str(raw["problem"]), str(raw["generated_solution"]), str(raw["expected_answer"])
