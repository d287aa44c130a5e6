"""BIG-Bench Hard (Suzgun et al. 2022, "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them")."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.labels import Choices, LabelledTask, letter_choices, parse_options
from lightning_prompts.datamodules.sources import HubSource, RawRow, check_fields, read_header
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)

MOST_TARGETS = 8  # targets without a list of options are classes if they are at most this many and each occurs twice
# Words of BIG-bench for what BIG-Bench Hard calls yes and no.
_YES, _NO = {"yes", "true", "plausible", "correct"}, {"no", "false", "implausible", "incorrect"}

# Instructions of Sordoni et al. 2023, reworded; other tasks have none.
INSTRUCTIONS = {
    "hyperbaton": "Which sentence has the correct adjective order?",
    "navigate": "If you follow these instructions, do you return to the starting point?",
    "date_understanding": "Infer the date from the context.",
    "logical_deduction_seven_objects": "The paragraph describes seven objects in a fixed order, and its statements are "
    "consistent. Which option follows?",
}


@dataclass(frozen=True)
class _Item:
    """A row: its question, its target, and whether the target comes from the ``target_scores`` of BIG-bench."""

    raw: RawRow
    choices: Choices
    target: str
    scored: bool = False


class BigBenchHard(LabelledTask):
    r"""Any of its 27 tasks.

    From the hub (``SaylorTwift/bbh``), or from local files: BIG-Bench Hard's own (``{"examples": [{"input": ...,
    "target": ...}, ...]}``) or BIG-bench's ``task.json`` (``"target_scores"`` instead of ``"target"``), which is
    written in the form of the other rows: the prefix of the task, the question, the options. Splits without a file are
    held out of ``train``, or of the 250 rows on the hub. Training rows that are also test rows are dropped.

    The classes of a question are its options, with ``(A)`` also written as ``A``. Without options, they are the targets
    of all rows if these are few. Tasks with other answers (``word_sorting``, ``object_counting``) have no classes.
    ``{stripped}`` is the question without its options. A few rows whose target is none of their options are dropped
    with a warning; a file in which most rows are like that raises an error.

    Args:
        task: Name of the task on the hub, such as ``navigate``.
    """

    def __init__(self, task: str = "navigate", **kwargs: Any) -> None:
        """Find the instruction of the task."""
        super().__init__(**kwargs)
        self.task = task
        self.task_instruction = INSTRUCTIONS.get(task, "")
        self._repeated: set[str] = set()

    @property
    def hub(self) -> HubSource:
        """The dataset of this task, which has one split."""
        return HubSource("SaylorTwift/bbh", self.task, {"train": "test"})

    def key(self, row: SourceRow) -> Hashable:
        """Return the question, and its options in any order if other questions have the same text."""
        text = _words(str(row.fields["stripped"]))
        options = parse_options(str(row.fields["question"])).options
        return (text, frozenset(map(str.casefold, options))) if text in self._repeated else text

    def parse(self, tables: Mapping[Split, list[RawRow]]) -> dict[Split, list[SourceRow]]:
        """Find the options, and write all rows in the same form."""
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
            if isinstance(target, list) and target:  # BIG-bench: all of them are right
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
        """Return the rows of a split; drop the few rows of BIG-Bench Hard whose target is none of their options."""
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
    """A row whose target is none of its options."""


@dataclass(frozen=True)
class _Form:
    """How the rows of a task are written.

    Attributes:
        listed: The options of a row that lists them; ``None`` if no row does.
        classes: The targets of rows that list no options, if these are classes.
        fixed: Whether all rows with scores have the same options.
        all_listed: Whether rows list their options, except for a few whose options cannot be read.
    """

    listed: Choices | None
    classes: tuple[str, ...]
    fixed: bool
    all_listed: bool

    @staticmethod
    def of(items: Sequence[_Item]) -> _Form:
        """Find the form of the rows without scores; rows with scores are written in the same form."""
        listed = next((item.choices for item in items if item.choices.options and not item.scored), None)
        counts = Counter(item.target for item in items if not item.choices.options)
        few = 1 < len(counts) <= MOST_TARGETS and min(counts.values()) > 1
        classes = tuple(sorted(counts)) if few and not any(target.isdecimal() for target in counts) else ()
        fixed = len({frozenset(item.choices.options) for item in items if item.scored}) == 1
        plain = sum(counts.values())
        all_listed = 2 * plain < len(items) and not any(item.scored for item in items)
        return _Form(listed, classes, fixed, all_listed)

    def write(self, item: _Item, generator: random.Random) -> _Item:
        """Write a row with scores in the form of the others; without others, with dashes if all options are the same.

        Args:
            item: The row.
            generator: For the order of lettered options.

        Raises:
            UserError: Its answer is none of the classes of the other rows.
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
    """Return whether two answers are the same word, both yes, or both no."""
    one, other = first.strip().casefold(), second.strip().casefold()
    return one == other or any({one, other} <= meaning for meaning in (_YES, _NO))
