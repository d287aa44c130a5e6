"""Answers with classes: names of classes, options of questions, and the base class of such datasets."""

from __future__ import annotations

import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule, check_sizes
from lightning_prompts.datamodules.sources import MISSING, HubSource, RawRow, file_path, read_rows
from lightning_prompts.datamodules.splits import asked, draw, draw_balanced, hold_out, remove_duplicates
from lightning_prompts.errors import UserError, nearest

MOST_FOUND = 200  # the most different answers that ``labels: auto`` takes for classes
MOST_SHOWN = 40  # characters of an answer in an error message
# The prompt, the input and the cue are paragraphs (Sordoni et al. 2023); the newline teaches where an answer ends.
FORWARD = "{prompt}\n\n{question}\n\nAnswer: {answer}\n"
# BIG-Bench Hard writes options with letters, "...?\nOptions:\n(A) red\n(B) blue", or with dashes, "...\n- Yes\n- No".
_HEAD = re.compile(r"\n[ \t]*Options:[ \t]*\n", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Z])\)[ \t]*(.*)")
_DASH = re.compile(r"-[ \t]+(.*)")


class Labels:
    """The names of classes in a file, and the ways to write each class.

    Args:
        labels: The names; or for each name the ways to write the class, of which the first is the answer.

    Raises:
        UserError: There are fewer than two classes, a name occurs twice, or a class has no way to write it.

    >>> labels = Labels({"0": ["negative", "bad"], "1": ["positive", "good"]})
    >>> labels.find("1"), labels.find("bad"), labels.find("Good"), labels.find("fair")
    ('positive', 'negative', 'positive', None)
    """

    def __init__(self, labels: Sequence[Any] | Mapping[Any, Any]) -> None:
        """Check the labels, which may be anything that a config can hold."""
        pairs = labels.items() if isinstance(labels, Mapping) else [(name, [name]) for name in labels]
        known = {_text(name): [_text(text) for text in _several(texts)] for name, texts in pairs}
        if len(known) < len(labels):
            given = [_text(name) for name in labels]
            raise UserError(f"data.labels: {next(name for name in given if given.count(name) > 1)!r} comes twice")
        if len(known) < 2:
            raise UserError(f"data.labels must name two classes or more, got {len(known)}")
        for name, verbalisers in known.items():
            if not verbalisers:
                raise UserError(f"data.labels: {name} has no verbaliser; give the ways to write it")
        self.verbalisers = tuple(tuple(verbalisers) for verbalisers in known.values())
        self.names = list(known)
        names = [(name, verbalisers[0]) for name, verbalisers in known.items()]
        others = [(text, verbalisers[0]) for verbalisers in self.verbalisers for text in verbalisers]
        self._answers: dict[str, str] = {}
        self._folded: dict[str, str | None] = {}
        for texts in (names, others):  # a name takes precedence over another class's way to write it
            folded: dict[str, set[str]] = {}
            for text, answer in texts:
                self._answers.setdefault(text, answer)
                folded.setdefault(text.casefold(), set()).add(answer)
            for text, answers in folded.items():  # ambiguous if there are several
                self._folded.setdefault(text, answers.pop() if len(answers) == 1 else None)

    @classmethod
    def found(cls, rows: Sequence[SourceRow]) -> Labels:
        """Take all different answers of some rows as the classes.

        Raises:
            UserError: There are fewer than two or more than `MOST_FOUND` answers, two are written almost alike, or one
                stands for a missing value.
        """
        sources = {str(row.fields["answer"]).strip(): row.source for row in reversed(rows)}
        names = sorted(sources)
        for name in names:
            if name in MISSING:
                raise UserError(
                    f"{sources[name]}: {name!r} is how programs write a missing answer; remove such rows, or name the "
                    "classes in data.labels if it is one"
                )
        if len(names) > MOST_FOUND:
            raise UserError(
                f"data.labels: auto found {len(names)} different answers, {_short(names[0])} and {_short(names[1])} "
                f"among them, and takes {MOST_FOUND} at most; name the classes, or leave data.labels out for "
                "answers in free text"
            )
        folded: dict[str, str] = {}
        for name in names:
            if (other := folded.setdefault(_folded(name), name)) != name:
                raise UserError(f"data.labels: auto found {_short(other)} and {_short(name)}; name the classes")
        if len(names) < 2:
            told = f"only the answer {_short(names[0])}" if names else "no answers"
            raise UserError(f"data.labels: auto found {told}; name the classes")
        return cls(names)

    def find(self, text: str) -> str | None:
        """Return the answer of the class that a text names, in upper or lower case; ``None`` if there is none."""
        text = text.strip()
        answer = self._answers.get(text)
        return self._folded.get(text.casefold()) if answer is None else answer

    def of(self, row: SourceRow, strict: bool = True) -> SourceRow:
        """Return a row with its classes, and with its answer as the class is written.

        Args:
            row: A row of a file.
            strict: Raise if the answer is not a class; otherwise the row then has no answer.

        Raises:
            UserError: The answer is not a class.
        """
        given = row.fields["answer"]
        answer = None if given is None else self.find(str(given))
        if strict and given is not None and answer is None:
            raise UserError(
                f"{row.source}: {_short(str(given))} is none of data.labels; {nearest(str(given), self.names)}"
            )
        return replace(row, fields={**row.fields, "answer": answer}, labels=self.verbalisers)


def _folded(name: str) -> str:
    """Return the same text for 1 and 1.0, for upper and lower case, and for other spaces or invisible characters."""
    with suppress(ValueError):
        return str(float(name))
    seen = (letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(seen).casefold().split())


def _several(texts: object) -> Sequence[object]:
    """Return the ways to write a class as a list; a config may give a single one without a list."""
    return texts if isinstance(texts, list | tuple) else [texts]


def _text(value: object) -> str:
    """Return a name as text: 0 in a config stands for ``0`` in a file."""
    if isinstance(value, bool):
        raise UserError(
            f"data.labels: {str(value).lower()} is no text, and YAML reads yes, no, on and off so; write it in quotes "
            "('yes')"
        )
    if not isinstance(value, str | int | float):
        raise UserError(f"data.labels: names and the ways to write them must be texts, got {type(value).__name__}")
    return str(value).strip()


def _short(text: str) -> str:
    """Return an answer as error messages show it."""
    return repr(text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…")


@dataclass(frozen=True)
class Choices:
    """A question and its options.

    Attributes:
        text: The question without its options.
        options: The options in their order; empty if the question lists none.
        lettered: Whether an answer is the letter of an option, not its text.
    """

    text: str
    options: tuple[str, ...] = ()
    lettered: bool = False

    @property
    def question(self) -> str:
        """The question with its options."""
        if not self.options:
            return self.text
        marks = [f"({letter})" for letter in string.ascii_uppercase] if self.lettered else ["-"] * len(self.options)
        return "\n".join([self.text, "Options:", *map("{} {}".format, marks, self.options)])

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """The options as classes: ``(A)``, also written ``A``, or the text of the option."""
        if not self.lettered:
            return tuple((option,) for option in self.options)
        return tuple((f"({letter})", letter) for letter in string.ascii_uppercase[: len(self.options)])

    def label(self, target: str) -> str | None:
        """Return the answer for a target that is an option's letter or text; ``None`` if it is neither."""
        for verbalisers in self.labels:
            if target in verbalisers:
                return verbalisers[0]
        said = [option.casefold() for option in self.options]
        wanted = target.strip().casefold()
        return self.labels[said.index(wanted)][0] if said.count(wanted) == 1 else None


def parse_options(question: str) -> Choices:
    r"""Split a question into its text and the options at its end, if there are any.

    >>> parse_options("What colour?\nOptions:\n(A) red\n(B) blue").options
    ('red', 'blue')
    """
    heads = list(_HEAD.finditer(question))
    if heads:
        lines = [line.strip() for line in question[heads[-1].end() :].strip().split("\n")]
        for pattern, lettered in ((_LETTER, True), (_DASH, False)):
            found = [match for line in lines if (match := pattern.fullmatch(line))]
            letters = string.ascii_uppercase[: len(found)]
            if len(found) == len(lines) and (not lettered or "".join(match[1] for match in found) == letters):
                options = tuple(match[match.re.groups].strip() for match in found)
                return Choices(question[: heads[-1].start()].rstrip(), options, lettered)
    return Choices(question.strip())


def letter_choices(text: str, options: Sequence[str], where: str) -> Choices:
    """Return a question with lettered options.

    Args:
        text: The question.
        options: Its options.
        where: The row, for the error message.

    Raises:
        UserError: There are more options than letters.
    """
    if len(options) > len(string.ascii_uppercase):
        raise UserError(f"{where} has {len(options)} options, more than there are letters; drop the row")
    return Choices(text, tuple(options), lettered=True)


class LabelledTask(TextDataModule, ABC):
    """Rows with classes from files or the hub; splits without rows are held out of the training rows by ``seed``.

    A subclass implements `hub` and `parse`. Questions of the test rows are in no other split, questions of the
    validation rows are not in training, and training has no question twice.

    Args:
        train: Local training file; rows for splits without a file are held out of it.
        val: Local validation file.
        test: Local test file.
        balanced: Training batches with the same number of examples of each class.
        val_size: The largest number of validation rows.
        test_size: The largest number of test rows. ``None`` for all rows of the test split, or for ``val_size`` rows
            if there is none.
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the rows; ``{stripped}``
            is the question without its options.
    """

    balanced_val: bool = False  # whether the validation rows have the same number of rows of each class

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        balanced: bool = False,
        val_size: int = 75,
        test_size: int | None = None,
        template: str = FORWARD,
        batch_size: int = 20,
        **kwargs: Any,
    ) -> None:
        """Check the sizes."""
        super().__init__(template=template, batch_size=batch_size, **kwargs)
        check_sizes(val_size=val_size, test_size=test_size)
        given = {split: file_path(split, file) for split, file in (("train", train), ("val", val), ("test", test))}
        self.files: dict[Split, Path] = {split: file for split, file in given.items() if file is not None}
        self.balanced = balanced
        self.val_size = val_size
        self.test_size = test_size

    @property
    @abstractmethod
    def hub(self) -> HubSource:
        """Where the rows come from if there are no local files."""

    @abstractmethod
    def parse(self, tables: Mapping[Split, list[RawRow]]) -> dict[Split, list[SourceRow]]:
        """Turn the rows of each split into questions and answers."""

    def key(self, row: SourceRow) -> Hashable:
        """Return the same value for rows that ask the same."""
        return asked(row)

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read the rows, remove duplicates, hold out missing splits, and draw the validation and test rows."""
        splits = remove_duplicates(
            self.parse({split: self._read(split) for split in self.files or self.hub.splits}), self.key
        )
        sizes: dict[Split, int | None] = {"val": self.val_size, "test": self.test_size}
        if self.balanced_val and (source := "val" if "val" in splits else "train") in splits:
            held = source == "train"
            splits["val"], rest = draw_balanced(splits[source], _answer, self.val_size, self.seed, "val", leave=held)
            if held:
                splits["train"] = rest
        if "train" in splits:
            missing = {split: size or self.val_size for split, size in sizes.items() if split not in splits}
            splits |= hold_out(splits["train"], missing, self.seed)
        return splits | {
            split: draw(splits[split], size, self.seed, split) for split, size in sizes.items() if split in splits
        }

    def _read(self, split: Split) -> list[RawRow]:
        return read_rows(self.files[split]) if split in self.files else self.hub.rows(split)


def _answer(row: SourceRow) -> str:
    return str(row.fields["answer"])
