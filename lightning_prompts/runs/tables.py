"""Tables that compare runs, as Markdown: means and standard deviations over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import load_yaml

Results = dict[str, list[float]]  # a metric's values by seed
Key = tuple[str, str]  # a task (empty if the configs name their data) and a method


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds.

    >>> cell([0.5, 0.7], 2)
    '0.60 ± 0.14'
    >>> cell([0.5], 2)
    '0.50'
    >>> cell([0.5, math.nan], 2)
    'nan'
    """
    several = len(values) > 1 and all(map(math.isfinite, values))
    spread = f" ± {statistics.stdev(values):.{digits}f}" if several else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _filled(values: Sequence[float] | None, digits: int) -> str:
    """A cell; a dash without values, as for the NLL of answers from a server without log-probabilities."""
    return cell(values, digits) if values else "-"


def by_metric(results: Sequence[Mapping[str, float]]) -> Results:
    """The results of several seeds by metric, for metrics that all of them have.

    >>> by_metric([{"test/nll": 2.0, "seconds": 5.0}, {"test/nll": 1.0}])
    {'test/nll': [2.0, 1.0]}
    """
    shared = [key for key in results[0] if all(key in result for result in results)]
    return {key: [result[key] for result in results] for key in shared}


def check_metric(found: Mapping[Key, Results], metric: str) -> None:
    """Check that some run has the metric, if there are results.

    Raises:
        UserError: There are results, and none has the metric.
    """
    known = list(dict.fromkeys(name for results in found.values() for name in results))
    if known and metric not in known:
        raise UserError(f"no run has the metric {metric!r}; {nearest(metric, known)}")


def ranked(found: Mapping[Key, Results], metric: str, mode: str) -> dict[Key, Results]:
    """Sort results task by task, the best first and those without the metric last.

    Args:
        found: The results.
        metric: Sort by the mean of this metric over seeds.
        mode: ``min`` if lower is better, ``max`` if higher is.

    >>> ranked({("", "a"): {"test/nll": [2.0]}, ("", "b"): {"test/nll": [0.5, 1.5]}}, "test/nll", "min")
    {('', 'b'): {'test/nll': [0.5, 1.5]}, ('', 'a'): {'test/nll': [2.0]}}
    """
    tasks = list(dict.fromkeys(task for task, _ in found))
    sign = 1.0 if mode == "min" else -1.0

    def place(key: Key) -> tuple[int, float]:
        values = found[key].get(metric)
        mean = sign * statistics.mean(values) if values else math.inf
        return tasks.index(key[0]), math.inf if math.isnan(mean) else mean

    return {key: found[key] for key in sorted(found, key=place)}


def long_table(
    found: Mapping[Key, Results], failures: Mapping[Key, Sequence[str]] | None = None, metric: str | None = None
) -> list[str]:
    """One row for each method, task and test set, then the failures.

    Args:
        found: The results.
        failures: The errors of each method's failed runs, one line each.
        metric: An additional column, unless the table has it anyway.
    """
    more = metric if metric not in (None, "test/nll", "test/exact_match") else None
    head = ["config", "NLL (nats per answer token)", "exact match", "test questions", "training seconds"]
    head += ["training tokens", *([more] if more else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (task, name), results in found.items():
        sets = [key for key in results if key.startswith("test") and key.endswith("/examples")]
        for split in (key.removesuffix("/examples") for key in sets):
            sizes = sorted({int(size) for size in results[f"{split}/examples"]})
            cells = [
                _label(task, name, split.removeprefix("test").removeprefix("/")),
                _filled(results.get(f"{split}/nll"), 3),
                _filled(results.get(f"{split}/exact_match"), 3),
                f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}",
                _filled(results.get("seconds"), 0),
                _filled(results.get("budget/tokens"), 0),
            ]
            if more:
                cells.append(_filled(results.get(more), 3) if split == "test" else "")
            lines.append("| " + " | ".join(cells) + " |")
    for (task, name), told in (failures or {}).items():
        for line in told:
            said = line.replace("|", "\\|")
            lines.append("| " + " | ".join([_label(task, name), said, *[""] * (len(head) - 2)]) + " |")
    return lines


def _label(*parts: str) -> str:
    return " / ".join(part for part in parts if part)


def mixture_tasks(tasks: Iterable[Path]) -> set[str]:
    """The names of the task files whose data is a mixture; its further test sets are the datasets in it."""
    data = {task.stem: load_yaml(task).get("data", {}) for task in tasks}
    return {
        name
        for name, part in data.items()
        if isinstance(part, dict) and str(part.get("class_path")).rpartition(".")[2] == "Mixture"
    }


def side_by_side(found: Mapping[Key, Results], what: str, mixtures: Iterable[str]) -> list[str]:
    """A table of methods by tasks: in distribution, then the mean of the out-of-distribution sets.

    Args:
        found: The results.
        what: ``exact_match`` or ``nll``.
        mixtures: See `mixture_tasks`.
    """
    tasks, names = ([*dict.fromkeys(key[place] for key in found)] for place in (0, 1))
    lines = [f"| {what} | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name in names:
        cells = []
        for task in tasks:
            results = found.get((task, name), {})
            sets = [
                key for key in results if key.startswith("test/") and key.count("/") == 2 and key.endswith(f"/{what}")
            ]
            if task in mixtures:
                sets = []
            further: list[Any] = [results[key] for key in sets]
            outside = [statistics.mean(values) for values in zip(*further, strict=True)]
            inside = _filled(results.get(f"test/{what}"), 2)
            cells.append(inside + (f" → {cell(outside, 2)}" if outside else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
