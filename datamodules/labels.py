"""The classes that answers of a user's own files are one of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datamodules.base import SourceRow
from lightning_prompts.errors import UserError, nearest

MOST_FOUND = 200  # different answers that can be taken for classes without asking


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
            names = [_text(name) for name in labels]
            raise UserError(f"data.labels: {next(name for name in names if names.count(name) > 1)!r} comes twice")
        if len(known) < 2:
            raise UserError(f"data.labels must name two classes or more, got {len(known)}")
        for name, verbalisers in known.items():
            if not verbalisers:
                raise UserError(f"data.labels: {name} has no verbaliser; give the ways to write it")
        self.verbalisers = tuple(tuple(verbalisers) for verbalisers in known.values())
        texts = [(name, verbalisers[0]) for name, verbalisers in known.items()]
        texts += [(text, verbalisers[0]) for verbalisers in self.verbalisers for text in verbalisers]
        self._answers: dict[str, str] = {}  # names come before other ways to write a class
        folded: dict[str, set[str]] = {}
        for text, answer in texts:
            self._answers.setdefault(text, answer)
            folded.setdefault(text.casefold(), set()).add(answer)
        self._folded = {text: answers.pop() for text, answers in folded.items() if len(answers) == 1}

    @classmethod
    def found(cls, answers: Sequence[str]) -> Labels:
        """All different answers as classes.

        Raises:
            UserError: There is none, one, or far too many to choose from.
        """
        names = sorted(set(answers))
        if len(names) > MOST_FOUND:
            raise UserError(
                f"data.labels: auto found {len(names)} different answers, {names[0]!r} and {names[1]!r} among them; "
                "name the classes, or leave data.labels out for answers in free text"
            )
        if len(names) < 2:
            told = f"only the answer {names[0]!r}" if names else "no answers"
            raise UserError(f"data.labels: auto found {told}; name the classes")
        return cls(names)

    def find(self, text: str) -> str | None:
        """The answer that a text in a file stands for: a class's name or one of its verbalisers, in any case."""
        text = text.strip()
        return self._answers.get(text, self._folded.get(text.casefold()))

    def of(self, row: SourceRow) -> SourceRow:
        """A row with its classes, its answer as the class is written.

        Raises:
            UserError: Its answer is no class.
        """
        given = row.fields["answer"]
        answer = None if given is None else self.find(str(given))
        if given is not None and answer is None:
            names = [verbalisers[0] for verbalisers in self.verbalisers]
            raise UserError(f"{row.source}: {given!r} is none of data.labels; {nearest(str(given), names)}")
        return replace(row, fields={**row.fields, "answer": answer}, labels=self.verbalisers)


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
        raise UserError(f"data.labels: a name must be a text, got {type(value).__name__}")
    return str(value)
