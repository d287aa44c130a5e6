"""Base classes of generated tasks: questions are drawn by the seed, all different, in exact numbers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule, check_sizes
from lightning_prompts.datamodules.big_bench_hard import BigBenchHard
from lightning_prompts.datamodules.labels import FORWARD, Choices, parse_options
from lightning_prompts.datamodules.sources import file_path
from lightning_prompts.datamodules.splits import Deck, Kind, deal
from lightning_prompts.errors import UserError

_TRIES = 10_000  # attempts to draw a question that was not drawn before


class GeneratedTask(TextDataModule, ABC):
    """Questions drawn by ``seed``, all different; ``train_size`` does not change the validation and test questions.

    A subclass implements `kinds` and `write`. A split has the same number of questions of each kind, as far as a kind
    has that many: ``test`` and ``val`` leave nine tenths of each kind to the splits that follow, unless they cannot be
    filled otherwise.

    Args:
        spaced: Write digits, letters and signs apart (``1 2 + 3 = 1 5``), since tokenizers merge digits and letters
            into one token.
        train_size: Number of training questions, all different.
        val_size: Number of validation questions.
        test_size: Number of questions in each test set.
    """

    def __init__(
        self,
        spaced: bool = False,
        train_size: int = 5000,
        val_size: int = 200,
        test_size: int = 200,
        template: str = "{prompt} {question} -> {answer}\n",
        **kwargs: Any,
    ) -> None:
        """Check the sizes."""
        super().__init__(template=template, **kwargs)
        check_sizes(test_size=test_size, val_size=val_size, train_size=train_size)
        self.spaced = spaced
        self.sizes: dict[Split, int] = {"test": test_size, "val": val_size, "train": train_size}

    @abstractmethod
    def kinds(self) -> Mapping[Split, Sequence[Kind]]:
        """Return the kinds of questions: of ``train`` (also for ``val`` and ``test``), and of each ``test/NAME``."""

    @abstractmethod
    def write(self, parts: Sequence[str]) -> SourceRow:
        """Return the row of a question, given its parts."""

    def apart(self, text: str) -> str:
        """Return a number or a word, with its characters apart if ``spaced``."""
        return " ".join(text) if self.spaced else text

    def sign(self, sign: str) -> str:
        """Return a sign, with a space on either side if ``spaced``."""
        return f" {sign} " if self.spaced else sign

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Draw the questions, test first, so that they do not depend on the number of training questions."""
        rows: dict[Split, list[SourceRow]] = {}
        for name, kinds in self.kinds().items():
            sizes = self.sizes if name == "train" else {name: self.sizes["test"]}
            decks = [Deck(kind) for kind in kinds]
            total = sum(deck.left for deck in decks)
            if sum(sizes.values()) > total:
                asked = " + ".join(f"data.{split.partition('/')[0]}_size {size}" for split, size in sizes.items())
                raise UserError(
                    f"{type(self).__name__} has only {total} different questions for {', '.join(sizes)}, not {asked}; "
                    "lower these or widen the range of questions"
                )
            for split, size in sizes.items():
                dealt = deal(decks, size, random.Random(f"{self.seed} {split}"), leave_most=split != "train")
                rows[split] = [self.write(parts) for parts in dealt]
        return rows


class GeneratedReasoning(TextDataModule, ABC):
    """Questions in the form of BIG-Bench Hard, drawn by ``seed``, all different.

    A subclass implements `task` and `draw`. Each split has the same number of questions with each answer, plus or minus
    one. ``train_size`` does not change the validation and test questions.

    Args:
        test: Local file of BIG-Bench Hard to test on instead; no other split has its questions.
        balanced: Training batches with the same number of examples of each class.
        train_size: Number of training questions.
        val_size: Number of validation questions.
        test_size: Number of test questions; with ``test``, the largest number.
        template: Text with ``{prompt}``, ``{question}`` or ``{stripped}`` (without its options), and ``{answer}``.
    """

    def __init__(
        self,
        test: str | None = None,
        balanced: bool = False,
        train_size: int = 375,
        val_size: int = 375,
        test_size: int = 250,
        template: str = FORWARD,
        batch_size: int = 20,
        **kwargs: Any,
    ) -> None:
        """Check the sizes."""
        super().__init__(template=template, batch_size=batch_size, **kwargs)
        check_sizes(test_size=test_size, val_size=val_size, train_size=train_size)
        self.sizes: dict[Split, int] = {"test": test_size, "val": val_size, "train": train_size}
        file_path("test", test)
        self.test = test
        self.balanced = balanced

    @property
    @abstractmethod
    def task(self) -> str:
        """The name of the task in BIG-Bench Hard."""

    @abstractmethod
    def draw(self, generator: random.Random, answer: int) -> Choices:
        """Draw a question with two options, of which ``options[answer]`` is right."""

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Draw the questions, test first, so that they do not depend on the number of training questions."""
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
        """Draw a question that is not in ``seen``, and add it."""
        for _ in range(_TRIES):
            choices = self.draw(generator, answer)
            key = _key(choices.question)
            if key not in seen:
                seen.add(key)
                return choices
        asked = ", ".join(f"data.{split}_size {size}" for split, size in self.sizes.items())
        raise UserError(f"{type(self).__name__} has fewer different questions than asked for ({asked}); lower these")

    def _row(self, choices: Choices, answer: int, source: str) -> SourceRow:
        fields = {
            "question": choices.question,
            "stripped": choices.text,
            "answer": choices.labels[answer][0],
        }
        return SourceRow(fields, source, labels=choices.labels)


def _key(question: str) -> Hashable:
    """Return the text and the options in any order, which are the same for questions that ask the same."""
    choices = parse_options(question)
    return choices.text, frozenset(choices.options)


def check_values(name: str, values: Sequence[int], least: int = 1) -> None:
    """Check that the values of a setting are large enough and all different.

    Args:
        name: The setting.
        values: Its values.
        least: The smallest allowed value.

    Raises:
        UserError: A value is smaller, or occurs twice.
    """
    for value in values:
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")
        if values.count(value) > 1:
            raise UserError(f"data.{name} names {value} more than once")


def check_range(names: tuple[str, str, str], low: int, high: int, outside: Sequence[int]) -> None:
    """Check that the training range is not empty, and that the out-of-distribution values lie outside of it.

    Args:
        names: The names of the three settings that follow.
        low: The smallest value of the training range.
        high: The largest value of the training range.
        outside: The values of the out-of-distribution test sets.

    Raises:
        UserError: The range is empty; a value is below 1, occurs twice or lies in the range.
    """
    for name, values in zip(names, ([low], [high], outside), strict=True):
        check_values(name, values)
    if low > high:
        raise UserError(f"data.{names[0]} {low} is above data.{names[1]} {high}; swap them")
    for value in outside:
        if low <= value <= high:
            raise UserError(
                f"data.{names[2]} {value} lies in the training range {low} to {high} "
                f"(data.{names[0]}, data.{names[1]}); give values outside of it"
            )
