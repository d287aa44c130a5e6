"""A user's own question-answer files: JSON, JSON Lines, CSV, TSV or Parquet."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Literal

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.labels import Labels
from lightning_prompts.datamodules.splitting import log_dropped
from lightning_prompts.datamodules.tables import blank, check_fields, read_table
from lightning_prompts.errors import UserError, nearest


class QuestionAnswer(TextDataModule):
    r"""Your own task: files with a question and an answer in each row.

    Args:
        train: Training file. Where ``val`` or ``test`` is not given, rows of this one are held out.
        val: Validation file.
        test: Test file.
        predict: File of questions to answer; needs no answers.
        question: Name of the field that holds the question.
        answer: Name of the field that holds the answer. Numbers are written as the file has them, ``true`` as ``True``.
        labels: The classes, where each answer is one of a few: the most likely class is chosen then, and nothing is
            generated. A list; or names as the files have them, each with the ways to write it, ``{0: [negative, bad],
            1: [positive, good]}``, the first of which is the answer; or ``auto`` for the answers of the training file
            (of all files where there is none), 200 at most and none of them a word for a missing value, such as nan.
        instruction: The task in a sentence: the initial prompt of methods whose ``text`` is ``None``.
        balanced: Training batches with as many examples of each class as of any other.
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the file.
        stop: Regular expression; a generated answer ends where it first matches. Answers of several lines need another
            than the default, and the same text at the end of ``template``.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        val_size: Held-out rows for validation: a share below 1, or a count.
        test_size: Held-out rows for testing: a share below 1, or a count.
        disjoint: What training must not share with validation and test: no question (``rows``), or no word of question
            or answer (``words``, for word lists; classes are not counted). Training rows that do are dropped.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the split and of ``max_train_examples``.

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
        instruction: str = "",
        balanced: bool = False,
        template: str = "{prompt}\nQuestion: {question}\nAnswer: {answer}\n",
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        val_size: float = 0.1,
        test_size: float = 0.1,
        disjoint: Literal["rows", "words"] = "rows",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        super().__init__(template, stop, chat, system, batch_size, eval_batch_size, max_train_examples, seed)
        self.files: dict[Split, str | None] = {"train": train, "val": val, "test": test, "predict": predict}
        for name, size in (("val_size", val_size), ("test_size", test_size)):
            if not 0 < size < float("inf"):
                raise UserError(f"data.{name} must be above 0, got {size}; give a share below 1 or a count")
        if not any(self.files.values()):
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
        self.instruction = instruction
        self.balanced = balanced
        self.sizes: dict[Split, float] = {"test": test_size, "val": val_size}
        self.disjoint = disjoint

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Read the files, hold out what they lack, and keep what is held out from training."""
        splits = {
            split: self._rows(Path(file), answers=split != "predict") for split, file in self.files.items() if file
        }
        if self.labels is not None:
            splits = self._labelled(splits)
        if "train" in splits:
            for split, size in self.sizes.items():
                if split not in splits:
                    splits[split], splits["train"] = self._hold_out(splits["train"], split, size)
                splits["train"] = self._without(splits["train"], splits[split], split)
        return splits

    def _labelled(self, splits: dict[Split, list[SourceRow]]) -> dict[Split, list[SourceRow]]:
        """The rows with their classes."""
        if isinstance(self.labels, Labels):
            labels = self.labels
        else:
            sources = ["train"] if "train" in splits else [split for split in splits if split != "predict"]
            labels = Labels.found([row for split in sources for row in splits[split]])
        return {split: [labels.of(row, strict=split != "predict") for row in rows] for split, rows in splits.items()}

    def _hold_out(self, rows: list[SourceRow], split: Split, size: float) -> tuple[list[SourceRow], list[SourceRow]]:
        count = round(size * len(rows)) if size < 1 else int(size)
        if not 0 < count < len(rows):
            raise UserError(
                f"data.{split}_size {size} of the {len(rows)} rows of {self.files['train']} leaves nothing to "
                f"{'hold out' if count <= 0 else 'train on'}; change it or give data.{split} a file"
            )
        chosen = set(random.Random(f"{self.seed} {split}").sample(range(len(rows)), count))
        held_out = [row for index, row in enumerate(rows) if index in chosen]
        return held_out, [row for index, row in enumerate(rows) if index not in chosen]

    def _without(self, train: list[SourceRow], held_out: list[SourceRow], split: Split) -> list[SourceRow]:
        """The training rows that share no question, or no word, with held-out rows."""
        key = _words if self.disjoint == "words" else _question
        taken = {item for row in held_out for item in key(row)}
        kept = [row for row in train if taken.isdisjoint(key(row))]
        if len(kept) < len(train):
            shared = "words" if self.disjoint == "words" else "questions"
            log_dropped(len(train) - len(kept), len(train), "train", f"they share {shared} with the {split} split")
        if not kept:
            raise UserError(f"data.disjoint: {self.disjoint} leaves nothing to train on beside the {split} split")
        return kept

    def _rows(self, path: Path, answers: bool) -> list[SourceRow]:
        table = read_table(path)
        if not table:
            raise UserError(f"{path} has no rows")
        names = list(dict.fromkeys(name for raw in table for name in raw))
        wanted = [("question", self.question), ("answer", self.answer)] if answers else [("question", self.question)]
        for role, name in wanted:
            if name not in names:
                others = [known for known in names if known not in (self.question, self.answer)]
                hint = nearest(name, others) if others else f"known: {', '.join(names)}"
                if role == "answer":
                    hint += "; questions without answers go to predict, as data.predict"
                raise UserError(f"{path} has no field {name!r} (data.{role}); {hint}")
        rows = []
        for number, raw in enumerate(table, start=1):
            check_fields(f"{path} row {number}", raw, [name for _, name in wanted])
            answer = raw.get(self.answer)
            fields = {**raw, "question": raw[self.question], "answer": None if blank(answer) else answer}
            rows.append(SourceRow(fields, f"{path} row {number}"))
        return rows


def _question(row: SourceRow) -> set[str]:
    return {str(row.fields["question"])}


def _words(row: SourceRow) -> set[str]:
    answer = "" if row.labels else row.fields["answer"]  # classes are the same in all splits
    return set(re.findall(r"\w+", f"{row.fields['question']} {answer}".casefold()))
