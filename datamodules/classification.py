"""Four classifications of sentences: sentiment, opinion polarity, question type, subjectivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.labels import LabelledTask, Labels
from lightning_prompts.datamodules.sources import HubSource, RawRow, check_fields, file_path, read_rows
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.types import Example


@dataclass(frozen=True)
class _Task:
    """One of the datasets.

    Attributes:
        instruction: The task in a sentence.
        classes: The classes of the labels 0, 1, ... in local files.
        hub: The dataset on the hub.
        sentence: The field with the sentence on the hub.
        label: The field with the label on the hub.
        hub_classes: The classes of the labels 0, 1, ... on the hub, if they differ from ``classes``.
        codes: Other names of the classes.
    """

    instruction: str
    classes: tuple[str, ...]
    hub: HubSource
    sentence: str = "sentence"
    label: str = "label"
    hub_classes: tuple[str, ...] = ()
    codes: Mapping[str, str] = field(default_factory=dict)


_POLES = ("negative", "positive")
_REVIEW = "Read the following review, then choose whether it is negative or positive."
_SPLITS = {"train": "train", "test": "test"}
_TREC_CODES = {
    "desc": "description",
    "enty": "entity",
    "abbr": "expression",
    "abbreviation": "expression",
    "hum": "human",
    "loc": "location",
    "num": "number",
    "numeric": "number",
}
TASKS = {
    # The test sentences on the hub have no labels.
    "sst2": _Task(_REVIEW, _POLES, HubSource("stanfordnlp/sst2", None, {"train": "train", "test": "validation"})),
    "mpqa": _Task(_REVIEW, _POLES, HubSource("rahulsikder223/SentEval-MPQA", None, _SPLITS)),
    "trec": _Task(
        "Read the following question, then choose whether it is about a description, entity, expression, human, "
        "location or number.",
        ("description", "entity", "expression", "human", "location", "number"),
        HubSource("SetFit/TREC-QC", None, _SPLITS),
        sentence="text",
        label="label_coarse_original",
        codes=_TREC_CODES,
    ),
    "subj": _Task(
        "Read the following sentence, then choose whether it is subjective or objective.",
        ("subjective", "objective"),
        HubSource("SetFit/subj", None, _SPLITS),
        sentence="text",
        hub_classes=("objective", "subjective"),
    ),
}


class Classification(LabelledTask):
    r"""Sentences and the class of each.

    ``sst2`` (Socher et al. 2013) and ``mpqa`` (Wiebe et al. 2005): negative or positive. ``trec`` (Voorhees & Tice
    2000): a question asks for a description, entity, expression, human, location or number. ``subj`` (Pang & Lee 2004):
    subjective or objective. Rows come from the hub or from local files; one file (``train``) is enough. A label is the
    name of a class or its number, in the order given here.

    Args:
        task: The dataset.
        predict: Local file of sentences to classify; needs no labels.
        sentence: Field of the local files that holds the sentence.
        label: Field of the local files that holds the label.
        order: The classes of the labels 0, 1, ... in the local files; ``None`` for the usual order.
        labels: The ways to write a class, by its name, if its name is not the answer: ``{expression: [expression,
            abbreviation]}``. The first is the answer.
        balanced_val: Validation rows with the same number of rows of each class, for a balanced test file beside an
            unbalanced training file, as in mpqa: 73% of its training rows are negative, so that a constant answer would
            be right for 73% of the validation rows.
    """

    def __init__(
        self,
        task: Literal["sst2", "mpqa", "trec", "subj"] = "sst2",
        predict: str | None = None,
        sentence: str = "sentence",
        label: str = "label",
        order: list[str] | None = None,
        labels: dict[str, list[str]] | None = None,
        balanced_val: bool = False,
        val_size: int = 256,
        test_size: int | None = 250,
        max_train_examples: int | None = 400,
        **kwargs: Any,
    ) -> None:
        """Check the classes."""
        super().__init__(val_size=val_size, test_size=test_size, max_train_examples=max_train_examples, **kwargs)
        if task not in TASKS:
            raise UserError(f"data.task {task!r} is unknown; {nearest(task, TASKS)}")
        self.task = TASKS[task]
        self.balanced_val = balanced_val
        self.task_instruction = self.task.instruction
        classes = self.task.classes
        for name in [*(order or ()), *(labels or ())]:
            if name not in classes:
                option = "order" if name in (order or ()) else "labels"
                raise UserError(f"data.{option}: {task} has no class {name!r}; known: {', '.join(classes)}")
        if order is not None and sorted(order) != sorted(classes):
            raise UserError(f"data.order must name each class of {task} once: {', '.join(classes)}")
        self.sentence, self.label = (sentence, label) if self.files else (self.task.sentence, self.task.label)
        self.predict, self.own_sentence = file_path("predict", predict), sentence
        self.order: Sequence[str] = order or classes
        if not self.files:
            self.order = self.task.hub_classes or classes
        self.labels = Labels({name: (labels or {}).get(name, [name]) for name in classes})

    @property
    def hub(self) -> HubSource:
        """The dataset of this task."""
        return self.task.hub

    def parse(self, tables: Mapping[Split, list[RawRow]]) -> dict[Split, list[SourceRow]]:
        """Turn labels into the names of classes, and names into answers."""
        return {split: [self._row(raw) for raw in table] for split, table in tables.items()}

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """See `LabelledTask`; add the sentences to classify."""
        splits = super().load_rows()
        if self.predict is not None:
            splits["predict"] = self._unlabelled(self.predict)
        return splits

    def examples(self, split: Split) -> list[Example]:
        """See `TextDataModule`; the other splits, which may be on the hub, are not read for ``predict``."""
        if split == "predict" and self.predict is not None and self._examples is None:
            return [self.render(row) for row in self._unlabelled(self.predict)]
        return super().examples(split)

    def _row(self, raw: RawRow) -> SourceRow:
        check_fields(raw.source, raw.fields, (self.sentence, self.label))
        return self._with_answer(raw, self.sentence, self._class(raw))

    def _unlabelled(self, file: Path) -> list[SourceRow]:
        rows = read_rows(file)
        for raw in rows:
            check_fields(raw.source, raw.fields, (self.own_sentence,))
        return [self._with_answer(raw, self.own_sentence, None) for raw in rows]

    def _with_answer(self, raw: RawRow, sentence: str, answer: str | None) -> SourceRow:
        question = str(raw.fields[sentence]).strip()
        fields = {**raw.fields, "question": question, "stripped": question, "answer": answer}
        return SourceRow(fields, raw.source, labels=self.labels.verbalisers)

    def _class(self, raw: RawRow) -> str:
        """Return the answer for the label of a row."""
        value = str(raw.fields[self.label]).strip()
        if value.isdecimal() and int(value) < len(self.order):
            value = self.order[int(value)]
        answer = self.labels.find(self.task.codes.get(value.casefold(), value))
        if answer is None:
            known = ", ".join(f"{number} {name}" for number, name in enumerate(self.order))
            raise UserError(f"{raw.source}: label {raw.fields[self.label]!r} is unknown; known labels: {known}")
        return answer
