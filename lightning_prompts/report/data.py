"""The data of a report: runs grouped into methods and tasks, and methods compared question by question."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.report.statistics import Groups, bootstrap, by_question, holm, permutation
from lightning_prompts.runs.configs import Settings, without_seeds
from lightning_prompts.runs.reader import Prediction, Run

MAIN = "test"  # the in-distribution test set; the others have names
PAIRED = 12  # up to so many methods, all pairs are compared; of more, each with the baseline

Key: TypeAlias = tuple[str, str, str, str, int]  # seed, split, question, answer, and which of several equal rows


@dataclass(frozen=True)
class Metric:
    """A figure that every test gives.

    Args:
        name: Its name in ``metrics.json``, after that of the test set.
        title: Its name on the page.
        field: Its name in a `Prediction`.
        percent: Whether it is a share, and more is better. Otherwise it is in nats, and less is better.
    """

    name: str
    title: str
    field: str
    percent: bool

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.percent else -1

    @property
    def title_with_unit(self) -> str:
        """Its name above a chart."""
        return self.title if self.percent else f"{self.title} (nats per answer token)"


EXACT_MATCH = Metric("exact_match", "exact match", "correct", percent=True)
NLL = Metric("nll", "NLL", "nll", percent=False)
METRICS = (EXACT_MATCH, NLL)


@dataclass(frozen=True)
class Comparison:
    """One method less another, on the same rows.

    Args:
        count: How many rows both have.
        questions: How many different questions these are.
        difference: The mean difference.
        deviation: Standard deviation of the difference from question to question; 0 for a single one.
        interval: Of 95%, over questions; ``None`` for a single question.
        p_value: Of the paired permutation test, two-sided.
        adjusted: The p-value after Holm's correction for the other comparisons of a table.
    """

    count: int
    questions: int
    difference: float
    deviation: float
    interval: tuple[float, float] | None
    p_value: float
    adjusted: float = math.nan

    def turned(self) -> Comparison:
        """The same with the methods in the other order."""
        ends = None if self.interval is None else (-self.interval[1], -self.interval[0])
        return replace(self, difference=-self.difference, interval=ends)


def main_rows(run: Run) -> list[Prediction]:
    """The predictions on the main test set, or all of a run whose test sets all have names."""
    rows = run.predictions or []
    return [row for row in rows if row.split == MAIN] or rows


def values(rows: Mapping[str, Sequence[Prediction]], field: str) -> dict[Key, float]:
    """Collect a figure of every row that has it.

    Args:
        rows: Predictions by seed.
        field: ``nll`` or ``correct``.

    Returns:
        The figure by seed, split, question and answer. A question that a test set holds twice is two rows.
    """
    found: dict[Key, float] = {}
    for seed, predictions in rows.items():
        seen: Counter[tuple[str, str, str]] = Counter()
        for row in predictions:
            value = row.nll if field == "nll" else row.correct
            question = row.split, row.question, row.answer
            if value is not None and math.isfinite(value):
                key = (seed, *question, seen[question])
                found[key] = value
            seen[question] += 1
    return found


def mean_over_seeds(found: Mapping[Key, float]) -> dict[Key, float]:
    """Average each row of `values` over the seeds that have it; for methods that have no seed in common."""
    rows: dict[Key, list[float]] = {}
    for key, value in found.items():
        rows.setdefault(("", *key[1:]), []).append(value)
    return {key: sum(several) / len(several) for key, several in rows.items()}


def questions(keys: Sequence[Key]) -> Groups:
    """Number the questions of rows, whatever the seed: ``[N]``, counted from 0."""
    numbers: dict[tuple[str, str, str], int] = {}
    return np.array([numbers.setdefault(key[1:4], len(numbers)) for key in keys], dtype=np.int64)


def compare(mine: Mapping[Key, float], other: Mapping[Key, float]) -> Comparison | None:
    """Compare two methods row by row.

    A question that is in the test sets of several seeds is one question: its rows are no independent evidence, so they
    are drawn and swapped together.

    Args:
        mine: As `values` gives them.
        other: The same of the method to compare with.

    Returns:
        The comparison, the same numbers every time; ``None`` where they have no row in common.
    """
    shared = [key for key in mine if key in other]
    if not shared:
        return None
    differences = np.array([mine[key] - other[key] for key in shared])
    groups = questions(shared)
    means = by_question(differences, groups)
    return Comparison(
        len(shared),
        len(means),
        float(differences.mean()),
        float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        bootstrap(differences, np.random.default_rng(0), groups),
        permutation(differences, np.random.default_rng(0), groups),
    )


@dataclass(frozen=True)
class Method:
    """Runs that differ only in the seed.

    Args:
        name: Its name on the page.
        runs: One per seed.
    """

    name: str
    runs: tuple[Run, ...]

    def values(self, metric: str) -> list[float]:
        """A metric of each run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def mean(self, metric: str) -> float | None:
        """The mean over seeds; ``None`` where there is none, or it is not finite."""
        found = self.values(metric)
        return float(np.mean(found)) if found and np.isfinite(found).all() else None

    def cost(self, name: str) -> list[float]:
        """The training cost of each run that recorded it."""
        return [run.budget[name] for run in self.runs if name in run.budget]

    @property
    def trained(self) -> bool:
        """Whether any run trained something."""
        return any(run.trained for run in self.runs)

    @property
    def settings(self) -> Settings | None:
        """The config of the first run that has one."""
        return next((run.settings for run in self.runs if run.settings), None)

    @cached_property
    def rows(self) -> dict[str, list[Prediction]]:
        """Predictions on the main test set by seed."""
        found = {}
        for run in self.runs:
            if mine := main_rows(run):
                found[run.seed if run.seed is not None else str(run.folder)] = mine
        return found

    def rows_among(self, methods: Sequence[Method]) -> dict[str, list[Prediction]]:
        """As `rows`; where the methods have no seed in common, those of this one's first run, under no seed."""
        if not self.rows or set.intersection(*(set(method.rows) for method in methods)):
            return self.rows
        return {"": next(iter(self.rows.values()))}

    def against(self, other: Method, field: str) -> Comparison | None:
        """Compare this method with another one, question by question; ``field`` is ``nll`` or ``correct``."""
        mine, others = values(self.rows, field), values(other.rows, field)
        if not self.rows.keys() & other.rows.keys():
            mine, others = mean_over_seeds(mine), mean_over_seeds(others)
        return compare(mine, others)

    def by_seed_against(self, other: Method, metric: str) -> list[float]:
        """The difference on each seed with which both methods have the metric."""
        others = {run.seed: run.metrics[metric] for run in other.runs if metric in run.metrics}
        mine = [run for run in self.runs if metric in run.metrics and run.seed in others]
        return [run.metrics[metric] - others[run.seed] for run in mine]


@dataclass(frozen=True)
class Task:
    """Methods that have answered the same questions.

    Args:
        name: Its name on the page.
        methods: In the order in which they were given.
        baseline: The one that the others are compared with.
    """

    name: str
    methods: tuple[Method, ...]
    baseline: Method

    @cached_property
    def metric(self) -> Metric:
        """What methods are ranked by: exact match, or NLL where exact match is missing or the same for all."""
        means = {metric: [method.mean(f"{MAIN}/{metric.name}") for method in self.scored] for metric in METRICS}
        usable = [metric for metric in METRICS if None not in means[metric]]
        telling = [metric for metric in usable if len(set(means[metric])) > 1]
        return (*telling, *usable, EXACT_MATCH)[0]

    @cached_property
    def scored(self) -> list[Method]:
        """The methods that have a metric of the main test set."""
        return [method for method in self.methods if any(method.values(f"{MAIN}/{metric.name}") for metric in METRICS)]

    @cached_property
    def ranked(self) -> list[Method]:
        """All methods, the best first; those without the metric last."""

        def loss(method: Method) -> tuple[float, ...]:
            means = [(metric, method.mean(f"{MAIN}/{metric.name}")) for metric in (self.metric, NLL)]
            return tuple(math.inf if mean is None else -metric.sign * mean for metric, mean in means)

        return sorted(self.methods, key=loss)

    def lacking(self, has: Callable[[Run], object]) -> list[str]:
        """Name the methods with runs that lack something, and how many runs if not all do."""
        found = []
        for method in self.methods:
            count = sum(not has(run) for run in method.runs)
            if count:
                part = "" if count == len(method.runs) else f" ({count} of {len(method.runs)} seeds)"
                found.append(f"{method.name}{part}")
        return found

    def lacking_if_trained(self, has: Callable[[Run], object]) -> list[str]:
        """As `lacking`; a run that was not trained lacks nothing."""
        return self.lacking(lambda run: has(run) or not run.trained)

    @property
    def pairs(self) -> list[tuple[Method, Method]]:
        """Which methods are compared: all pairs, the baseline's first; of many methods, only those."""
        found = [method for method in self.methods if method.rows]
        ordered = sorted(found, key=lambda method: method is not self.baseline)
        if len(found) > PAIRED:
            return [(mine, ordered[0]) for mine in ordered[1:]]
        return [(mine, other) for other, mine in itertools.combinations(ordered, 2)]

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str], Comparison]:
        """The comparisons of `pairs` that have rows in common, by metric and names; p-values of a metric adjusted."""
        found: dict[tuple[str, str, str], Comparison] = {}
        for metric in METRICS:
            made = {
                (metric.name, mine.name, other.name): result
                for mine, other in self.pairs
                if (result := mine.against(other, metric.field))
            }
            adjusted = holm([result.p_value for result in made.values()])
            found |= {
                key: replace(result, adjusted=p_value)
                for (key, result), p_value in zip(made.items(), adjusted, strict=True)
            }
        return found

    def comparison(self, metric: Metric, mine: Method, other: Method) -> Comparison | None:
        """One of `comparisons`, in either order; ``None`` for a pair that was not compared."""
        if result := self.comparisons.get((metric.name, mine.name, other.name)):
            return result
        turned = self.comparisons.get((metric.name, other.name, mine.name))
        return turned.turned() if turned else None


def group(runs: Sequence[Run], baseline: Path | None) -> list[Task]:
    """Group runs into methods, and methods into tasks.

    Args:
        runs: As they were given.
        baseline: The folder of a run, or of several seeds. ``None`` for the first method of each task that was not
            trained.

    Returns:
        The tasks. A task without the baseline takes a method of the same name. Where there is none, or no baseline is
        given and all methods were trained, the first method is the baseline.

    Raises:
        UserError: No method is in the baseline's folder, or several are.
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
        chosen = [new for old, new in zip(task, named, strict=True) if old is asked]
        if not chosen and asked is not None:  # the same method on another task
            last = _name(asked, paths[id(asked)][-1:])
            chosen = [method for method in named if method.name == last]
        chosen += [method for method in named if not method.trained]
        title = "/".join(ahead) or next((run.data_name for run in task[0].runs if run.data_name), None) or "runs"
        found.append(Task(title, tuple(named), (chosen or named)[0]))
    return [replace(task, name=name) for task, name in zip(found, _unique(task.name for task in found), strict=True)]


def _methods(runs: Sequence[Run]) -> list[Method]:
    """Group runs by their config without the seed; runs without a config by their folder."""
    given = list(dict.fromkeys(runs))
    parts: list[tuple[str, list[Run]]] = []  # the runs of one config in one folder, which stay together
    for run in sorted(given, key=lambda run: run.settings is None):  # those without a config join the others
        settings = json.dumps(without_seeds(run.settings or {}), sort_keys=True, default=str)
        key = str(run.home) if run.settings is None else f"{run.trained} {settings}"
        for old, part in parts:
            alike = run.home == part[0].home and (run.settings is None or old == key)
            # The same seed again is not another seed: it is a repetition, or another prompt under the same config.
            if alike and run.seed not in [one.seed for one in part]:
                part.append(run)
                break
        else:
            parts.append((key, [run]))
    groups: list[tuple[str, list[Run]]] = []
    for key, part in parts:
        for old, group in groups:
            if old == key and not {run.seed for run in part} & {run.seed for run in group}:
                group += part
                break
        else:
            groups.append((key, part))
    groups.sort(key=lambda item: min(map(given.index, item[1])))
    return [Method("", tuple(sorted(group, key=_by_seed))) for _, group in groups]


def _by_seed(run: Run) -> tuple[int, str]:
    seed = run.seed or ""
    return (int(seed) if seed.isdigit() else 0, seed)


def _common(methods: Sequence[Method]) -> Path:
    return Path(os.path.commonpath([run.home for method in methods for run in method.runs]))


def _label_path(method: Method, common: Path) -> tuple[str, ...]:
    """The path of a method below the folder that all methods are in; several paths side by side."""
    places = list(dict.fromkeys(run.home.relative_to(common).parts for run in method.runs))
    shared = _shared(places) if len(places) > 1 else places[0]
    rest = ["/".join(place[len(shared) :]) or "." for place in places]
    return shared if len(places) == 1 else (*shared, ", ".join(rest))


def _shared(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest common beginning of paths; at least one part of each path remains."""
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
    """Find the method of a folder."""
    place = folder.absolute()
    exact = [method for method in methods if any(run.folder.absolute() == place for run in method.runs)]
    below = [method for method in methods if any(place in run.folder.absolute().parents for run in method.runs)]
    found = exact or below
    if len(found) == 1:
        return found[0]
    places = ", ".join(str(method.runs[0].home) for method in found or methods)
    problem = "several methods are there" if found else "it is none of the runs"
    raise UserError(f"--baseline {folder}: {problem}; give one of {places}")


def _same_task(one: Method, other: Method) -> bool:
    """Whether most questions of one method are questions of the other, on a seed that both have if there is one."""
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
