"""What datasets of worked problems share: a question, a solution, and the final answer in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.hub import HubSource, hub_rows
from lightning_prompts.datamodules.splitting import hold_out
from lightning_prompts.datamodules.tables import check_fields, read_table
from lightning_prompts.errors import UserError


class WorkedProblems(TextDataModule, ABC):
    """Problems with solutions; the answer that is scored is the final one or the whole solution.

    A subclass gives `source`, `required` and `parse`. Generations are compared as numbers or formulas. Rows for
    validation, and for testing where there are no others, are held out of the training rows by ``seed``.

    Args:
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the rows.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        train: Local training file instead of the hub's.
        test: Local test file.
        answer: Score the ``final`` answer, or the whole ``solution``.
        max_characters: Drop problems whose question and answer have more characters together.
        val_size: Held-out rows for validation.
        test_size: Test rows, the first so many; ``None`` for all there are.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of what is held out and of ``max_train_examples``.
    """

    numeric = True

    def __init__(
        self,
        template: str,
        stop: str,
        chat: bool,
        system: str | None,
        train: str | None,
        test: str | None,
        answer: Literal["final", "solution"],
        max_characters: int | None,
        val_size: int,
        test_size: int | None,
        batch_size: int,
        eval_batch_size: int,
        max_train_examples: int | None,
        seed: int,
    ) -> None:
        """Check the sizes."""
        super().__init__(template, stop, chat, system, batch_size, eval_batch_size, max_train_examples, seed)
        for name, value in (("val_size", val_size), ("test_size", test_size), ("max_characters", max_characters)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        self.files = {"train": train, "test": test}
        self.answer = answer
        self.max_characters = max_characters
        self.val_size = val_size
        self.test_size = test_size

    @property
    @abstractmethod
    def source(self) -> HubSource:
        """Where the rows come from without local files."""

    @property
    @abstractmethod
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have."""

    @abstractmethod
    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """Question, solution and final answer of a row; an empty final answer means that there is none."""

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """Which rows to keep, by their fields."""
        del raw
        return True

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read, filter, and hold out."""
        splits = {split: self._read(split) for split in ("train", "test") if self._has(split)}
        if "train" in splits:
            sizes = {"val": self.val_size}
            if "test" not in splits:
                sizes["test"] = self.test_size or self.val_size
            splits |= hold_out(splits["train"], sizes, self.seed)
        if self.test_size is not None:
            splits["test"] = splits["test"][: self.test_size]
        return splits

    def _has(self, split: Split) -> bool:
        return self.files[split] is not None or (not any(self.files.values()) and split in self.source.splits)

    def _read(self, split: Split) -> list[SourceRow]:
        file = self.files[split]
        if file is not None:
            named = [(f"{file} row {number}", raw) for number, raw in enumerate(read_table(Path(file)), start=1)]
            if not named:
                raise UserError(f"{file} has no rows")
        else:
            source = self.source
            limit = None
            if split == "train" and self.max_train_examples is not None:  # and some to hold out
                limit = self.max_train_examples + self.val_size + (self.test_size or self.val_size)
            raws = hub_rows(source.path, source.config, source.splits[split], f"data.{split}", self._keep, limit)
            named = [(f"{source.path} {split} row {number}", raw) for number, raw in enumerate(raws, start=1)]
        for where, raw in named:
            check_fields(where, raw, self.required)
        rows = [self._row(where, raw) for where, raw in named if self._keep(raw)]
        if not rows:
            raise UserError(
                f"{file or self.source.path}: none of its {split} rows passes the filters (data.max_characters and the "
                "dataset's own, such as problem_sources or subjects); loosen them"
            )
        return rows

    def _keep(self, raw: Mapping[str, Any]) -> bool:
        if not self.wanted(raw):
            return False
        if self.max_characters is None or any(name not in raw for name in self.required):
            return True
        question, solution, final = self.parse(raw)
        return len(question) + len(final if self.answer == "final" else solution) <= self.max_characters

    def _row(self, where: str, raw: Mapping[str, Any]) -> SourceRow:
        question, solution, final = (part.strip() for part in self.parse(raw))
        if not final:
            raise UserError(f"{where} has no final answer; drop the row")
        fields = {**raw, "question": question, "answer": final if self.answer == "final" else solution}
        return SourceRow({**fields, "solution": solution}, where, reference=final)
