"""The whole page: tasks, then what differs in configs and environments, then how the numbers were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import track

from lightning_prompts.report.blocks import Block, Heading, Table, Text
from lightning_prompts.report.common import COLUMNS, lacking, parts
from lightning_prompts.report.methods import Method, Task
from lightning_prompts.report.numbers import NONE
from lightning_prompts.report.sections import section
from lightning_prompts.report.statistics import DRAWS, EXACT
from lightning_prompts.runs.configs import Settings, without_seeds

NOTES = (
    "Over seeds: mean ± the 97.5% quantile of Student's t (seeds - 1 degrees of freedom) times the standard error. It "
    "is about runs with other seeds: other splits, initial prompts and orders of batches. With two or three seeds it "
    "is wide, as it should be. Shares are cut at 0 and 1.",
    f"Over questions: percentiles of {DRAWS:,} bootstrap samples (Efron 1979) of the questions of all seeds. A "
    "question that came in the test sets of several seeds is drawn with all its rows. It is about other questions, "
    "with these prompts.",
    "p: paired permutation test. Under the hypothesis that two methods do not differ, they can be swapped within each "
    f"question; p is the share of {DRAWS:,} random swaps (of all, if at most {EXACT} questions differ) that make "
    "the mean difference at least as large, counting the one that was found. Rows are matched by seed, test set, "
    "question and answer, or where two methods have no seed in common by all of these but the seed, each row's mean "
    "over the method's seeds; a row that a test set holds twice is two rows; rows of the same question are swapped "
    "together. Random draws start at the same seed every time: the same runs give the same page.",
    "p (Holm): the same, multiplied step by step for the number of pairs in the table (Holm 1979).",
    "NLL: mean negative log-likelihood of an answer's tokens in nats, averaged over examples. Exact match: the greedy "
    "generation, cut where the task says, is the answer. Training NLL is that of the batches as they came.",
    "Cost: tokens of prompts, texts and answers that training ran through the LM, with a gradient and without one; "
    "tokens that servers read and wrote (remote); calls: texts scored, read or written; passes: forward passes of the "
    "LM; memory: the most that was held at a time.",
)


def page(tasks: Sequence[Task], title: str, progress: bool = True) -> list[Block]:
    """All blocks of a report.

    Args:
        tasks: The tasks.
        title: Above the page.
        progress: Whether to show a bar.
    """
    methods = [method for task in tasks for method in task.methods]
    count = sum(len(method.runs) for method in methods)
    blocks: list[Block] = [
        Heading(title, 1),
        Text(f"{_counted(count, 'run')} of {_counted(len(methods), 'method')} on {_counted(len(tasks), 'task')}; "
             f"written {datetime.now():%Y-%m-%d %H:%M} by lightning-prompts report. Baseline: "
             f"{', '.join(dict.fromkeys(task.baseline.name for task in tasks))}."),
    ]  # fmt: skip
    for number, task in enumerate(
        track(tasks, "Writing the report", disable=not progress, transient=True, console=Console(stderr=True))
    ):
        if len(tasks) > 1:
            blocks.append(Heading(task.name, 2))
        blocks += section(task, f"t{number}", 3 if len(tasks) > 1 else 2)
    return [
        *blocks,
        *_configs(tasks),
        *_environments(methods),
        Heading("How the numbers were made", 2),
        *map(Text, NOTES),
    ]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _configs(tasks: Sequence[Task]) -> list[Block]:
    """Only what differs, task by task."""
    blocks: list[Block] = []
    for task in tasks:
        known = [(method, found) for method in task.methods if (found := _settings(method))]
        without = lacking(task, "config.yaml", lambda run: run.settings is not None)
        keys = list(dict.fromkeys(key for _, settings in known for key in settings))
        differing = [key for key in keys if _differs([settings for _, settings in known], key)]
        if len(tasks) > 1 and (differing or without):
            blocks.append(Heading(task.name, 3))
        for part in parts(known, COLUMNS) if differing else ():
            rows = [[key, *(_value(settings, key) for _, settings in part)] for key in differing]
            rows = [row for row in rows if set(row[1:]) != {NONE}]
            blocks.append(Table(["setting", *(method.name for method, _ in part)], rows, texts=1 + len(part)))
        blocks += without
        if not without and not differing and len(known) > 1:
            blocks.append(Text(f"{task.name}: the configs are the same.", note=True))
    intro = Text(
        "Settings in which the methods' configs differ. Left out are seeds, folders, and what one method lacks and the "
        "others have switched off."
    )
    return [Heading("Differences of the configs", 2), intro, *blocks] if blocks else []


def _settings(method: Method) -> Settings | None:
    """What was run, and whether that was trained: the same config can be tested as it is."""
    run = next((run for run in method.runs if run.settings), None)
    return {"trained": run.trained, **without_seeds(run.settings or {})} if run else None


def _differs(configs: Sequence[Settings], key: str) -> bool:
    """What one lacks is no difference to what is off in another."""
    found = {_value(settings, key) for settings in configs if settings.get(key) not in (None, False, "", 0)}
    return len(found) > 1 or (len(found) == 1 and any(not settings.get(key) for settings in configs))


def _value(settings: Settings, key: str) -> str:
    if key not in settings:
        return NONE
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _environments(methods: Sequence[Method]) -> list[Block]:
    """Each different one once, and who ran in it."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    without = []
    for method in methods:
        for run in method.runs:
            if run.environment is None:
                without.append(method.name)
            else:
                found.setdefault(json.dumps(run.environment, sort_keys=True), (run.environment, []))[1].append(
                    method.name
                )
    blocks: list[Block] = [Heading("Environment", 2)]
    keys = list(dict.fromkeys(key for environment, _ in found.values() for key in environment))
    for part in parts(list(found.values()), COLUMNS):
        header = ["", *(", ".join(dict.fromkeys(names)) if len(found) > 1 else "all" for _, names in part)]
        if without and len(found) == 1:
            header[1] = ", ".join(dict.fromkeys(part[0][1]))
        rows = [[key, *(_value(environment, key) for environment, _ in part)] for key in keys]
        blocks.append(Table(header, rows, texts=len(header)))
    if without:
        blocks.append(Text(f"Without environment.json: {', '.join(dict.fromkeys(without))}.", note=True))
    return blocks
