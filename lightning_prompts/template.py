"""Templates render the fields of a row as text before the prompt slot, text after it, and an answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.types import Example

PROMPT, ANSWER = "prompt", "answer"


@dataclass(frozen=True)
class Template:
    r"""A template that renders the fields of a row as text.

    ``"Here are two{prompt} {question} and {answer}"`` defines the text before the prompt slot, the text after it, and
    the answer. White space before ``{answer}`` is part of the answer, because tokenizers encode ``" cold"`` as one
    token. Text after ``{answer}`` is the end of the answer. Training includes it, so that generations stop; the
    reported NLL and exact match do not. In a chat without such text, the end of the model's turn takes its place.

    Attributes:
        text: The template; ``{{`` and ``}}`` are literal braces.
        stop: Regular expression that ends a generation, searched after the leading white space.
        chat: Whether to render the text before ``{answer}`` as a user turn of the tokenizer's chat template.
        system: The system turn of a chat; ``None`` for the default of the chat template.

    Raises:
        UserError: A slot is missing, repeated or in the wrong order, or ``stop`` is not a regular expression.

    >>> Template("Here are two{prompt} {question} and {answer}").fields
    ['question']
    """

    text: str
    stop: str = r"\n"
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Check the slots and the stop pattern."""
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(f"template {self.text!r}: {error}; write {{{{ and }}}} for plain braces") from error
        names = [name for _, name, _, _ in parts if name is not None]
        for slot in (PROMPT, ANSWER):
            if names.count(slot) != 1:
                count = "no" if slot not in names else "more than one"
                raise UserError(
                    f"template {self.text!r} has {count} {{{slot}}}; write it once, "
                    "for example 'Question: {question}\\nAnswer:{prompt} {answer}'"
                )
        if names[-1] != ANSWER:
            raise UserError(f"template {self.text!r}: {{answer}} must be the last field")
        for _, name, spec, conversion in parts:
            if spec or conversion or (name is not None and not name.isidentifier()):
                raise UserError(f"template {self.text!r}: {{{name}}} must be a plain field name, without formatting")
        try:
            re.compile(self.stop)
        except re.error as error:
            raise UserError(f"stop {self.stop!r} is not a regular expression: {error}") from error

    @property
    def fields(self) -> list[str]:
        """The names of the fields that a row must have, without ``prompt`` and ``answer``."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None]
        return list(dict.fromkeys(name for name in names if name not in (PROMPT, ANSWER)))

    def render(
        self,
        fields: Mapping[str, object],
        source: str = "",
        reference: str | None = None,
        extract: str | None = None,
        numeric: bool = False,
        labels: Sequence[Sequence[str]] = (),
    ) -> Example:
        """Render the fields of a row.

        Args:
            fields: The row; ``answer`` may be missing or ``None`` for generation only.
            source: Source of the row in error messages.
            reference: Reference for generations, if it is not the whole answer.
            extract: Regular expression that finds the reference in a generation; see `Example`.
            numeric: Whether to compare numbers instead of text; see `Example`.
            labels: Verbalisers of each class of the answer; see `Example`.

        Returns:
            The example. Braces in the values of fields have no meaning.

        Raises:
            UserError: A field of the template is missing or not text, the reference is not a class, or two classes have
                a common verbaliser.

        >>> example = Template("{prompt} {question} -> {answer}").render({"question": "hot", "answer": "cold"})
        >>> example.before, example.after, example.answer
        ('', ' hot ->', ' cold')
        """
        pieces: dict[str, list[str]] = {"before": [], "after": [], "answer": []}
        part = "before"
        for literal, name, _, _ in string.Formatter().parse(self.text):
            pieces[part].append(literal)
            if name == PROMPT:
                part = "after"
            elif name == ANSWER:
                part = "answer"
            elif name is not None:
                if name not in fields:
                    where = f"{source}: " if source else ""
                    raise UserError(f"{where}template field {{{name}}} is unknown; {nearest(name, map(str, fields))}")
                pieces[part].append(as_text(fields[name], name, source))
        before, after, tail = ("".join(pieces[key]) for key in ("before", "after", "answer"))
        text = after.rstrip()
        space = after[len(text) :]
        own = "" if self.chat else space  # part of the answer, unless that starts a turn
        answer = fields.get(ANSWER)
        written = None if answer is None else str(answer).strip()
        reference = written if reference is None else reference
        return Example(
            before=before,
            after=text,
            answer=None if written is None else f"{own}{written}",
            end=None if self.chat and not tail else tail,
            reference=reference,
            fields=fields,
            source=source,
            stop=self.stop,
            chat=self.chat,
            system=self.system,
            extract=extract,
            numeric=numeric,
            labels=_classes(labels, reference, source),
            space=space if self.chat else "",
        )


def _classes(labels: Sequence[Sequence[str]], reference: str | None, source: str) -> tuple[tuple[str, ...], ...]:
    """Check the classes of an example; see `Template.render`."""
    if not labels:
        return ()
    where = f"{source}: " if source else ""
    classes = tuple(tuple(verbalisers) for verbalisers in labels)
    owners: dict[str, int] = {}
    for index, verbalisers in enumerate(classes):
        if not verbalisers or not all(text.strip() for text in verbalisers):
            kind = "an empty" if verbalisers else "no"
            raise UserError(f"{where}label {index} has {kind} verbaliser; give the texts that stand for it")
        for text in verbalisers:
            if owners.setdefault(text, index) != index:
                raise UserError(
                    f"{where}labels {classes[owners[text]][0]!r} and {verbalisers[0]!r} share the verbaliser {text!r}; "
                    "a verbaliser must belong to only one label"
                )
    names = [verbalisers[0] for verbalisers in classes]
    if reference is not None and reference not in names:
        raise UserError(f"{where}label {reference!r} is unknown; known labels: {', '.join(names)}")
    return classes


def missing(value: object) -> bool:
    """Whether a field has no value: ``None``, or NaN as in data frames."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: object, name: str, source: str = "") -> str:
    """Convert the value of a field to text.

    Args:
        value: A text, number, date or time; the text may be empty.
        name: Name of the field in error messages.
        source: Source of the row in error messages.

    Raises:
        UserError: The value is missing or cannot be written as text.
    """
    wrong, text = "", str(value)
    if missing(value):
        wrong = "missing"
    elif not isinstance(value, str | int | float | Decimal | date | time | timedelta):
        wrong = f"a {type(value).__name__}, not text"
    elif isinstance(value, float) and text.lstrip("-") == "inf":
        wrong = "infinite, which is not a number to write"
    elif not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        wrong = "not valid Unicode: it contains half of a character (a lone surrogate)"
    if wrong:
        raise UserError(f"{source}{': ' if source else ''}field {name!r} is {wrong}")
    return text


def cut(text: str, stop: str) -> str:
    """Return the part of a generation that counts as its answer.

    Args:
        text: The generated text.
        stop: Regular expression; the text ends at its first match after the leading white space.

    Returns:
        The text up to the stop, stripped.

    >>> cut(" cold. And then", stop=r"[.]")
    'cold'
    """
    text = text.lstrip()
    match = re.search(stop, text)
    return (text[: match.start()] if match else text).strip()


def final_result(text: str, extract: str | None) -> str:
    """Return the part of a generation to compare with the reference: the first group of the last match, or all of it.

    Args:
        text: A generation after `cut`.
        extract: Regular expression; see `Example`. Without a match, the result is empty.

    >>> final_result("25;07=75", extract="=(.*)")
    '75'
    """
    if extract is None:
        return text
    found = [match.group(1) for match in re.finditer(extract, text)]
    return found[-1].strip() if found else ""
