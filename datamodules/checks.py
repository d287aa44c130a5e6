"""What the answers of a split must be for its metrics to mean something."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from datamodules.tables import MISSING
from lightning_prompts.answers import is_correct
from lightning_prompts.errors import UserError
from lightning_prompts.template import cut
from lightning_prompts.types import Example

log = logging.getLogger(__name__)


def check_answers(examples: Sequence[Example], split: str) -> None:
    """Warn of answers that are missing in words, that are all the same, or that no generation can match.

    Args:
        examples: The examples of a split.
        split: Its name.

    Raises:
        UserError: No generation can match any of the answers.
    """
    answered = [example for example in examples if example.reference is not None]
    free = [example for example in answered if not example.labels]
    absent = [example for example in free if MISSING & {example.question.strip(), example.reference}]
    if absent:
        log.warning("%d of %d %s rows say %s, which is how programs write a missing value (%s); remove them if it is",
                    len(absent), len(answered), split, _missing(absent[0]), absent[0].source)  # fmt: skip
    if len(answered) > 1 and len({example.reference for example in answered}) == 1:
        log.warning("all %d %s rows have the same answer, %r (%s and others): metrics say little; are these "
                    "placeholders?", len(answered), split, answered[0].reference, answered[0].source)  # fmt: skip
    never = [example for example in free if not _can_match(example)]
    if never:
        first, also = never[0], "" if never[0].end is None else ", and end data.template in such a text"
        message = (
            f"{first.source}: exact match can never be 1 ({len(never)} of {len(answered)} {split} rows): data.stop "
            f"'{_shown(first.stop)}' {_why(first)}; set data.stop to what no answer holds, such as '\\n\\n' or "
            f"'\\n###'{also}"
        )
        if len(never) == len(answered):
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
