"""BIG-Bench Hard (Suzgun et al. 2022, "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them")."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.hub import HubSource
from lightning_prompts.datamodules.labelled import FORWARD, LabelledTask, RawRow
from lightning_prompts.datamodules.options import Choices, letter_choices, parse_options
from lightning_prompts.datamodules.tables import check_fields, read_header
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

MOST_TARGETS = 8  # Targets that no question lists are classes if they are so few and each occurs twice.
# In some tasks BIG-bench has other words for what BIG-Bench Hard calls yes and no.
_YES, _NO = {"yes", "true", "plausible", "correct"}, {"no", "false", "implausible", "incorrect"}

# Sordoni et al. 2023, in our words; for other tasks there is none.
INSTRUCTIONS = {
    "hyperbaton": "Which sentence has the correct adjective order?",
    "navigate": "If you follow these instructions, do you return to the starting point?",
    "date_understanding": "Infer the date from the context.",
    "logical_deduction_seven_objects": "The paragraph describes seven objects in a fixed order, and its statements are "
    "consistent. Which option follows?",
}


@dataclass(frozen=True)
class _Item:
    """A row: what it asks, what is right, and whether BIG-bench's scores of targets say so."""

    raw: RawRow
    choices: Choices
    target: str
    scored: bool = False


class BigBenchHard(LabelledTask):
    r"""Any of its 27 tasks.

    From the hub (``SaylorTwift/bbh``), or from local files: BIG-Bench Hard's own (``{"examples": [{"input": ...,
    "target": ...}, ...]}``) or BIG-bench's ``task.json`` (``"target_scores"`` instead of ``"target"``), which is
    written in the form of the other rows: the task's prefix, the question, the options. What has no file of its own is
    held out of ``train``, or of the hub's 250 rows.

    The classes of a question are the options that it lists, each ``(A)`` also as ``A``; else the targets of all rows,
    where these are few. Tasks with other answers (``word_sorting``, ``object_counting``) have none. ``{stripped}`` is
    the question without its options. Some tasks have a row or two whose target is none of the options; they are dropped
    with a warning. A file where most rows are so is refused.

    Args:
        task: Name of the task on the hub, ``navigate``.
        train: Local file to train on, and to hold out from. Questions of ``test`` that it has are dropped.
        val: Local validation file.
        test: Local test file.
        balanced: Training batches with as many examples of each class as of any other.
        template: Text with ``{prompt}``, ``{question}`` or ``{stripped}``, and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        val_size: Validation rows, at most.
        test_size: Test rows, at most; ``None`` for all of the test file, or as many held out as for validation.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of what is drawn and held out, and of the order of options that BIG-bench does not list.
    """

    def __init__(
        self,
        task: str = "navigate",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        balanced: bool = False,
        template: str = FORWARD,
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        val_size: int = 75,
        test_size: int | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        super().__init__(template, stop, chat, system, train, val, test, balanced, val_size, test_size,
                         batch_size, eval_batch_size, max_train_examples, seed)  # fmt: skip
        self.task = task
        self.instruction = INSTRUCTIONS.get(task, "")
        self._repeated: set[str] = set()

    @property
    def hub(self) -> HubSource:
        """See `LabelledTask`; there is one split."""
        return HubSource("SaylorTwift/bbh", self.task, {"train": "test"})

    def key(self, row: SourceRow) -> Hashable:
        """The question, and its options in any order where other questions have the same text."""
        text = _words(str(row.fields["stripped"]))
        options = parse_options(str(row.fields["question"])).options
        return (text, frozenset(map(str.casefold, options))) if text in self._repeated else text

    def parse(self, tables: Mapping[Split, list[RawRow]]) -> dict[Split, list[SourceRow]]:
        """Find out what the options are, and write all rows alike."""
        prefixes = {file: str(read_header(file).get("task_prefix", "")).strip() for file in self.files.values()}
        items = {split: [self._item(raw, prefixes) for raw in table] for split, table in tables.items()}
        form = _Form.of([item for part in items.values() for item in part])
        rows = {split: self._rows(part, form, split) for split, part in items.items()}
        counted = Counter(_words(str(row.fields["stripped"])) for row in rows.get("test") or next(iter(rows.values())))
        self._repeated = {text for text, count in counted.items() if count > 1}
        return rows

    def _item(self, raw: RawRow, prefixes: Mapping[Path, str]) -> _Item:
        check_fields(raw.source, raw.fields, ("input",))
        text = str(raw.fields["input"]).strip()
        prefix = prefixes.get(raw.file, "") if raw.file else ""
        scores = raw.fields.get("target_scores")
        if scores is None:
            target = raw.fields.get("target")
            if isinstance(target, list) and target:  # BIG-bench: any of them is right
                target = target[0]
            check_fields(raw.source, {**raw.fields, "target": target}, ("target",))
            return _Item(raw, parse_options(f"{prefix} {text}".strip()), str(target).strip())
        if not isinstance(scores, Mapping) or not scores:
            raise UserError(f"{raw.source}: field 'target_scores' must give each option a score, got {scores!r}")
        for option, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
                raise UserError(
                    f"{raw.source}: field 'target_scores' must give each option a number, got {score!r} for {option!r}"
                )
        best = [option for option, score in scores.items() if score == max(scores.values())]
        if len(best) > 1 or len(scores) < 2:
            raise UserError(f"{raw.source}: field 'target_scores' must name one right option, got {scores!r}")
        return _Item(raw, Choices(f"{prefix} {text}".strip(), tuple(map(str, scores))), str(best[0]), scored=True)

    def _rows(self, items: Sequence[_Item], form: _Form, split: Split) -> list[SourceRow]:
        """The rows of a split; a few whose target is none of their options are dropped, as BIG-Bench Hard has such."""
        rows, wrong = [], []
        for item in items:
            try:
                rows.append(self._row(item, form))
            except _BadRowError as error:
                wrong.append(str(error))
        if 2 * len(wrong) > len(items):
            raise UserError(f"{wrong[0]}; {len(wrong)} of {len(items)} rows are so")
        if wrong:
            log.warning("%d of %d %s rows dropped: %s", len(wrong), len(items), split, "; ".join(wrong))
        return rows

    def _row(self, item: _Item, form: _Form) -> SourceRow:
        if item.scored:
            item = form.write(item, random.Random(f"{self.seed} {item.choices.text}"))
        choices, target = item.choices, item.target
        if choices.options:
            labels = choices.labels
            found = choices.label(target)
            if found is None:
                known = ", ".join(verbalisers[0] for verbalisers in labels)
                raise _BadRowError(f"{item.raw.source}: label {target!r} is unknown; known labels: {known}")
            target = found
        elif form.all_listed:
            raise _BadRowError(f"{item.raw.source}: its options cannot be read")
        else:
            labels = tuple((name,) for name in form.classes)
        fields = {**item.raw.fields, "question": choices.question, "stripped": choices.text, "answer": target}
        return SourceRow(fields, item.raw.source, labels=labels)


class _BadRowError(UserError):
    """A row that has no right answer among its options."""


@dataclass(frozen=True)
class _Form:
    """How a task's rows are written.

    Attributes:
        listed: The options of a row that lists them, if one does.
        classes: The targets of rows that list no options, if these are classes.
        fixed: Whether all rows with scores have the same options.
        all_listed: Whether rows list their options, but for a few in which these cannot be read.
    """

    listed: Choices | None
    classes: tuple[str, ...]
    fixed: bool
    all_listed: bool

    @staticmethod
    def of(items: Sequence[_Item]) -> _Form:
        """The form of the rows that have one; those with scores follow it."""
        listed = next((item.choices for item in items if item.choices.options and not item.scored), None)
        counts = Counter(item.target for item in items if not item.choices.options)
        few = 1 < len(counts) <= MOST_TARGETS and min(counts.values()) > 1
        classes = tuple(sorted(counts)) if few and not any(target.isdecimal() for target in counts) else ()
        fixed = len({frozenset(item.choices.options) for item in items if item.scored}) == 1
        plain = sum(counts.values())
        all_listed = 2 * plain < len(items) and not any(item.scored for item in items)
        return _Form(listed, classes, fixed, all_listed)

    def write(self, item: _Item, generator: random.Random) -> _Item:
        """A row with scores, in the form of the others; by itself with dashes if all rows share their options.

        Args:
            item: The row.
            generator: For the order of lettered options.

        Raises:
            UserError: Its answer is none of the classes of the others.
        """
        text, options = item.choices.text, list(item.choices.options)
        if self.listed.lettered if self.listed else not (self.fixed or self.classes):
            generator.shuffle(options)
            return replace(item, choices=letter_choices(text, options, item.raw.source))
        names = self.listed.options if self.listed else self.classes or tuple(sorted(options))
        target = next((name for name in names if _same(name, item.target)), None)
        if target is None:
            raise UserError(f"{item.raw.source}: label {item.target!r} is unknown; known labels: {', '.join(names)}")
        return replace(item, choices=Choices(text, names if not self.classes else ()), target=target)


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _same(first: str, second: str) -> bool:
    """Whether two answers are the same word, or both yes, or both no."""
    one, other = first.strip().casefold(), second.strip().casefold()
    return one == other or any({one, other} <= meaning for meaning in (_YES, _NO))
