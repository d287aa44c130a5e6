"""What the answers of a split must be for its metrics to mean something."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from datamodules.tables import MISSING
from lightning_prompts.answers import is_correct
from lightning_prompts.errors import UserError
from lightning_prompts.template import cut
from lightning_prompts.types import Example

log = logging.getLogger(__name__)

_STOPS = ("\n", "\n\n", "\n###", "\n<end>")


def check_answers(splits: Mapping[str, Sequence[Example]]) -> None:
    """Warn of answers that are all the same, that are words for a missing value, or that no generation can match.

    Args:
        splits: The examples of each split; those to predict are left out.

    Raises:
        UserError: No generation can match most of the answers.
    """
    answered: list[Example] = []
    for split, examples in splits.items():
        known = [example for example in examples if example.reference is not None and split != "predict"]
        answered += known
        if len(known) > 1 and len({example.reference for example in known}) == 1:
            log.warning("all %d %s rows have the same answer, %r (%s and others): metrics say little; are these "
                        "placeholders?", len(known), split, known[0].reference, known[0].source)  # fmt: skip
    free = [example for example in answered if not example.labels]
    absent = [example for example in free if MISSING & {example.question.strip(), example.reference}]
    if absent:
        log.warning("%d of %d rows say %s, which is how programs write a missing value (%s); remove them if it is",
                    len(absent), len(answered), _missing(absent[0]), absent[0].source)  # fmt: skip
    never = [example for example in free if not _can_match(example)]
    if never:
        first, also = never[0], "" if never[0].end is None else ", and end data.template in that text"
        other = next((mark for mark in _STOPS if not any(mark in str(one.answer).strip() for one in free)), _STOPS[-1])
        message = (
            f"{first.source}: exact match can never be 1 ({len(never)} of {len(answered)} rows): data.stop "
            f"'{_shown(first.stop)}' {_why(first)}; set data.stop to '{_shown(other)}' or another text that no answer "
            f"holds{also}"
        )
        if 2 * len(never) > len(answered):
            raise UserError(message)
        log.warning("%s", message)


def _missing(example: Example) -> str:
    question = example.question.strip()
    return repr(question if question in MISSING else example.reference)


def _can_match(example: Example) -> bool:
    """Whether the answer itself, written and ended as training teaches it, is taken for right."""
    kept = cut(f"{example.answer}{example.end or ''}", example.stop)
    return kept == str(example.answer).strip() or bool(is_correct(example, kept))


def _shown(text: str) -> str:
    """A text in one line."""
    return text.replace("\n", "\\n")


def _why(example: Example) -> str:
    """What the stop does to such an answer."""
    answer = str(example.answer).strip()
    if (kept := cut(answer, example.stop)) != answer:
        return f"ends the answer after '{_shown(kept[-30:])}'"
    return f"does not match what follows an answer, '{_shown(example.end or '')}'"
