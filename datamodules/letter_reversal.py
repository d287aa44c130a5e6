"""Words written backwards; tested on longer words too."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, Kind, check_range
from lightning_prompts.datamodules.wordnet import words
from lightning_prompts.errors import UserError


class LetterReversal(GeneratedTask):
    r"""``hot -> toh``, words of WordNet 3.0, no word in two splits; ``test/7_letters`` etc. have words of that length.

    Args:
        template: Text with ``{prompt}``, ``{question}`` (the word), ``{answer}``; ``{word}`` is never spaced.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        min_length: Letters of the shortest words in training.
        max_length: Letters of the longest words in training.
        ood_lengths: Letters of the words in further test sets, out of distribution; ``[]`` for none.
        spaced: Write letters apart, ``h o t -> t o h``, since tokenizers merge letters into one token.
        train_size: How many words to train on; there are about a thousand of 3 to 6 letters for all splits.
        val_size: How many words for validation.
        test_size: How many words in each test set.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the questions.
    """

    def __init__(
        self,
        template: str = "{prompt} {question} -> {answer}\n",
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        min_length: int = 3,
        max_length: int = 6,
        ood_lengths: list[int] = [7, 8],  # noqa: B006 - never changed
        spaced: bool = False,
        train_size: int = 600,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the lengths."""
        super().__init__(template, stop, chat, system, spaced, train_size, val_size, test_size, batch_size,
                         eval_batch_size, max_train_examples, seed)  # fmt: skip
        check_range(("min_length", "max_length", "ood_lengths"), min_length, max_length, ood_lengths)
        self.lengths = range(min_length, max_length + 1)
        self.ood_lengths = ood_lengths

    def kinds(self) -> dict[Split, list[Kind]]:
        """One for each length."""
        known = set(words())
        by_length: dict[int, list[str]] = {}
        for word in sorted(known):
            if word[::-1] not in known:  # or else "tub" could be a question here and an answer there
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
        """The word backwards."""
        (word,) = parts
        fields = {"question": self.apart(word), "answer": self.apart(word[::-1]), "word": word}
        return SourceRow(fields, f"LetterReversal {word}")
