"""The last letters of words; tested on more words too."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, Kind, check_range
from lightning_prompts.datamodules.wordnet import words


class LastLetters(GeneratedTask):
    r"""``apple hot red -> etd``, words of WordNet 3.0; ``test/4_words`` etc. have that many words.

    Args:
        template: Text with ``{prompt}``, ``{question}`` (the words), ``{answer}``; ``{words}`` are never spaced.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        min_words: How few words there are in training.
        max_words: How many words there are in training.
        ood_words: How many words in further test sets, out of distribution; ``[]`` for none.
        spaced: Write letters apart, ``h o t, r e d -> t d``, since tokenizers merge letters into one token.
        train_size: How many questions to train on, no two alike.
        val_size: How many questions for validation.
        test_size: How many questions in each test set.
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
        min_words: int = 2,
        max_words: int = 3,
        ood_words: list[int] = [4, 5],  # noqa: B006 - never changed
        spaced: bool = False,
        train_size: int = 5000,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the numbers of words."""
        super().__init__(template, stop, chat, system, spaced, train_size, val_size, test_size, batch_size,
                         eval_batch_size, max_train_examples, seed)  # fmt: skip
        check_range(("min_words", "max_words", "ood_words"), min_words, max_words, ood_words)
        self.counts = range(min_words, max_words + 1)
        self.ood_words = ood_words

    def kinds(self) -> dict[Split, list[Kind]]:
        """One for each number of words."""
        known = words()
        return {
            "train": [[known] * count for count in self.counts],
            **{f"test/{count}_words": [[known] * count] for count in self.ood_words},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """The words' last letters."""
        plain = " ".join(parts)
        question = ", ".join(map(self.apart, parts)) if self.spaced else plain  # or else one could not tell words apart
        fields = {"question": question, "answer": self.apart("".join(word[-1] for word in parts)), "words": plain}
        return SourceRow(fields, f"LastLetters {plain}")
