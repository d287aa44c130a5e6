r"""Questions that list their answer options, as BIG-Bench Hard writes them.

Either with letters, ``...?\nOptions:\n(A) red\n(B) blue``, or with dashes, ``...?\nOptions:\n- Yes\n- No``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prompts.errors import UserError

_HEAD = re.compile(r"\n[ \t]*Options:[ \t]*\n", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Z])\)[ \t]*(.*)")
_DASH = re.compile(r"-[ \t]+(.*)")


@dataclass(frozen=True)
class Choices:
    """A question and its options.

    Attributes:
        text: The question without its options.
        options: The options in their order; empty where the question lists none.
        lettered: Whether they are called by letters, and not by what they say.
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
        """The options as classes: a letter in brackets, which may also be written without, or what the option says."""
        if not self.lettered:
            return tuple((option,) for option in self.options)
        return tuple((f"({letter})", letter) for letter in string.ascii_uppercase[: len(self.options)])

    def label(self, target: str) -> str | None:
        """How a target is written, which names an option or repeats it; ``None`` where it does neither."""
        for verbalisers in self.labels:
            if target in verbalisers:
                return verbalisers[0]
        said = [option.casefold() for option in self.options]
        wanted = target.strip().casefold()
        return self.labels[said.index(wanted)][0] if said.count(wanted) == 1 else None


def parse_options(question: str) -> Choices:
    r"""Take a question apart into what it asks and the options at its end, if it has any.

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


def strip_options(question: str) -> str:
    """A question without its answer options, as the first layer of a Deep Language Network reads it.

    Sordoni et al. 2023, "Joint Prompt Optimization of Stacked LLMs using Variational Inference".
    """
    return parse_options(question).text


def letter_choices(text: str, options: Sequence[str], where: str) -> Choices:
    """A question with lettered options.

    Raises:
        UserError: There are more options than letters.
    """
    if len(options) > len(string.ascii_uppercase):
        raise UserError(f"{where} has {len(options)} options, more than there are letters; drop the row")
    return Choices(text, tuple(options), lettered=True)
