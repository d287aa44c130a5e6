"""What generated tasks share: questions are drawn, never twice, and sizes are exact."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.errors import UserError

# Questions of one kind, all as likely: a choice for each of their parts (numbers of two digits: "123456789" and then
# "0123456789"), and every combination of choices is a question of its own.
Kind = Sequence[Sequence[object]]


class Deck:
    """The questions of one kind, shuffled; each is dealt once.

    Args:
        kind: The choices.

    >>> deck, generator = Deck([["1", "2"], "ab"]), random.Random(0)
    >>> sorted("".join(deck.deal(generator)) for _ in range(deck.left))
    ['1a', '1b', '2a', '2b']
    """

    def __init__(self, kind: Kind) -> None:
        """All questions are still there."""
        self.kind = kind
        self.left = math.prod(map(len, kind))
        self._moved: dict[int, int] = {}

    def deal(self, generator: random.Random) -> list[str]:
        """The parts of one more question."""
        # Fisher-Yates, which keeps only the places that it touched: there may be more questions than fit into memory.
        place = generator.randrange(self.left)
        self.left -= 1
        number = self._moved.get(place, place)
        self._moved[place] = self._moved.pop(self.left, self.left)
        parts = []
        for choices in self.kind:
            number, index = divmod(number, len(choices))
            parts.append(str(choices[index]))
        return parts


class GeneratedTask(TextDataModule, ABC):
    """Questions drawn by ``seed``, no two of them alike; ``train_size`` has no influence on what is tested.

    A subclass gives `kinds` and `write`.

    A split has as many questions of one kind as of any other, as far as there are that many: ``test`` and ``val`` leave
    nine tenths of each kind to those that follow, unless they cannot be filled otherwise.

    Args:
        template: Text with ``{prompt}``, ``{answer}`` and the task's fields.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        spaced: Write digits and letters apart, since tokenizers merge them.
        train_size: How many questions to train on.
        val_size: How many questions for validation.
        test_size: How many questions in each test set.
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
        spaced: bool,
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
        self.spaced = spaced
        self.sizes: dict[Split, int] = {"test": test_size, "val": val_size, "train": train_size}
        for split, size in self.sizes.items():
            check_values(f"{split}_size", [size])

    @abstractmethod
    def kinds(self) -> Mapping[Split, Sequence[Kind]]:
        """The kinds of questions: ``train``'s, which ``val`` and ``test`` share, and each further test set's own."""

    @abstractmethod
    def write(self, parts: Sequence[str]) -> SourceRow:
        """Put the parts of a question into fields."""

    def apart(self, text: str) -> str:
        """A number or a word; its characters stand apart where ``spaced``."""
        return " ".join(text) if self.spaced else text

    def sign(self, sign: str) -> str:
        """A sign, with a space on either side where ``spaced``."""
        return f" {sign} " if self.spaced else sign

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Draw test questions first, so that they stay the same however many there are to train on."""
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
                rows[split] = [self.write(parts) for parts in self._deal(decks, split, size)]
        return rows

    def _deal(self, decks: Sequence[Deck], split: Split, size: int) -> list[list[str]]:
        """One from each deck, again and again."""
        generator = random.Random(f"{self.seed} {split}")
        total = sum(deck.left for deck in decks)
        # Else the test set would take all there is of a small kind (sums of two one-digit numbers) from training.
        kept = [
            0 if split == "train" else min(deck.left * 9 // 10, deck.left * (total - size) // total) for deck in decks
        ]
        dealt: list[list[str]] = []
        while len(dealt) < size:
            dealing = [deck for deck, rest in zip(decks, kept, strict=True) if deck.left > rest]
            for deck in generator.sample(dealing, min(len(dealing), size - len(dealt))):
                dealt.append(deck.deal(generator))
        return dealt


def check_values(name: str, values: Sequence[int], least: int = 1) -> None:
    """Raise unless all values of a setting are large enough and differ from each other.

    Args:
        name: The setting.
        values: Its values.
        least: The smallest allowed.

    Raises:
        UserError: One is smaller, or stands twice.
    """
    for value in values:
        if value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")
        if values.count(value) > 1:
            raise UserError(f"data.{name} names {value} more than once")


def check_range(names: tuple[str, str, str], low: int, high: int, outside: Sequence[int]) -> None:
    """Raise unless there is a training range, and the further test sets lie outside of it.

    Args:
        names: The three settings.
        low: The smallest value of the training range.
        high: The largest.
        outside: The values of the further test sets.

    Raises:
        UserError: The range is empty, a value is below 1, stands twice or lies in the range.
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
