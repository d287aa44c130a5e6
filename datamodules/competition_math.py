"""Competition problems (Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH Dataset")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_prompts.answers import boxed
from lightning_prompts.datamodules.hub import HubSource
from lightning_prompts.datamodules.problems import WorkedProblems


class Math(WorkedProblems):
    r"""MATH: a problem, a solution with ``\boxed{}``, a level and a subject.

    From the hub (``nlile/hendrycks-MATH-benchmark``), or from local files with the fields ``problem`` and ``solution``.

    Args:
        train: Local training file instead of the hub's.
        test: Local test file.
        template: Text with ``{prompt}``, ``{question}`` and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        answer: Score the ``final`` answer, or the whole ``solution``.
        subjects: Keep these subjects alone (``Algebra``, ...); rows name theirs as ``type`` or ``subject``.
        max_level: Keep problems up to this level (1 to 5).
        max_characters: Drop problems whose question and answer have more characters together.
        val_size: Training rows held out for validation.
        test_size: Test rows, the first so many; ``None`` for all.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
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
        subjects: list[str] | None = None,
        max_level: int = 5,
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
        self.subjects = None if subjects is None else {subject.casefold() for subject in subjects}
        self.max_level = max_level

    @property
    def source(self) -> HubSource:
        """See `WorkedProblems`."""
        return HubSource("nlile/hendrycks-MATH-benchmark", None, {"train": "train", "test": "test"})

    @property
    def required(self) -> tuple[str, ...]:
        """See `WorkedProblems`."""
        return ("problem", "solution")

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """By subject and level; a row that names none is kept."""
        subject, level = raw.get("type", raw.get("subject")), str(raw.get("level", ""))
        if self.subjects is not None and subject is not None and str(subject).casefold() not in self.subjects:
            return False
        digits = level.removeprefix("Level").strip()
        return not digits.isdigit() or int(digits) <= self.max_level

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """The final answer stands in the last box."""
        solution = str(raw["solution"])
        return str(raw["problem"]), solution, boxed(solution) or ""
