"""Your own question-answer data: files (JSON, JSON Lines, CSV, TSV or Parquet) or rows in Python."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Self

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.labels import Labels
from lightning_prompts.datamodules.sources import (
    RawRow,
    blank,
    check_fields,
    file_path,
    read_rows,
    rows_in_python,
)
from lightning_prompts.datamodules.splits import asked, hold_out_share, without_shared
from lightning_prompts.errors import UserError, nearest

log = logging.getLogger(__name__)


class QuestionAnswer(TextDataModule):
    r"""Your own task: files with a question and an answer in each row; in Python, see also `from_rows`.

    Args:
        train: Training file. Without a ``val`` or ``test`` file, rows of this one are held out.
        val: Validation file.
        test: Test file.
        predict: File of questions to answer; needs no answers.
        question: Name of the field that holds the question.
        answer: Name of the field that holds the answer. Numbers are kept as they are written in the file; ``True``
            becomes ``true``.
        labels: The classes, if each answer is one of a few; the most likely class is then chosen, and nothing is
            generated. A list; or the names in the files, each with the ways to write the class, ``{0: [negative, bad],
            1: [positive, good]}``, of which the first is the answer; or ``auto`` for the answers of the training file
            (of all files if there is none), at most 200, none of which may stand for a missing value, such as nan.
        balanced: Training batches with the same number of examples of each class.
        val_size: Rows held out for validation: a share below 1, or a count.
        test_size: Rows held out for testing: a share below 1, or a count.
        disjoint: What training rows must not share with validation and test rows: the question (``rows``), or any word
            of question and answer (``words``, for word lists; the names of classes do not count). Training rows that
            share it are dropped.
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the rows.
        stop: Regular expression; a generated answer ends where it first matches. Answers of several lines need another
            ``stop`` than the default, and the same text at the end of ``template``.

    >>> import json, pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "my.jsonl"
    >>> _ = file.write_text("\n".join(json.dumps({"question": f"{n} + 1", "answer": n + 1}) for n in range(20)))
    >>> data = QuestionAnswer(train=str(file), template="{prompt} {question} = {answer}")
    >>> len(data.examples("train")), len(data.examples("val")), len(data.examples("test"))
    (16, 2, 2)
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        question: str = "question",
        answer: str = "answer",
        labels: str | list[Any] | dict[Any, Any] | None = None,
        balanced: bool = False,
        val_size: float = 0.1,
        test_size: float = 0.1,
        disjoint: Literal["rows", "words"] = "rows",
        template: str = "{prompt}\nQuestion: {question}\nAnswer: {answer}\n",
        stop: str = r"\n",
        **kwargs: Any,
    ) -> None:
        """Check the settings."""
        super().__init__(template=template, stop=stop, **kwargs)
        given = {"train": train, "val": val, "test": test, "predict": predict}
        self.files: dict[Split, Path] = {
            split: path for split, file in given.items() if (path := file_path(split, file)) is not None
        }
        self._tables: dict[Split, list[RawRow]] = {}  # rows in Python, by the split of a file
        for name, size in (("val_size", val_size), ("test_size", test_size)):
            if not 0 < size < float("inf"):
                raise UserError(f"data.{name} must be above 0, got {size}; give a share below 1 or a count")
        if not self.files:
            raise UserError("QuestionAnswer needs a file: set data.train (or data.test, data.predict)")
        for role, name in (("question", question), ("answer", answer)):
            if not isinstance(name, str):
                raise UserError(f"data.{role} must be the name of a field, got {name!r}")
        if question == answer:
            raise UserError(f"data.question and data.answer are the same field, {question!r}; name two")
        self.question, self.answer = question, answer
        if isinstance(labels, str) and labels != "auto":
            raise UserError(f"data.labels must be auto, or name the classes as in [up, down], got {labels!r}")
        self.labels = labels if labels is None or isinstance(labels, str) else Labels(labels)
        self.balanced = balanced
        self.sizes: dict[Split, float] = {"test": test_size, "val": val_size}
        self.disjoint = disjoint

    @classmethod
    def from_rows(
        cls,
        train_rows: object = None,
        *,
        val_rows: object = None,
        test_rows: object = None,
        predict_rows: object = None,
        **settings: Any,
    ) -> Self:
        """Build the datamodule from rows in Python; examples are the same as from files of these rows.

        Rows are a list of dicts, a pandas DataFrame or a ``datasets.Dataset``.

        Args:
            train_rows: Training rows. Without ``val_rows`` or ``test_rows``, some of these are held out.
            val_rows: Validation rows.
            test_rows: Test rows.
            predict_rows: Questions to answer; they need no answers.
            settings: All other settings of the class.

        Raises:
            UserError: Rows are of another type or empty; a row is not a dict.

        >>> rows = [{"question": f"{n} + 1", "answer": n + 1} for n in range(20)]
        >>> data = QuestionAnswer.from_rows(rows, template="{prompt} {question} = {answer}")
        >>> len(data.examples("train")), len(data.examples("val")), len(data.examples("test"))
        (16, 2, 2)
        """
        given = {"train": train_rows, "val": val_rows, "test": test_rows, "predict": predict_rows}
        tables = {split: rows_in_python(rows, split) for split, rows in given.items() if rows is not None}
        if not tables:
            raise UserError("QuestionAnswer.from_rows needs rows: give train_rows (or test_rows, predict_rows)")
        if mixed := given.keys() & settings.keys():
            raise UserError(f"QuestionAnswer.from_rows takes no files; give {min(mixed)}_rows instead of {min(mixed)}")
        names: dict[str, Any] = {split: f"{split} data" for split in tables}  # for error messages; no such file is read
        data = cls(**names, **settings)
        data._tables = tables
        return data

    def tables(self) -> dict[Split, list[dict[str, Any]]]:
        """Return the rows of `from_rows` by split; none for files."""
        return {split: [dict(raw.fields) for raw in rows] for split, rows in self._tables.items()}

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read the rows, hold out missing splits, and drop training rows that share something with held-out rows."""
        splits = {split: self._rows(split) for split in self.files}
        if self.labels is not None:
            splits = self._labelled(splits)
        if "train" in splits:
            # The given splits first, so that no held-out row is one of theirs.
            for split in sorted(self.sizes, key=lambda split: split not in splits):
                train = splits["train"]
                if split not in splits:
                    size = self.sizes[split]
                    splits[split], train = hold_out_share(train, size, self.seed, split, str(self.files["train"]))
                splits["train"] = without_shared(train, splits[split], split, words=self.disjoint == "words")
        if both := {asked(row) for row in splits.get("val", [])} & {asked(row) for row in splits.get("test", [])}:
            log.warning(
                "%d questions of the val split are also in the test split, so the best checkpoint is chosen by test "
                "questions; give other files",
                len(both),
            )
        return splits

    def _labelled(self, splits: dict[Split, list[SourceRow]]) -> dict[Split, list[SourceRow]]:
        """Return the rows with their classes."""
        if isinstance(self.labels, Labels):
            labels = self.labels
        else:
            sources = ["train"] if "train" in splits else [split for split in splits if split != "predict"]
            labels = Labels.found([row for split in sources for row in splits[split]])
        return {split: [labels.of(row, strict=split != "predict") for row in rows] for split, rows in splits.items()}

    def _rows(self, split: Split) -> list[SourceRow]:
        """Return the rows of a file, or of Python, that are given for a split."""
        source = self.files[split]
        table = self._tables.get(split) or read_rows(source)
        wanted = [("question", self.question), *([("answer", self.answer)] if split != "predict" else [])]
        names = list(dict.fromkeys(name for raw in table for name in raw.fields))
        for role, name in wanted:
            if name not in names:
                others = [known for known in names if known not in (self.question, self.answer)]
                hint = nearest(name, others) if others else f"known: {', '.join(names)}"
                if role == "answer":
                    hint += "; questions without answers go to predict, as data.predict"
                raise UserError(f"{source} has no field {name!r} (data.{role}); {hint}")
        rows = []
        for raw in table:
            check_fields(raw.source, raw.fields, [name for _, name in wanted])
            answer = raw.fields.get(self.answer)
            fields = {**raw.fields, "question": raw.fields[self.question], "answer": None if blank(answer) else answer}
            rows.append(SourceRow(fields, raw.source))
        return rows
