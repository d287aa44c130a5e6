"""Word to word: capitals of countries, past tenses, plurals. A small table that comes with the project."""

from __future__ import annotations

import csv
import random
from importlib.resources import files
from typing import Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.errors import UserError


class WordPairs(TextDataModule):
    r"""One of three tasks: ``capital`` (174 countries), ``past_tense`` (344 verbs), ``plural`` (296 nouns).

    Args:
        task: Which.
        template: Text with ``{prompt}``, ``{question}`` and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        val_fraction: Share of the pairs for validation.
        test_fraction: Share of the pairs for testing.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the split.
    """

    def __init__(
        self,
        task: Literal["capital", "past_tense", "plural"] = "past_tense",
        template: str = "{prompt}: {question}\nAnswer: {answer}\n",
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the fractions."""
        super().__init__(template, stop, chat, system, batch_size, eval_batch_size, max_train_examples, seed)
        if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1):
            raise UserError(
                f"data.val_fraction ({val_fraction}) and data.test_fraction ({test_fraction}) must be above 0 "
                "and leave something to train on"
            )
        self.task = task
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Shuffle and cut; no question occurs twice."""
        text = (files("lightning_prompts.datamodules") / "data" / "word_pairs.tsv").read_text(encoding="ascii")
        table = csv.DictReader(text.splitlines(), delimiter="\t")
        rows = [
            SourceRow({"question": row["question"], "answer": row["answer"]}, f"word_pairs.tsv {row['question']}")
            for row in table
            if row["task"] == self.task
        ]
        random.Random(f"{self.seed} {self.task}").shuffle(rows)
        test, val = (round(share * len(rows)) for share in (self.test_fraction, self.val_fraction))
        return {"test": rows[:test], "val": rows[test : test + val], "train": rows[test + val :]}
