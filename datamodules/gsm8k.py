"""Grade-school word problems (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lightning_prompts.datamodules.hub import HubSource
from lightning_prompts.datamodules.problems import WorkedProblems

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class GSM8K(WorkedProblems):
    r"""GSM8K: a question, steps, and ``#### N``.

    From the hub (``openai/gsm8k``), or from local files with its fields ``question`` and ``answer``.

    Args:
        train: Local training file instead of the hub's.
        test: Local test file.
        template: Text with ``{prompt}``, ``{question}`` and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        answer: Score the ``final`` answer, or the whole ``solution``.
        calculator: Keep the calculator's annotations (``<<48/2=24>>``) in solutions.
        max_characters: Drop problems whose question and answer have more characters together.
        val_size: Training rows held out for validation.
        test_size: Test rows, the first so many; ``None`` for all 1,319.
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
        calculator: bool = False,
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
        self.calculator = calculator

    @property
    def source(self) -> HubSource:
        """See `WorkedProblems`."""
        return HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"})

    @property
    def required(self) -> tuple[str, ...]:
        """See `WorkedProblems`."""
        return ("question", "answer")

    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """The final answer stands behind ``####``, with thousands separators."""
        solution = str(raw["answer"])
        if not self.calculator:
            solution = _CALCULATOR.sub("", solution)
        _, mark, final = solution.rpartition("####")
        return str(raw["question"]), solution, final.strip().replace(",", "") if mark else ""
