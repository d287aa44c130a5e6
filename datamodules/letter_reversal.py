"""Words written backwards; tested on longer words, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, check_range
from lightning_prompts.datamodules.sources import wordnet_words
from lightning_prompts.datamodules.splits import Kind
from lightning_prompts.errors import UserError


class LetterReversal(GeneratedTask):
    r"""``hot -> toh``, words of WordNet 3.0, no word in two splits; ``test/7_letters`` etc. have words of that length.

    With ``spaced``, it is ``h o t -> t o h``. The field ``{word}`` has the word without spaces in it.

    Args:
        min_length: Letters of the shortest words in training.
        max_length: Letters of the longest words in training.
        ood_lengths: Letters of the words in the out-of-distribution test sets; ``[]`` for none.
        train_size: Number of training words; there are about a thousand of 3 to 6 letters for all splits.
    """

    def __init__(
        self,
        min_length: int = 3,
        max_length: int = 6,
        ood_lengths: list[int] = [7, 8],  # noqa: B006 - never changed
        train_size: int = 600,
        **kwargs: Any,
    ) -> None:
        """Check the lengths."""
        super().__init__(train_size=train_size, **kwargs)
        check_range(("min_length", "max_length", "ood_lengths"), min_length, max_length, ood_lengths)
        self.lengths = range(min_length, max_length + 1)
        self.ood_lengths = ood_lengths

    def kinds(self) -> dict[Split, list[Kind]]:
        """Return a kind for each length."""
        known = set(wordnet_words())
        by_length: dict[int, list[str]] = {}
        for word in sorted(known):
            if word[::-1] not in known:  # or "tub" could be a question in one split and an answer in another
                by_length.setdefault(len(word), []).append(word)
        for name, lengths in (("min_length to data.max_length", self.lengths), ("ood_lengths", self.ood_lengths)):
            for length in lengths:
                if length not in by_length:
                    raise UserError(
                        f"data.{name}: there is no word of {length} letters; "
                        f"words have {min(by_length)} to {max(by_length)} letters"
                    )
        return {
            "train": [[by_length[length]] for length in self.lengths],
            **{f"test/{length}_letters": [[by_length[length]]] for length in self.ood_lengths},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """Write the word and its reversal."""
        (word,) = parts
        fields = {"question": self.apart(word), "answer": self.apart(word[::-1]), "word": word}
        return SourceRow(fields, f"LetterReversal {word}")
