"""What generated reasoning tasks share: questions in the form of BIG-Bench Hard, answers in equal numbers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Hashable

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.big_bench_hard import BigBenchHard
from lightning_prompts.datamodules.options import Choices, parse_options
from lightning_prompts.errors import UserError

_TRIES = 10_000  # for a question that has not been drawn before


class GeneratedReasoning(TextDataModule, ABC):
    """Questions drawn by ``seed``, no two of them alike; ``train_size`` has no influence on what is tested.

    A subclass gives `task` and `draw`. Each split has as many questions with one answer as with the other, give or take
    one.

    Args:
        template: Text with ``{prompt}``, ``{question}`` or ``{stripped}``, and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        test: Local file of BIG-Bench Hard to test on instead; its questions are in no other split.
        balanced: Training batches with as many examples of each class as of any other.
        train_size: How many questions to train on.
        val_size: How many questions for validation.
        test_size: How many questions to test on, with ``test`` at most.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the questions.
    """

    def __init__(
        self,
        template: str,
        stop: str,
        chat: bool,
        system: str | None,
        test: str | None,
        balanced: bool,
        train_size: int,
        val_size: int,
        test_size: int,
        batch_size: int,
        eval_batch_size: int,
        max_train_examples: int | None,
        seed: int,
    ) -> None:
        """Check the sizes."""
        super().__init__(template, stop, chat, system, batch_size, eval_batch_size, max_train_examples, seed)
        self.sizes: dict[Split, int] = {"test": test_size, "val": val_size, "train": train_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise UserError(f"data.{split}_size must be at least 1, got {size}")
        self.test = test
        self.balanced = balanced

    @property
    @abstractmethod
    def task(self) -> str:
        """What BIG-Bench Hard calls it."""

    @abstractmethod
    def draw(self, generator: random.Random, answer: int) -> Choices:
        """A question whose ``answer``-th option is right; there are two."""

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Draw test questions first, so that they stay the same however many there are to train on."""
        rows: dict[Split, list[SourceRow]] = {}
        if self.test is not None:
            real = BigBenchHard(self.task, test=self.test, test_size=self.sizes["test"], seed=self.seed)
            rows["test"] = real.load_rows()["test"]
        seen = {_key(str(row.fields["question"])) for row in rows.get("test", [])}
        for split, size in self.sizes.items():
            if split not in rows:
                generator = random.Random(f"{self.seed} {split}")
                answers = [number % 2 for number in range(size)]
                generator.shuffle(answers)
                rows[split] = [
                    self._row(self._new(generator, answer, seen), answer, f"{type(self).__name__} {split} row {number}")
                    for number, answer in enumerate(answers, start=1)
                ]
        return rows

    def _new(self, generator: random.Random, answer: int, seen: set[Hashable]) -> Choices:
        for _ in range(_TRIES):
            choices = self.draw(generator, answer)
            key = _key(choices.question)
            if key not in seen:
                seen.add(key)
                return choices
        asked = ", ".join(f"data.{split}_size {size}" for split, size in self.sizes.items())
        raise UserError(f"{type(self).__name__} has not so many different questions ({asked}); lower these")

    def _row(self, choices: Choices, answer: int, source: str) -> SourceRow:
        fields = {
            "question": choices.question,
            "stripped": choices.text,
            "answer": choices.labels[answer][0],
        }
        return SourceRow(fields, source, labels=choices.labels)


def _key(question: str) -> Hashable:
    """What two questions share that ask the same: the text, and the options in any order."""
    choices = parse_options(question)
    return choices.text, frozenset(choices.options)
