"""Pairs of words: capitals of countries, past tenses, plurals (included)."""

from __future__ import annotations

import random
from typing import Any, Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.sources import shipped_table
from lightning_prompts.datamodules.splits import check_fractions


class WordPairs(TextDataModule):
    r"""One of three tasks: ``capital`` (174 countries), ``past_tense`` (344 verbs), ``plural`` (296 nouns).

    Args:
        task: The task.
        val_fraction: Share of the pairs for validation.
        test_fraction: Share of the pairs for testing.
    """

    def __init__(
        self,
        task: Literal["capital", "past_tense", "plural"] = "past_tense",
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        **kwargs: Any,
    ) -> None:
        """Check the fractions."""
        super().__init__(**kwargs)
        check_fractions(val_fraction, test_fraction)
        self.task = task
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Shuffle the pairs and divide them; no question occurs twice."""
        rows = [
            SourceRow({"question": row["question"], "answer": row["answer"]}, f"word_pairs.tsv {row['question']}")
            for row in shipped_table("word_pairs.tsv")
            if row["task"] == self.task
        ]
        random.Random(f"{self.seed} {self.task}").shuffle(rows)
        test, val = (round(share * len(rows)) for share in (self.test_fraction, self.val_fraction))
        return {"test": rows[:test], "val": rows[test : test + val], "train": rows[test + val :]}
