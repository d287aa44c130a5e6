"""How a notebook shows runs and comparisons: as tables and charts."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from lightning_prompts.runs.reader import Run

if TYPE_CHECKING:
    from lightning_prompts.report.charts import Curve

SHARES = ("exact_match", "accuracy")  # metrics shown as percentages
MAIN = ("exact_match", "nll")


def shown(metric: str, value: float, deviation: float = 0.0) -> str:
    """A metric with its standard deviation.

    >>> shown("test/exact_match", 0.8149999976), shown("nll", 1.5, 0.25)
    ('81.5%', '1.500 ± 0.250')
    """
    if not math.isfinite(value):
        return str(value)
    name = metric.rpartition("/")[2]
    if name == "examples":
        return f"{value:.0f}"
    if name in SHARES:
        return f"{value:.1%}" + (f" ± {deviation:.1%}" if deviation else "")
    return f"{value:.3f}" + (f" ± {deviation:.3f}" if deviation else "")


def run_text(run: Run) -> str:
    """A run in one line."""
    found = [(name, run.metrics[f"test/{name}"]) for name in reversed(MAIN) if f"test/{name}" in run.metrics]
    results = ", ".join(f"test {name.replace('_', ' ')} {shown(name, value)}" for name, value in found) or "not tested"
    return f"<{run.class_name} in {run.folder}: {results}>"


def split_and_metric(name: str) -> tuple[str, str]:
    """Take the name of a logged metric apart.

    >>> split_and_metric("test/two/nll"), split_and_metric("test/predicted/yes")
    (('test/two', 'nll'), ('test', 'predicted/yes'))
    """
    split, found, label = name.partition("/predicted/")
    if found:
        return split, f"predicted/{label}"
    split, _, metric = name.rpartition("/")
    return split, metric


def run_html(run: Run) -> str:
    """The prompt, the table of test metrics, and the learning curves of a run."""
    parts = [f"<h4>{escape(str(run.class_name))} in {escape(str(run.folder))}</h4>"]
    if run.text:
        parts.append(f'<p>Prompt:</p><pre style="white-space: pre-wrap">{escape(run.text)}</pre>')
    sets: dict[str, dict[str, str]] = {}
    for name, value in run.metrics.items():
        split, metric = split_and_metric(name)
        if split.partition("/")[0] == "test" and not metric.startswith("predicted/"):
            sets.setdefault(split, {})[metric] = shown(metric, value)
    parts.append(table_html("test set", sets) if sets else "<p>Not tested yet: call <code>test()</code>.</p>")
    return "".join(parts) + _curves_html(run)


def table_html(first: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a row per name.

    Args:
        first: Title of the first column.
        rows: By name, the cells by the titles of their columns.
    """
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    head = "".join(f"<th>{escape(title)}</th>" for title in (first, *columns))
    body = ""
    for name, cells in rows.items():
        values = "".join(f"<td>{escape(cells.get(column, ''))}</td>" for column in columns)
        body += f"<tr><th>{escape(name)}</th>{values}</tr>"
    return f'<div style="overflow-x: auto"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars_html(values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Bars of the methods, with a dot per seed. A method with a seed that is not finite has no bar.

    Args:
        values: By metric, the values over seeds by method.
    """
    from lightning_prompts.report import charts  # matplotlib takes a second

    made = []
    for metric, methods in values.items():
        items = [
            charts.Result(name, charts.Look(place), seeds)
            for place, (name, seeds) in enumerate(methods.items())
            if place < len(charts.SERIES) and seeds and all(map(math.isfinite, seeds))
        ]
        title = "NLL (nats per answer token)" if metric == "nll" else metric.replace("_", " ")
        if items:
            made.append(_image(charts.bars(title, items, metric in SHARES), title))
    return "".join(made)


def _curves_html(run: Run) -> str:
    from lightning_prompts.report import charts

    def curve(name: str, place: int) -> list[Curve]:
        points = {step: value for step, value in sorted(run.curves.get(name, {}).items()) if math.isfinite(value)}
        x, y = np.array(list(points), float), np.array(list(points.values()), float)
        return [charts.Curve(name, charts.Look(place), x, y, y, y)] if len(points) > 1 else []

    nll = curve("train/nll", 0) + curve("val/nll", 1)
    share = next((found for name in reversed(SHARES) if (found := curve(f"val/{name}", 1))), [])
    made = [_image(charts.curves("NLL", nll, "step", percent=False), "NLL by step")] if nll else []
    made += [_image(charts.curves("validation", share, "step", percent=True), "validation by step")] if share else []
    return "".join(made)


def _image(svg: str, title: str) -> str:
    """A chart apart from the page, so that its style does not change the page's."""
    style = "svg { background: var(--page) }"
    data = base64.b64encode(svg.replace("<style>", f"<style>{style}", 1).encode()).decode()
    return f'<img alt="{escape(title)}" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">'
