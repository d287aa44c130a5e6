"""The base class of datasets of worked problems: a question, a solution, and the final answer in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule, check_sizes
from lightning_prompts.datamodules.sources import HubSource, RawRow, check_fields, file_path, read_rows
from lightning_prompts.datamodules.splits import asked, hold_out_questions, remove_duplicates
from lightning_prompts.errors import UserError


class WorkedProblems(TextDataModule, ABC):
    """Problems with solutions; the scored answer is the final answer or the whole solution.

    A subclass implements `hub`, `required` and `parse`. Generations are compared as numbers or formulas. Validation
    rows, and test rows if there are no others, are held out of the training rows by ``seed``. No question is in two
    splits; training may have several solutions of a problem.

    Args:
        train: Local training file instead of the hub.
        test: Local test file.
        answer: Score the ``final`` answer or the whole ``solution``.
        max_characters: Drop problems whose question and answer have more characters in total.
        val_size: Number of training rows held out for validation.
        test_size: Number of test rows, the first ones; ``None`` for all. If there is no test split, the number of
            training rows held out for testing; ``None`` for ``val_size`` rows.
    """

    numeric = True
    streamed: ClassVar[bool] = False  # too large to read: ``max_train_examples`` keeps the first rows of the hub

    def __init__(
        self,
        train: str | None = None,
        test: str | None = None,
        answer: Literal["final", "solution"] = "final",
        max_characters: int | None = None,
        val_size: int = 200,
        test_size: int | None = None,
        template: str = "{prompt}: {question}\nAnswer: {answer}\n\n",
        stop: str = r"\n\n",
        batch_size: int = 16,
        eval_batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        """Check the sizes."""
        super().__init__(template=template, stop=stop, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        check_sizes(val_size=val_size, test_size=test_size, max_characters=max_characters)
        self.files = {"train": file_path("train", train), "test": file_path("test", test)}
        self.answer = answer
        self.max_characters = max_characters
        self.val_size = val_size
        self.test_size = test_size

    @property
    @abstractmethod
    def hub(self) -> HubSource:
        """Where the rows come from if there are no local files."""

    @property
    @abstractmethod
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have."""

    @abstractmethod
    def parse(self, raw: Mapping[str, Any]) -> tuple[str, str, str]:
        """Return the question, the solution and the final answer of a row; ``""`` if it has no final answer."""

    def wanted(self, raw: Mapping[str, Any]) -> bool:
        """Return whether to keep a row."""
        del raw
        return True

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read and filter the rows, and hold out missing splits."""
        splits = remove_duplicates(
            {split: self._read(split) for split in ("train", "test") if self._has(split)}, asked, repeats=True
        )
        if "train" in splits:
            sizes = {"val": self.val_size}
            if "test" not in splits:
                sizes["test"] = self.test_size or self.val_size
            splits |= hold_out_questions(splits["train"], sizes, self.seed, asked)
        if self.test_size is not None:
            splits["test"] = splits["test"][: self.test_size]
        return splits

    def _has(self, split: Split) -> bool:
        return self.files[split] is not None or (not any(self.files.values()) and split in self.hub.splits)

    def _read(self, split: Split) -> list[SourceRow]:
        file = self.files[split]
        if file is not None:
            raws = read_rows(file)
        else:
            limit = None
            if self.streamed and self.max_train_examples is not None:  # and enough to hold out
                limit = self.max_train_examples + self.val_size + (self.test_size or self.val_size)
            raws = self.hub.rows(split, self._keep, limit)
        for raw in raws:
            check_fields(raw.source, raw.fields, self.required)
        rows = [self._row(raw) for raw in raws if self._keep(raw.fields)]
        if not rows:
            raise UserError(
                f"{file or self.hub.path}: none of its {split} rows passes the filters (data.max_characters and the "
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

    def _row(self, raw: RawRow) -> SourceRow:
        question, solution, final = (part.strip() for part in self.parse(raw.fields))
        if not final:
            raise UserError(f"{raw.source} has no final answer; drop the row")
        fields = {**raw.fields, "question": question, "answer": final if self.answer == "final" else solution}
        return SourceRow({**fields, "solution": solution}, raw.source, reference=final)
