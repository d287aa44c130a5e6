"""The last letters of words; tested on more words, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, check_range
from lightning_prompts.datamodules.sources import wordnet_words
from lightning_prompts.datamodules.splits import Kind


class LastLetters(GeneratedTask):
    r"""``apple hot red -> etd``, words of WordNet 3.0; ``test/4_words`` etc. have that many words.

    With ``spaced``, it is ``h o t, r e d -> t d``. The field ``{words}`` has the words without spaces in them.

    Args:
        min_words: The smallest number of words in training.
        max_words: The largest number of words in training.
        ood_words: Numbers of words in the out-of-distribution test sets; ``[]`` for none.
    """

    def __init__(
        self,
        min_words: int = 2,
        max_words: int = 3,
        ood_words: list[int] = [4, 5],  # noqa: B006 - never changed
        **kwargs: Any,
    ) -> None:
        """Check the numbers of words."""
        super().__init__(**kwargs)
        check_range(("min_words", "max_words", "ood_words"), min_words, max_words, ood_words)
        self.counts = range(min_words, max_words + 1)
        self.ood_words = ood_words

    def kinds(self) -> dict[Split, list[Kind]]:
        """Return a kind for each number of words."""
        known = wordnet_words()
        return {
            "train": [[known] * count for count in self.counts],
            **{f"test/{count}_words": [[known] * count] for count in self.ood_words},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """Write the words and their last letters."""
        plain = " ".join(parts)
        question = ", ".join(map(self.apart, parts)) if self.spaced else plain  # commas, since spaces separate letters
        fields = {"question": question, "answer": self.apart("".join(word[-1] for word in parts)), "words": plain}
        return SourceRow(fields, f"LastLetters {plain}")
