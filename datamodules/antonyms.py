"""Antonyms of single English words from WordNet 3.0 (included, see ``data/LICENSE.wordnet``)."""

from __future__ import annotations

import random
from typing import Any, Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.sources import shipped_table
from lightning_prompts.datamodules.splits import check_fractions, disjoint_components
from lightning_prompts.errors import UserError


class Antonyms(TextDataModule):
    """Word -> antonym, both directions of each pair; no word of a test pair is in training.

    Args:
        min_count: Keep pairs whose rarer word occurs at least this often in WordNet's tagged texts; 0 keeps all 3,229.
        parts: Keep only these parts of speech: ``adj``, ``adv``, ``noun``, ``verb``; ``None`` keeps all.
        val_fraction: Share of the pairs for validation.
        test_fraction: Share of the pairs for testing.
        rare_size: Number of questions in the out-of-distribution test set ``test/rare_words``: pairs below
            ``min_count`` whose words are in no other split.
        template: Text with ``{prompt}``, ``{question}`` (the word) and ``{answer}`` (its antonym).
        stop: Regular expression; a generated answer ends where it first matches, by default at the end of a word.
    """

    def __init__(
        self,
        min_count: int = 1,
        parts: list[Literal["adj", "adv", "noun", "verb"]] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        rare_size: int = 0,
        template: str = "Here are two{prompt} {question} and {answer}.",
        stop: str = r"[^\w'-]",
        **kwargs: Any,
    ) -> None:
        """Check the sizes."""
        super().__init__(template=template, stop=stop, **kwargs)
        check_fractions(val_fraction, test_fraction)
        self.min_count = min_count
        self.parts = parts
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        if rare_size < 0 or rare_size % 2:
            raise UserError(f"data.rare_size must be 0 or an even number (both directions of pairs), got {rare_size}")
        self.rare_size = rare_size

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Split whole components of the word graph, so that no word is in two splits."""
        everything = [row for row in shipped_table("antonyms.tsv") if self.parts is None or row["part"] in self.parts]
        table = [row for row in everything if int(row["count"]) >= self.min_count]
        pairs = [(row["word"], row["antonym"]) for row in table]
        groups = disjoint_components(pairs)
        random.Random(self.seed).shuffle(groups)
        targets: list[tuple[Split, float]] = [
            ("test", self.test_fraction * len(pairs)),
            ("val", self.val_fraction * len(pairs)),
        ]
        splits: dict[Split, list[SourceRow]] = {"test": [], "val": [], "train": []}
        for group in groups:
            if targets and len(splits[targets[0][0]]) >= 2 * targets[0][1]:
                targets.pop(0)
            split: Split = targets[0][0] if targets else "train"
            for index in group:
                splits[split] += _both_ways(table[index])
        if self.rare_size:
            known = {word for pair in pairs for word in pair}
            rare = [row for row in everything if int(row["count"]) < self.min_count]
            splits["test/rare_words"] = self._rare(rare, known)
        return splits

    def _rare(self, table: list[dict[str, str]], known: set[str]) -> list[SourceRow]:
        rare = [row for row in table if not known & {row["word"], row["antonym"]}]
        if len(rare) < self.rare_size // 2:
            raise UserError(
                f"data.rare_size ({self.rare_size}): only {2 * len(rare)} questions are below min_count "
                f"({self.min_count}) and share no word with the others; lower it, or raise min_count"
            )
        drawn = random.Random(self.seed).sample(rare, self.rare_size // 2)
        return [source for row in drawn for source in _both_ways(row)]


def _both_ways(row: dict[str, str]) -> list[SourceRow]:
    """Return the rows for word -> antonym and antonym -> word."""
    return [
        SourceRow({"question": question, "answer": answer, "part": row["part"]}, f"antonyms.tsv {question}/{answer}")
        for question, answer in ((row["word"], row["antonym"]), (row["antonym"], row["word"]))
    ]
