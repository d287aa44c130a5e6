"""The sections on how training went, and what it cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lightning_prompts.report import charts
from lightning_prompts.report.charts import SERIES, Curve, Look, Result, thinned
from lightning_prompts.report.data import MAIN, METRICS, Method, Metric, Task
from lightning_prompts.report.page import NONE, Block, Picture, Pictures, Table, amount, lacking
from lightning_prompts.report.statistics import Values
from lightning_prompts.runs.names import BUDGET, CURVES, LOGS
from lightning_prompts.runs.reader import Run


def learning_curves(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """Training and validation over time."""
    logged = [method for method in task.methods if any(run.curves for run in method.runs)]
    by_tokens = all("budget/tokens" in run.curves for method in logged for run in method.runs if run.curves)
    label = "training tokens through the LM" if by_tokens else "training steps"
    pictures = []
    for name, title, percent in (
        ("train/nll", "NLL of training batches", False),
        ("val/nll", "NLL on validation", False),
        ("val/exact_match", "exact match on validation", True),
    ):
        lines = [line for method in logged if (line := _curve(method, looks[method.name], name, by_tokens))]
        if lines:
            picture = charts.curves(title, lines, label, percent)
            pictures.append(Picture(f"{prefix}-{name.replace('/', '-')}", picture, f"{title} over time"))
    caption = (
        "A line is the mean over seeds, its band goes from the smallest seed to the largest; lines of more than 40 "
        "points are means of neighbours."
        + (" Only the best methods and the baseline have colours." if len(task.methods) > len(SERIES) else "")
    )
    missing = lacking(f"{LOGS}/version_*/{CURVES} though trained", task.lacking_if_trained(lambda run: run.curves))
    return [Pictures(pictures, caption), *missing] if pictures else missing if logged else []


def _curve(method: Method, look: Look, name: str, by_tokens: bool) -> Curve | None:
    """Mean and range over seeds, up to the point that all seeds have reached."""
    runs = [run for run in method.runs if name in run.curves]
    if not runs:
        return None
    # Point by point: with a budget, the last step of one seed is not that of another.
    count = min(len(run.curves[name]) for run in runs)
    steps = np.array([sorted(run.curves[name])[:count] for run in runs])
    y = np.array([[run.curves[name][step] for step in row] for run, row in zip(runs, steps.tolist(), strict=True)])
    x = np.mean([_tokens_at(run, row) if by_tokens else row for run, row in zip(runs, steps, strict=True)], axis=0)
    known = np.isfinite(y).all(0)
    if not known.any():
        return None
    rows = np.stack([thinned(row[known]) for row in y])
    return Curve(method.name, look, thinned(x[known]), rows.mean(0), rows.min(0), rows.max(0))


def _tokens_at(run: Run, steps: Values) -> Values:
    """Interpolate the tokens at validation steps: they are logged every few steps."""
    points = {0: 0.0, **run.curves["budget/tokens"]}
    known = sorted(points)
    return np.interp(steps, known, [points[step] for step in known])


def costs(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """The cost of training, and the quality that it bought."""
    names = list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.budget))
    if not names:
        return []
    pictures = []
    labels = {"tokens": "training tokens through the LM", "seconds": "seconds of training"}
    for metric, (paid, label) in itertools.product(METRICS, labels.items()):
        spots = [spot for method in task.ranked if (spot := _spot(method, looks[method.name], metric, paid))]
        if any(spot.cost for spot in spots):
            picture = charts.costs(metric.title_with_unit, spots, label, metric.percent)
            alt = f"{metric.title} of each method by its {label}"
            pictures.append(Picture(f"{prefix}-{paid}-{metric.name}", picture, alt))
    rows = [[method.name, *(_cost_cell(method.cost(name)) for name in names)] for method in task.ranked]
    caption = (
        "A large mark is the mean over seeds, small ones are seeds. A dashed line across: not trained. The grey line "
        "is the Pareto frontier: no method on it is beaten by one that costs less. Validation is not counted; seconds "
        "depend on the machine and its load."
    )
    header = ["method", *("memory, GB" if name == "memory_gb" else name.replace("_", " ") for name in names)]
    missing = lacking(f"{BUDGET} though trained", task.lacking_if_trained(lambda run: run.budget))
    return [*([Pictures(pictures, caption)] if pictures else []), Table(header, rows), *missing]


def _spot(method: Method, look: Look, metric: Metric, paid: str) -> Result | None:
    """Collect the runs that have both cost and quality; without training there is no cost."""
    name = f"{MAIN}/{metric.name}"
    good = [run for run in method.runs if np.isfinite(run.metrics.get(name, np.nan))]
    known = [run for run in good if run.budget.get(paid)]
    chosen = known or ([] if method.trained else good)
    if not chosen:
        return None
    cost = [run.budget[paid] for run in known]
    return Result(method.name, look, [run.metrics[name] for run in chosen], cost=cost)


def _cost_cell(numbers: Sequence[float]) -> str:
    if not numbers:
        return NONE
    low, high = amount(min(numbers)), amount(max(numbers))
    return amount(sum(numbers) / len(numbers)) + (f" ({low}–{high})" if low != high else "")
