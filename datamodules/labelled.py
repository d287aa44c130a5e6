"""What datasets with classes share: where rows come from, and how they are divided."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.hub import HubSource, hub_rows
from lightning_prompts.datamodules.splitting import apart, draw, draw_balanced, hold_out
from lightning_prompts.datamodules.tables import read_table
from lightning_prompts.errors import UserError

# Prompt, input and cue, each a paragraph of its own (Sordoni et al. 2023); the newline teaches where an answer ends.
FORWARD = "{prompt}\n\n{question}\n\nAnswer: {answer}\n"


@dataclass(frozen=True)
class RawRow:
    """A row as it was read.

    Attributes:
        source: For error messages.
        fields: Its fields.
        file: The local file that it is from; ``None`` for a row of the hub.
    """

    source: str
    fields: Mapping[str, Any]
    file: Path | None = None


class LabelledTask(TextDataModule, ABC):
    """Rows from files or the hub; a split without rows of its own is held out of the training rows by ``seed``.

    A subclass gives `hub` and `parse`. A question of the test rows is in no other split, one of the validation rows not
    in training, and training has none twice.

    Args:
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the rows.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        train: Local file to train on, and to hold out from.
        val: Local validation file.
        test: Local test file.
        balanced: Training batches with as many examples of each class as of any other.
        val_size: Validation rows, at most.
        test_size: Test rows, at most; ``None`` for all of the test file.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of what is drawn and held out.
    """

    balanced_val: bool = False  # validation rows with as many of each class as of any other

    def __init__(
        self,
        template: str,
        stop: str,
        chat: bool,
        system: str | None,
        train: str | None,
        val: str | None,
        test: str | None,
        balanced: bool,
        val_size: int,
        test_size: int | None,
        batch_size: int,
        eval_batch_size: int,
        max_train_examples: int | None,
        seed: int,
    ) -> None:
        """Check the sizes."""
        super().__init__(template, stop, chat, system, batch_size, eval_batch_size, max_train_examples, seed)
        for name, value in (("val_size", val_size), ("test_size", test_size)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.files = {split: Path(file) for split, file in files.items() if file is not None}
        self.balanced = balanced
        self.val_size = val_size
        self.test_size = test_size

    @property
    @abstractmethod
    def hub(self) -> HubSource:
        """Where the rows come from without local files."""

    @abstractmethod
    def parse(self, tables: Mapping[Split, list[RawRow]]) -> dict[Split, list[SourceRow]]:
        """The rows of each split as questions and answers."""

    def key(self, row: SourceRow) -> Hashable:
        """What two rows share that ask the same."""
        return " ".join(str(row.fields["question"]).casefold().split())

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read, keep apart, hold out what is missing, and draw as many as wanted."""
        splits = apart(self.parse({split: self._table(split) for split in self._given}), self.key)
        sizes: dict[Split, int | None] = {"val": self.val_size, "test": self.test_size}
        if self.balanced_val and (source := "val" if "val" in splits else "train") in splits:
            held = source == "train"
            splits["val"], rest = draw_balanced(splits[source], _answer, self.val_size, self.seed, "val", leave=held)
            if held:
                splits["train"] = rest
        if "train" in splits:
            missing = {split: size or self.val_size for split, size in sizes.items() if split not in splits}
            splits |= hold_out(splits["train"], missing, self.seed)
        return splits | {split: draw(splits[split], size, self.seed, split) for split, size in sizes.items()
                         if split in splits}  # fmt: skip

    @property
    def _given(self) -> list[Split]:
        return list(self.files or self.hub.splits)

    def _table(self, split: Split) -> list[RawRow]:
        file = self.files.get(split)
        if file is None:
            source = self.hub
            raws = hub_rows(source.path, source.config, source.splits[split], f"data.{split}")
            return [RawRow(f"{source.path} {split} row {number}", raw) for number, raw in enumerate(raws, start=1)]
        return self.read(file)

    @staticmethod
    def read(file: Path) -> list[RawRow]:
        """The rows of a local file.

        Raises:
            UserError: It cannot be read, or has none.
        """
        raws = read_table(file)
        if not raws:
            raise UserError(f"{file} has no rows")
        return [RawRow(f"{file} row {number}", raw, file) for number, raw in enumerate(raws, start=1)]


def _answer(row: SourceRow) -> str:
    """The class of a row."""
    return str(row.fields["answer"])
