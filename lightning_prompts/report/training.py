"""How training went, and what it has cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lightning_prompts.report import charts
from lightning_prompts.report.blocks import Block, Picture, Pictures, Table
from lightning_prompts.report.charts import Curve, Look, Spot, thinned
from lightning_prompts.report.common import METRICS, lacking
from lightning_prompts.report.methods import MAIN, Method, Task
from lightning_prompts.report.numbers import NONE, amount
from lightning_prompts.report.statistics import Values
from lightning_prompts.report.theme import SERIES
from lightning_prompts.runs.reader import Run

HEADINGS = {"memory_gb": "memory, GB"}  # the others are their names in words


def curves(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """Training and validation over time."""
    logged = [method for method in task.methods if any(run.curves for run in method.runs)]
    if not logged:
        return []
    by_tokens = all("budget/tokens" in run.curves for method in logged for run in method.runs if run.curves)
    wanted = (("train/nll", "NLL of training batches", False), ("val/nll", "NLL on validation", False),
              ("val/exact_match", "exact match on validation", True))  # fmt: skip
    pictures = []
    for name, title, percent in wanted:
        lines = [line for method in logged if (line := _curve(method, looks[method.name], name, by_tokens))]
        if lines:
            label = "training tokens through the LM" if by_tokens else "training steps"
            pictures.append(
                Picture(
                    f"{prefix}-{name.replace('/', '-')}",
                    charts.curves(title, lines, label, percent),
                    f"{title} over time",
                )
            )
    some = len(task.methods) > len(SERIES)
    caption = (
        "A line is the mean over seeds, its band goes from the smallest seed to the largest, dots lead to its name; "
        "lines of more than 40 points are means of neighbours."
        + (" The best by test NLL and the baseline have colours." if some else "")
    )
    missing = lacking(
        task, "logs/version_*/metrics.csv though trained", lambda run: bool(run.curves) or not run.trained
    )
    return [Pictures(pictures, caption), *missing] if pictures else missing


def _curve(method: Method, look: Look, name: str, by_tokens: bool) -> Curve | None:
    """Mean and range over seeds, as far as all of them have come."""
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
    """Tokens are logged every few steps, validation in between."""
    points = {0: 0.0, **run.curves["budget/tokens"]}
    known = sorted(points)
    return np.interp(steps, known, [points[step] for step in known])


def cost(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """What training has cost, and what it was good for."""
    names = list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.budget))
    if not names:
        return []
    pictures = []
    for (name, title, percent), paid in itertools.product(METRICS, ("tokens", "seconds")):
        spots = [spot for method in task.methods if (spot := _spot(method, looks[method.name], f"{MAIN}/{name}", paid))]
        if any(spot.cost for spot in spots):
            label = {"tokens": "training tokens through the LM", "seconds": "seconds of training"}[paid]
            picture = charts.costs(title if percent else f"{title} (nats per answer token)", spots, label, percent)
            pictures.append(Picture(f"{prefix}-{paid}-{name}", picture, f"{title} of each method by its {label}"))
    rows = [[method.name, *(_cost_cell(method.cost(name)) for name in names)] for method in task.methods]
    caption = (
        "A large mark is the mean over seeds, small ones are seeds. A dashed line across: not trained. Validation is "
        "not counted; seconds depend on the machine and on what else it did."
    )
    header = ["method", *(HEADINGS.get(name, name.replace("_", " ")) for name in names)]
    return [
        *([Pictures(pictures, caption)] if pictures else []), Table(header, rows),
        *lacking(task, "budget.json though trained", lambda run: bool(run.budget) or not run.trained),
    ]  # fmt: skip


def _spot(method: Method, look: Look, metric: str, paid: str) -> Spot | None:
    """Runs that have both figures; methods without training have cost nothing."""
    good = [run for run in method.runs if np.isfinite(run.metrics.get(metric, np.nan))]
    known = [run for run in good if run.budget.get(paid)]
    if not known and any(run.trained for run in method.runs):
        return None
    chosen = known or good
    if not chosen:
        return None
    return Spot(method.name, look, [run.budget[paid] for run in known], [run.metrics[metric] for run in chosen])


def _cost_cell(numbers: Sequence[float]) -> str:
    if not numbers:
        return NONE
    low, high = amount(min(numbers)), amount(max(numbers))
    return amount(sum(numbers) / len(numbers)) + (f" ({low}–{high})" if low != high else "")
