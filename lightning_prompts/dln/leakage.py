"""Find training text in a prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from lightning_prompts.errors import check_at_least
from lightning_prompts.types import Example

WORD = re.compile(r"\w+")
Passage: TypeAlias = tuple[str, ...]


def copied_words(text: str, examples: Sequence[Example], least: int) -> int:
    """Return the length of the longest passage that a text shares with a question or an answer, in words.

    Case, punctuation and white space do not count. A passage that is in more than half of the examples, such as a
    question's fixed wording, is the task's format and not a leak.

    Args:
        text: A prompt.
        examples: The training examples.
        least: Shortest passage that counts, in words.

    Returns:
        The number of words; 0 if no passage has ``least`` words.

    >>> examples = [Example("", "", " 1", reference="1", fields={"question": "Is the old mill by the river?"})]
    >>> copied_words("Say yes if: is the OLD mill by the sea?", examples, 4)
    6
    """
    own = list(_passages(text, least))
    wanted = set(own)
    if not wanted:
        return 0
    shared = [wanted & _all_passages(example, least) for example in examples]
    counts = Counter(passage for passages in shared for passage in passages)
    leaked = {passage for passage, count in counts.items() if count == 1 or 2 * count <= len(examples)}
    pasted = [passage if passage in leaked else None for passage in own]
    found = [example for example, passages in zip(examples, shared, strict=True) if passages & leaked]
    texts = {each for example in found for each in _texts(example)}
    longest = max((_longest_run(pasted, list(_passages(each, least))) for each in texts), default=0)
    return longest + least - 1 if longest else 0


class LeakCheck:
    """Looks for training text in prompts, and remembers the results.

    Args:
        least: See `copied_words`.
    """

    def __init__(self, least: int) -> None:
        """Check the setting."""
        check_at_least("leak_words", least)
        self.least = least
        self._known: dict[str, int] = {}

    def __call__(self, prompt: str, examples: Sequence[Example]) -> int:
        """Return `copied_words` of a prompt; the examples are the same in every call."""
        if prompt not in self._known:
            self._known[prompt] = copied_words(prompt, examples, self.least)
        return self._known[prompt]


def _all_passages(example: Example, length: int) -> set[Passage]:
    return {passage for text in _texts(example) for passage in _passages(text, length)}


def _texts(example: Example) -> set[str]:
    return {example.question, example.answer or "", example.reference or ""}


def _longest_run(own: Sequence[Passage | None], other: Sequence[Passage]) -> int:
    """Return how many passages stand one after the other in both texts at most; ``None`` ends a run."""
    longest, runs = 0, dict[int, int]()  # by the place in the other text where a run ends
    for passage in own:
        runs = {place: runs.get(place - 1, 0) + 1 for place, each in enumerate(other) if each == passage}
        longest = max([longest, *runs.values()])
    return longest


def _passages(text: str, length: int) -> Iterator[Passage]:
    """Return all passages of ``length`` words."""
    words = WORD.findall(text.casefold())
    return zip(*(words[start:] for start in range(length)), strict=False)
