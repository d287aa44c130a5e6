"""Checks of the answers of each split: problems here would make the metrics meaningless."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from reprlib import repr as short

from lightning_prompts.answers import is_correct
from lightning_prompts.datamodules.sources import MISSING
from lightning_prompts.errors import UserError
from lightning_prompts.template import cut
from lightning_prompts.types import Example

log = logging.getLogger(__name__)

_STOPS = ("\n", "\n\n", "\n###", "\n<end>")


def check_answers(splits: Mapping[str, Sequence[Example]]) -> None:
    """Warn about answers that are all the same, look like missing values, are damaged, or cannot be generated.

    Args:
        splits: The examples of each split; ``predict`` is skipped.

    Raises:
        UserError: No generation can match most of the answers.
    """
    known = {
        split: [example for example in examples if example.reference is not None]
        for split, examples in splits.items()
        if split != "predict"
    }
    for split, examples in known.items():
        if len(examples) > 1 and len({example.reference for example in examples}) == 1:
            log.warning(
                "all %d %s rows have the same answer, %r (%s and others): metrics say little; are these placeholders?",
                *(len(examples), split, examples[0].reference, examples[0].source),
            )
    free = [example for examples in known.values() for example in examples if not example.labels]
    absent = [(text, example) for example in free for text in (example.question, example.target) if text in MISSING]
    if absent:
        text, first = absent[0]
        message = "%d of %d rows say %r, which is how programs write a missing value (%s); remove them if it is"
        log.warning(message, len(absent), len(free), text, first.source)
    damaged = [example for examples in splits.values() for example in examples if _damaged(example)]
    if damaged:
        log.warning(
            "%s: the text was damaged before, when it was read in another encoding than it was written in, as in %s "
            "(%d rows in all); write the file again from its source, in UTF-8",
            *(damaged[0].source, short(_damaged(damaged[0])), len(damaged)),
        )
    _check_stop(free)


def _damaged(example: Example) -> str:
    """Return a text of the row that holds the replacement character or UTF-8 that was read as cp1252, or ``""``."""
    for text in (example.question, example.target):
        with suppress(UnicodeError):
            if "\ufffd" in text or (not text.isascii() and text.encode("cp1252").decode()):
                return text
    return ""


def _check_stop(examples: Sequence[Example]) -> None:
    """Check that ``stop`` does not match within answers, and matches after them; see `check_answers`."""
    answers = [str(example.answer).strip() for example in examples]
    kept = [cut(answer, example.stop) for answer, example in zip(answers, examples, strict=True)]
    shortened = [
        (example, text)
        for example, answer, text in zip(examples, answers, kept, strict=True)
        if text != answer and not is_correct(example, text)
    ]
    if shortened:
        first, text = shortened[0]
        stop = next((stop for stop in _STOPS if not any(stop in answer for answer in answers)), _STOPS[-1])
        also = "" if first.end is None else ", and end data.template in that text"
        message = (
            f"{first.source}: exact match can never be 1 ({len(shortened)} of {len(examples)} rows): data.stop "
            f"'{_escaped(first.stop)}' ends the answer after '{_escaped(text[-30:])}'; set data.stop to "
            f"'{_escaped(stop)}' or another text that no answer holds{also}"
        )
        if 2 * len(shortened) > len(examples):
            raise UserError(message)
        log.warning("%s", message)
    elif running := [example for example in examples if _runs_on(example)]:
        end, stop = _escaped(running[0].end or ""), _escaped(running[0].stop)
        log.warning(
            "%s: data.template ends an answer in '%s', and data.stop '%s' does not match there: what is generated "
            "after an answer counts as part of it; end data.template in a text that data.stop matches",
            *(running[0].source, end, stop),
        )


def _runs_on(example: Example) -> bool:
    """Return whether the taught text after the answer does not end a generation."""
    answer = str(example.answer).strip()
    written = f"{answer}{example.end or ''}"
    return bool(example.end) and (not re.search(example.stop, written) or cut(written, example.stop) != answer)


def _escaped(text: str) -> str:
    """Escape newlines."""
    return text.replace("\n", "\\n")
