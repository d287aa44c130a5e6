"""Runs put together: seeds of one method, methods on one task."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lightning_prompts.errors import UserError
from lightning_prompts.report.pairs import Comparison, compare, mean_over_seeds, values
from lightning_prompts.runs.configs import without_seeds
from lightning_prompts.runs.reader import Prediction, Run

MAIN = "test"  # the test set in distribution; further ones have names


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but the seed.

    Args:
        name: What to call it on the page.
        runs: One per seed.
    """

    name: str
    runs: tuple[Run, ...]

    def values(self, metric: str) -> list[float]:
        """A metric of each run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def cost(self, name: str) -> list[float]:
        """What training has cost each run that says so."""
        return [run.budget[name] for run in self.runs if name in run.budget]

    @cached_property
    def rows(self) -> dict[str, list[Prediction]]:
        """Predictions on the main test set by seed."""
        found = {}
        for run in self.runs:
            rows = run.predictions or []
            mine = [row for row in rows if row.split == MAIN] or rows
            if mine:
                found[run.seed if run.seed is not None else str(run.folder)] = mine
        return found

    def rows_among(self, methods: Sequence[Method]) -> dict[str, list[Prediction]]:
        """As `rows`; where the methods have no seed in common, those of this one's first run, under no seed."""
        if not self.rows or set.intersection(*(set(method.rows) for method in methods)):
            return self.rows
        return {"": next(iter(self.rows.values()))}

    def against(self, other: Method, what: str) -> Comparison | None:
        """This method less another one, question by question; ``what`` is ``nll`` or ``correct``."""
        mine, others = values(self.rows, what), values(other.rows, what)
        if not self.rows.keys() & other.rows.keys():
            mine, others = mean_over_seeds(mine), mean_over_seeds(others)
        return compare(mine, others)


@dataclass(frozen=True)
class Task:
    """Methods that have answered the same questions.

    Args:
        name: What to call it on the page.
        methods: In the order in which they were given.
        baseline: The one of them that the others are compared with.
    """

    name: str
    methods: tuple[Method, ...]
    baseline: Method


def group(runs: Sequence[Run], baseline: Path | None) -> list[Task]:
    """Put runs together.

    Args:
        runs: As they were given.
        baseline: The folder of a run, or of several seeds; ``None`` for a method of each task that was not trained, or
            else its first.

    Returns:
        The tasks. One without the baseline, or with a method of the same name, takes that or its own first method.

    Raises:
        UserError: No method is in the folder that ought to be the baseline's, or several are.
    """
    methods = _methods(runs)
    asked = None if baseline is None else _find(methods, baseline)
    common = _common(methods)
    paths = {id(method): _label_path(method, common) for method in methods}
    tasks: list[list[Method]] = []
    for method in methods:
        home = next((task for task in tasks if any(_same_task(method, other) for other in task)), None)
        if home is None:
            tasks.append([method])
        else:
            home.append(method)
    found = []
    for task in tasks:
        ahead = _shared([paths[id(method)] for method in task])
        names = _unique([_name(method, paths[id(method)][len(ahead) :]) for method in task])
        named = [replace(method, name=name) for method, name in zip(task, names, strict=True)]
        alike = (
            None if asked is None else next((new for old, new in zip(task, named, strict=True) if old is asked), None)
        )
        if alike is None and asked is not None:  # the same method on another task
            last = _name(asked, paths[id(asked)][-1:])
            alike = next((method for method in named if method.name == last), None)
        title = "/".join(ahead) or next((run.data_name for run in task[0].runs if run.data_name), None) or "runs"
        untrained = next((method for method in named if not any(run.trained for run in method.runs)), named[0])
        found.append(Task(title, tuple(named), alike or untrained))
    return [replace(task, name=name) for task, name in zip(found, _unique(task.name for task in found), strict=True)]


def _methods(runs: Sequence[Run]) -> list[Method]:
    """Runs by their configs without the seed; runs without a config by their folder."""
    given = list(dict.fromkeys(runs))
    groups: list[tuple[str, list[Run]]] = []
    for run in sorted(given, key=lambda run: run.settings is None):  # which join what is there
        settings = json.dumps(without_seeds(run.settings or {}), sort_keys=True, default=str)
        key = f"{run.trained} {settings}"
        for old, group in groups:
            alike = old == key if run.settings is not None else run.home in [one.home for one in group]
            # The same seed once more is no further seed: a repetition, or another prompt under the same config.
            if alike and run.seed not in [one.seed for one in group]:
                group.append(run)
                break
        else:
            groups.append((key, [run]))
    groups.sort(key=lambda item: min(map(given.index, item[1])))
    return [Method("", tuple(sorted(group, key=_by_seed))) for _, group in groups]


def _by_seed(run: Run) -> tuple[int, str]:
    seed = run.seed or ""
    return (int(seed) if seed.isdigit() else 0, seed)


def _common(methods: Sequence[Method]) -> Path:
    return Path(os.path.commonpath([run.home for method in methods for run in method.runs]))


def _label_path(method: Method, common: Path) -> tuple[str, ...]:
    """Where a method is, below what all have in common; several places side by side."""
    places = list(dict.fromkeys(run.home.relative_to(common).parts for run in method.runs))
    shared = _shared(places) if len(places) > 1 else places[0]
    rest = ["/".join(place[len(shared) :]) or "." for place in places]
    return shared if len(places) == 1 else (*shared, ", ".join(rest))


def _shared(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The beginning that all paths have in common; a single path is no beginning of itself."""
    count = 0
    while all(len(path) > count + 1 and path[count] == paths[0][count] for path in paths):
        count += 1
    return paths[0][:count]


def _name(method: Method, path: tuple[str, ...]) -> str:
    return "/".join(path) or method.runs[0].class_name or method.runs[0].home.name


def _unique(names: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        again = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({again + 1})" if again else name)
    return found


def _find(methods: Sequence[Method], folder: Path) -> Method:
    """The method of a folder."""
    place = folder.absolute()
    exact = [method for method in methods if any(run.folder.absolute() == place for run in method.runs)]
    below = [method for method in methods if any(place in run.folder.absolute().parents for run in method.runs)]
    found = exact or below
    if len(found) == 1:
        return found[0]
    places = ", ".join(str(method.runs[0].home) for method in found or methods)
    told = "several methods are there" if found else "it is none of the runs"
    raise UserError(f"--baseline {folder}: {told}; give one of {places}")


def _same_task(one: Method, other: Method) -> bool:
    """Whether most questions of the one are questions of the other, on a seed that both have if there is one."""
    mine, others = one.rows_among((one, other)), other.rows_among((one, other))
    for seed in mine:
        if seed in others:
            first, second = ({(row.split, row.question, row.answer) for row in rows[seed]} for rows in (mine, others))
            if 2 * len(first & second) > min(len(first), len(second)):
                return True
            if seed or any(run.seed is None for run in (*one.runs, *other.runs)):
                return False  # runs of different seeds may have test sets of their own
    names = [{run.data_name for run in method.runs} - {None} for method in (one, other)]
    if all(names):
        return names[0] == names[1]
    return one.runs[0].home.parent == other.runs[0].home.parent
