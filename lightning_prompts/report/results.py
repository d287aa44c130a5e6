"""How good the methods are: the table, the bars, further test sets, and pairs of methods."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lightning_prompts.report.blocks import Block, Picture, Pictures, Table, Text
from lightning_prompts.report.charts import Bar, Look, bars
from lightning_prompts.report.common import COLUMNS, FIELDS, METRICS, lacking, parts
from lightning_prompts.report.methods import MAIN, Method, Task
from lightning_prompts.report.numbers import NONE, difference, interval, p_value, spread
from lightning_prompts.report.pairs import questions, values
from lightning_prompts.report.statistics import bootstrap, holm, over_seeds

PAIRED = 12  # methods at most of which all pairs are compared


def summary(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """The table and the bars."""
    missing = lacking(task, "metrics.json or predictions.jsonl", lambda run: bool(run.metrics))
    methods = [method for method in task.methods if any(method.values(f"{MAIN}/{name}") for name, _, _ in METRICS)]
    if not methods:
        return missing
    several = any(len(method.runs) > 1 for method in methods)
    header = ["method", "seeds"]
    for _, title, _ in METRICS:
        header += [title, *(["95% over seeds"] if several else []), "95% over questions"]
    rows, pictures = [], []
    shown: dict[str, list[Bar]] = {name: [] for name, _, _ in METRICS}
    for method in methods:
        scored = sum(bool(run.metrics) for run in method.runs)
        row = [method.name, f"{scored}" if scored == len(method.runs) else f"{scored} of {len(method.runs)}"]
        for name, _, percent in METRICS:
            found = method.values(f"{MAIN}/{name}")
            seeds = over_seeds(found) if np.isfinite(found).all() else None
            # The mean of what is finite is not what the table has.
            asked = _over_questions(method, name) if np.isfinite(found).all() else None
            row += [spread(found, percent), *([interval(seeds, percent)] if several else []), interval(asked, percent)]
            if found and np.isfinite(found).all():
                shown[name].append(Bar(method.name, looks[method.name], found, seeds or asked, seeds is not None))
        rows.append([*row, _range(method.values(f"{MAIN}/examples"))])
    for name, title, percent in METRICS:
        if shown[name]:
            picture = bars(title if percent else f"{title} (nats per answer token)", shown[name], percent)
            pictures.append(Picture(f"{prefix}-bars-{name}", picture, f"{title} of each method with its 95% interval"))
    caption = ("Dots are seeds; a thick whisker is the 95% interval over seeds (t), a thin one, for single runs, that "
               "over questions (bootstrap). An arrow: it goes on, see the table.")  # fmt: skip
    return [
        Text("NLL is in nats per answer token, lower is better; exact match is a share of the questions, higher is "
             "better. Means ± standard deviation over seeds."),
        Table([*header, "questions"], rows), *missing, Pictures(pictures, caption),
    ]  # fmt: skip


def _not_finite(method: Method) -> int:
    rows = itertools.chain.from_iterable(method.rows.values())
    return sum(row.nll is not None and not math.isfinite(row.nll) for row in rows)


def _range(numbers: Sequence[float]) -> str:
    ends = sorted({int(number) for number in numbers})
    return NONE if not ends else f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,}–{ends[-1]:,}"


def _over_questions(method: Method, name: str) -> tuple[float, float] | None:
    found = values(method.rows, FIELDS[name])
    if not found:
        return None
    return bootstrap(np.array(list(found.values())), np.random.default_rng(0), questions(list(found)))


def _in_common(nll: int, match: int) -> str:
    """How many rows a pair shares; servers without log-probabilities give no NLL, and unanswered rows no match."""
    if nll == match:
        return f"{nll:,}" if nll else "none in common"
    return f"{nll:,} (NLL), {match:,} (exact match)"


def further(task: Task) -> list[Block]:
    """Test sets out of distribution, members of mixtures, and other metrics of the main test set."""
    names = list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.metrics))
    sets = [name.removesuffix("/nll") for name in names if name.endswith("/nll") and name != f"{MAIN}/nll"]
    usual = {f"{MAIN}/{name}" for name in ("nll", "exact_match", "examples")}
    others = [name for name in names if name.count("/") == 1 and name.startswith(f"{MAIN}/") and name not in usual]
    blocks: list[Block] = []
    for name, title, percent in METRICS:
        columns = [f"{place}/{name}" for place in sets]
        blocks += _metric_tables(task, columns, [f"{place.removeprefix('test/')}: {title}" for place in sets], percent)
    return blocks + _metric_tables(task, others, [name.removeprefix("test/") for name in others], False)


def _metric_tables(task: Task, columns: Sequence[str], titles: Sequence[str], percent: bool) -> list[Block]:
    blocks: list[Block] = []
    for part in parts(list(zip(columns, titles, strict=True)), COLUMNS + 1):
        rows = [[method.name, *(spread(method.values(name), percent) for name, _ in part)] for method in task.methods]
        rows = [row for row in rows if set(row[1:]) != {NONE}]
        blocks.append(Table(["method", *(title for _, title in part)], rows))
    return blocks


def differences(task: Task) -> list[Block]:
    """Every pair of methods."""
    missing = lacking(task, "predictions.jsonl", lambda run: run.predictions is not None)
    found = [method for method in task.methods if method.rows]
    if len(found) < 2:
        return missing if len(task.methods) > 1 else []
    ordered = sorted(found, key=lambda method: method is not task.baseline)
    pairs = [(mine, other) for other, mine in itertools.combinations(ordered, 2)]
    if len(found) > PAIRED:
        pairs = [(mine, ordered[0]) for mine in ordered[1:]]
    columns: list[list[list[str]]] = []
    counts: list[list[int]] = []
    for name, _, percent in METRICS:
        compared = [mine.against(other, FIELDS[name]) for mine, other in pairs]
        adjusted = iter(holm([result.p_value for result in compared if result]))
        columns.append(
            [
                [difference(result.difference, percent), interval(result.interval, percent, signed=True),
                 p_value(result.p_value), p_value(next(adjusted))]
                if result else [NONE] * 4
                for result in compared
            ]
        )  # fmt: skip
        counts.append([result.count if result else 0 for result in compared])
    rows = [
        [mine.name, other.name, _in_common(*count), *nll, *match]
        for (mine, other), count, nll, match in zip(pairs, zip(*counts, strict=True), *columns, strict=True)
    ]
    strange = [f"{method.name} ({count:,})" for method in found if (count := _not_finite(method))]
    if strange:
        missing = [Text(f"Left out are rows whose NLL is not finite: {', '.join(strange)}.", note=True), *missing]
    header = ["method", "against", "rows in common", "NLL", "95%", "p", "p (Holm)", "exact match, points", "95%", "p",
              "p (Holm)"]  # fmt: skip
    text = (
        "Each row is one method less the one that it is held against, on the rows of predictions.jsonl that both have "
        f"(the baseline, {task.baseline.name}, first): negative NLL and positive exact match mean that the first is "
        "better. The p-value is that of a paired permutation test over questions, two-sided; Holm's is adjusted for "
        "the number of rows in the table. Both are about these prompts on other questions, not about other seeds."
        + (f" Of more than {PAIRED} methods each is held against the baseline alone." if len(found) > PAIRED else "")
    )
    return [Text(text), Table(header, rows, texts=2), *missing]
