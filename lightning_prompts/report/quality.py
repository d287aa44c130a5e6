"""The sections on how good the methods are: summary, further test sets and metrics, and paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lightning_prompts.report import charts
from lightning_prompts.report.charts import Look, Result
from lightning_prompts.report.data import MAIN, METRICS, PAIRED, Method, Metric, Task, questions, values
from lightning_prompts.report.page import (
    COLUMNS,
    NONE,
    Block,
    Picture,
    Pictures,
    Table,
    Text,
    difference,
    interval,
    lacking,
    p_value,
    side_by_side,
    spread,
)
from lightning_prompts.report.statistics import bootstrap, over_seeds
from lightning_prompts.runs import names


def summary(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """The table and the bars, the best method first."""
    missing = lacking(f"{names.METRICS} or {names.PREDICTIONS}", task.lacking(lambda run: bool(run.metrics)))
    methods = [method for method in task.ranked if method in task.scored]
    if not methods:
        return missing
    several = any(len(method.runs) > 1 for method in methods)
    header = ["method"]
    for metric in METRICS:
        header += [metric.title, *(["95% over seeds"] if several else []), "95% over questions"]
    rows = []
    shown: dict[Metric, list[Result]] = {metric: [] for metric in METRICS}
    for method in methods:
        row = [f"{method.name} (baseline)" if method is task.baseline and len(methods) > 1 else method.name]
        for metric in METRICS:
            found = method.values(f"{MAIN}/{metric.name}")
            finite = method.mean(f"{MAIN}/{metric.name}") is not None
            seeds = over_seeds(found) if finite else None
            # An interval of the finite rows alone would not be that of the mean in the table.
            asked = _over_questions(method, metric) if finite else None
            ends = [*([interval(seeds, metric.percent)] if several else []), interval(asked, metric.percent)]
            row += [spread(found, metric.percent), *ends]
            if finite:
                shown[metric].append(Result(method.name, looks[method.name], found, seeds or asked, seeds is not None))
        scored = sum(bool(run.metrics) for run in method.runs)
        counts = [f"{int(count):,}" for count in sorted(method.values(f"{MAIN}/examples"))]
        of_all = f"{scored}" if scored == len(method.runs) else f"{scored} of {len(method.runs)}"
        rows.append([*row, of_all, "–".join(dict.fromkeys((counts[0], counts[-1]))) if counts else NONE])
    pictures = []
    for metric, bars in shown.items():
        if bars:
            alt = f"{metric.title} of each method with its 95% interval"
            picture = charts.bars(metric.title_with_unit, bars, metric.percent)
            pictures.append(Picture(f"{prefix}-bars-{metric.name}", picture, alt))
    caption = (
        "Dots are seeds; a thick whisker is the 95% interval over seeds (t), a thin one, for single runs, that over "
        "questions (bootstrap). An arrow shows that the interval goes on, see the table."
    )
    text = (
        "Exact match is a share of the questions, higher is better; NLL is in nats per answer token, lower is better. "
        f"Means ± standard deviation over seeds. Best {task.metric.title} first, the baseline in grey; a click on a "
        "column's name sorts by it."
    )
    grey = methods.index(task.baseline) if task.baseline in methods and len(methods) > 1 else None
    table = Table([*header, "seeds", "questions"], rows, grey=grey)
    return [Text(text), table, *missing, Pictures(pictures, caption)]


def _over_questions(method: Method, metric: Metric) -> tuple[float, float] | None:
    found = values(method.rows, metric.field)
    return (
        bootstrap(np.array(list(found.values())), np.random.default_rng(0), questions(list(found))) if found else None
    )


def _metric_names(task: Task) -> list[str]:
    return list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.metrics))


def other_sets(task: Task) -> tuple[list[str], list[str]]:
    """Find the further test sets: the datasets of a mixture, and those out of distribution."""
    ends = tuple(f"/{metric.name}" for metric in METRICS)
    sets = dict.fromkeys(name.rpartition("/")[0] for name in _metric_names(task) if name.endswith(ends))
    sets.pop(MAIN, None)
    settings = [method.settings or {} for method in task.methods]
    members = [name for name in sets if any(f"data.members.{name.removeprefix('test/')}" in one for one in settings)]
    return members, [name for name in sets if name not in members]


def sets_table(task: Task, sets: Sequence[str]) -> list[Block]:
    """Write the tables of further test sets."""
    columns = []
    for name, metric in itertools.product(sets, METRICS):
        columns.append((f"{name}/{metric.name}", f"{name.removeprefix('test/')}: {metric.title}", metric.percent))
    return _metric_tables(task, columns)


def other_metrics(task: Task) -> list[Block]:
    """Other metrics of the main test set, unless they repeat exact match."""
    usual = {f"{MAIN}/{name}" for name in ("nll", "exact_match", "examples")}
    names = [name for name in _metric_names(task) if name.count("/") == 1 and name.startswith(f"{MAIN}/")]
    names = [name for name in names if name not in usual and not _repeats(task, name, f"{MAIN}/exact_match")]
    return _metric_tables(task, [(name, name.removeprefix("test/"), False) for name in names])


def _repeats(task: Task, name: str, other: str) -> bool:
    """Whether two metrics are the same number in every run, as accuracy is where all answers are classes."""
    found = [run.metrics for method in task.methods for run in method.runs if name in run.metrics]
    return all(other in metrics and math.isclose(metrics[name], metrics[other], abs_tol=1e-6) for metrics in found)


def _metric_tables(task: Task, columns: Sequence[tuple[str, str, bool]]) -> list[Block]:
    """Write tables of metrics, each with its title and whether it is a share."""
    blocks: list[Block] = []
    known = set(_metric_names(task))
    for part in side_by_side([column for column in columns if column[0] in known], COLUMNS + 1):
        cells = [[spread(method.values(name), percent) for name, _, percent in part] for method in task.ranked]
        rows = [[method.name, *row] for method, row in zip(task.ranked, cells, strict=True) if set(row) != {NONE}]
        blocks.append(Table(["method", *(title for _, title, _ in part)], rows))
    return blocks


def differences(task: Task) -> list[Block]:
    """A table of the compared pairs for each metric."""
    missing = lacking(names.PREDICTIONS, task.lacking(lambda run: run.predictions is not None))
    found = [method for method in task.methods if method.rows]
    if len(found) < 2:
        return missing if len(task.methods) > 1 else []
    blocks: list[Block] = [
        Text(
            "Each row is one method less the one that it is compared with, on the rows of "
            f"{names.PREDICTIONS} that both have (the baseline, {task.baseline.name}, first): positive exact match and "
            "negative NLL mean that the first is better. The p-value is that of a paired permutation test over "
            "questions, two-sided; Holm's is adjusted for the number of rows in the table. Both are about these "
            "prompts on other questions, not about other seeds."
            + (
                f" Of more than {PAIRED} methods each is compared with the baseline alone."
                if len(found) > PAIRED
                else ""
            )
        )
    ]
    for metric in METRICS:
        rows = []
        for mine, other in task.pairs:
            result = task.comparison(metric, mine, other)
            if result is None:
                rows.append([mine.name, other.name, "none in common", *[NONE] * 4])
                continue
            ends = interval(result.interval, metric.percent, signed=True)
            p_values = [p_value(result.p_value), p_value(result.adjusted, result.p_value)]
            change = difference(result.difference, metric.percent)
            rows.append([mine.name, other.name, f"{result.count:,}", change, ends, *p_values])
        unit = f"{metric.title}, points" if metric.percent else metric.title
        header = ["method", "against", "rows in common", unit, "95%", "p", "p (Holm)"]
        if any(row[3] != NONE for row in rows):
            blocks.append(Table(header, rows, texts=2))
    strange = []
    for method in found:
        rows_of = itertools.chain.from_iterable(method.rows.values())
        if count := sum(row.nll is not None and not math.isfinite(row.nll) for row in rows_of):
            strange.append(f"{method.name} ({count:,})")
    if strange:
        blocks.append(Text(f"Rows with an NLL that is not finite are left out: {', '.join(strange)}.", "note"))
    return [*blocks, *missing]
