"""The sections of a page. A section that has nothing to say is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from lightning_prompts.report.answers import samples, side_by_side_answers
from lightning_prompts.report.charts import SERIES, Look
from lightning_prompts.report.comparability import config_differences, environments, unequal_settings
from lightning_prompts.report.data import Task
from lightning_prompts.report.page import Block, Heading, Text
from lightning_prompts.report.prompts import prompts
from lightning_prompts.report.quality import differences, other_metrics, other_sets, sets_table, summary
from lightning_prompts.report.statistics import DRAWS, EXACT
from lightning_prompts.report.training import costs, learning_curves
from lightning_prompts.report.verdict import validation_warnings, verdict

NOTES = (
    "Over seeds: mean ± the 97.5% quantile of Student's t (seeds - 1 degrees of freedom) times the standard error. It "
    "tells about runs with other seeds: other splits, initial prompts and orders of batches. With two or three seeds "
    "it is wide, as it should be. Shares are cut at 0 and 1.",
    f"Over questions: percentiles of {DRAWS:,} bootstrap samples (Efron 1979) of the questions of all seeds. A "
    "question that is in the test sets of several seeds is drawn with all its rows. It tells about other questions, "
    "with these prompts.",
    "p: paired permutation test. Under the hypothesis that two methods do not differ, they can be swapped within each "
    f"question; p is the share of {DRAWS:,} random swaps (of all, if at most {EXACT} questions differ) that make "
    "the mean difference at least as large, counting the one that was found. So random swaps give no p below 0.0001. "
    "Rows are matched by seed, test set, question and answer, or where two methods have no seed in common by all of "
    "these but the seed, each row's mean over the method's seeds; a row that a test set holds twice is two rows; rows "
    "of the same question are swapped together. Random draws start at the same seed every time: the same runs give the "
    "same page.",
    "p (Holm): the same, multiplied step by step for the number of pairs in the table (Holm 1979). A difference is "
    "called established where it is below 0.05.",
    "NLL: mean negative log-likelihood of an answer's tokens in nats, averaged over examples. Exact match: the greedy "
    "generation, cut where the task says, is the answer. Training NLL is that of the batches as they came.",
    "Cost: tokens of prompts, texts and answers that training ran through the LM, with a gradient and without one; "
    "tokens that servers read and wrote (remote); calls: texts scored, read or written; passes: forward passes of the "
    "LM; memory: the most that was held at a time.",
)


def report(tasks: Sequence[Task], title: str, track: Callable[[Sequence[Task]], Iterator[Task]] = iter) -> list[Block]:
    """Write a report.

    Args:
        tasks: The tasks.
        title: Above the page.
        track: Shows progress over the tasks.

    Returns:
        The page.
    """
    methods = [method for task in tasks for method in task.methods]
    runs = sum(len(method.runs) for method in methods)
    baselines = ", ".join(dict.fromkeys(task.baseline.name for task in tasks))
    counts = f"{_counted(runs, 'run')} of {_counted(len(methods), 'method')} on {_counted(len(tasks), 'task')}"
    written = f"written {datetime.now():%Y-%m-%d %H:%M} by lightning-prompts report"
    blocks: list[Block] = [Heading(title, 1), Text(f"{counts}; {written}. Baseline: {baselines}.")]
    for number, task in enumerate(track(tasks)):
        if len(tasks) > 1:
            blocks.append(Heading(task.name, 2))
        blocks += _task(task, f"t{number}", 3 if len(tasks) > 1 else 2)
    if changed := config_differences(tasks):
        blocks += [Heading("Differences of the configs", 2), *changed]
    blocks += [Heading("Environment", 2), *environments(methods)]
    return [*blocks, Heading("How the numbers were made", 2), *map(Text, NOTES)]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _task(task: Task, prefix: str, level: int) -> list[Block]:
    """Write everything about a task; ``prefix`` begins the names of its pictures."""
    look = _looks(task)
    blocks: list[Block] = [*verdict(task)]
    if lines := unequal_settings(task):
        blocks.append(Text(f"These methods were not compared on equal terms. {' '.join(lines)}", "warning"))
    blocks += [Text(line, "warning") for line in validation_warnings(task)]
    members, others = other_sets(task)
    sections = {
        "Summary": summary(task, look, prefix),
        "Datasets of the mixture": sets_table(task, members),
        "Out-of-distribution test sets": sets_table(task, others),
        "Other metrics": other_metrics(task),
        "Learning curves": learning_curves(task, look, prefix),
        "Cost against quality": costs(task, look, prefix),
        "Differences, question by question": differences(task),
        "Prompts": prompts(task, prefix),
        "Answers side by side": side_by_side_answers(task),
        "Answers during training": samples(task),
    }
    for title, made in sections.items():
        if made:
            blocks += [Heading(title, level), *made]
    return blocks


def _looks(task: Task) -> dict[str, Look]:
    """Give each method a colour; if there are too few, the best and the baseline have one."""
    methods = list(task.methods)
    if len(methods) > len(SERIES):
        best = sorted(task.ranked, key=lambda method: method is not task.baseline)[: len(SERIES)]
        methods = [method for method in methods if method in best]
    places = {method.name: place for place, method in enumerate(methods)}
    return {method.name: Look(places.get(method.name)) for method in task.methods}
