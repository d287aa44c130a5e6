"""The classes that answers of a user's own files are one of."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lightning_prompts.datamodules.base import SourceRow
from lightning_prompts.datamodules.tables import MISSING
from lightning_prompts.errors import UserError, nearest

MOST_FOUND = 200  # different answers that can be taken for classes without asking
MOST_SHOWN = 40  # characters of an answer


class Labels:
    """Names of classes in a file, and the ways to write each.

    Args:
        labels: The names; or for each name the ways to write it, the first of which is the answer.

    Raises:
        UserError: There are fewer than two, a name comes twice, or a class has no way to be written.

    >>> labels = Labels({"0": ["negative", "bad"], "1": ["positive", "good"]})
    >>> labels.find("1"), labels.find("bad"), labels.find("Good"), labels.find("fair")
    ('positive', 'negative', 'positive', None)
    """

    def __init__(self, labels: Sequence[Any] | Mapping[Any, Any]) -> None:
        """Check them; a config may hold anything."""
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
        for texts in (names, others):  # a name is a name before it is another class's other way
            folded: dict[str, set[str]] = {}
            for text, answer in texts:
                self._answers.setdefault(text, answer)
                folded.setdefault(text.casefold(), set()).add(answer)
            for text, answers in folded.items():  # of several, none is meant
                self._folded.setdefault(text, answers.pop() if len(answers) == 1 else None)

    @classmethod
    def found(cls, rows: Sequence[SourceRow]) -> Labels:
        """All different answers of rows as classes.

        Raises:
            UserError: There is none, one, or far too many to choose from; one says that the answer is missing.
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
        """The answer that a text in a file stands for: a class's name or one of its verbalisers, in any case."""
        text = text.strip()
        answer = self._answers.get(text)
        return self._folded.get(text.casefold()) if answer is None else answer

    def of(self, row: SourceRow, strict: bool = True) -> SourceRow:
        """A row with its classes, its answer as the class is written.

        Args:
            row: A row of a file.
            strict: Whether its answer must be a class; none is taken for another otherwise.

        Raises:
            UserError: Its answer is no class.
        """
        given = row.fields["answer"]
        answer = None if given is None else self.find(str(given))
        if strict and given is not None and answer is None:
            raise UserError(
                f"{row.source}: {_short(str(given))} is none of data.labels; {nearest(str(given), self.names)}"
            )
        return replace(row, fields={**row.fields, "answer": answer}, labels=self.verbalisers)


def _folded(name: str) -> str:
    """What two ways to write the same class share: 1 and 1.0, upper and lower case, spaces, what nobody sees."""
    with suppress(ValueError):
        return str(float(name))
    seen = (letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(seen).casefold().split())


def _several(texts: object) -> Sequence[object]:
    """The ways to write a class, of which a config may have one without a list."""
    return texts if isinstance(texts, list | tuple) else [texts]


def _text(value: object) -> str:
    """A name as it was meant: a config's 0 stands for ``0`` in a file."""
    if isinstance(value, bool):
        raise UserError(
            f"data.labels: {str(value).lower()} is no text, and YAML reads yes, no, on and off so; write it in quotes "
            "('yes')"
        )
    if not isinstance(value, str | int | float):
        raise UserError(f"data.labels: names and the ways to write them must be texts, got {type(value).__name__}")
    return str(value).strip()


def _short(text: str) -> str:
    """An answer as an error shows it."""
    return repr(text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…")
