"""The sections of a page. A section that has nothing to say is left out."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

import numpy as np

from lightning_prompts.report import charts
from lightning_prompts.report.charts import SERIES, Curve, Look, Result, thinned
from lightning_prompts.report.comparability import unequal_settings
from lightning_prompts.report.data import MAIN, METRICS, PAIRED, Method, Metric, Task, questions, values
from lightning_prompts.report.page import (
    NONE,
    Block,
    Heading,
    Picture,
    Pictures,
    Table,
    Text,
    amount,
    difference,
    interval,
    p_value,
    spread,
)
from lightning_prompts.report.prompt_path import PromptPath
from lightning_prompts.report.statistics import DRAWS, EXACT, Values, bootstrap, over_seeds
from lightning_prompts.report.verdict import validation_warnings, verdict
from lightning_prompts.runs.configs import Settings, without_seeds
from lightning_prompts.runs.reader import Prediction, Run

COLUMNS = 5  # methods side by side in a table
SAMPLES = 8  # questions
TOKENS = 16  # shown of a prompt of vectors
T = TypeVar("T")

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
    if differences := _configs(tasks):
        blocks += [Heading("Differences of the configs", 2), *differences]
    blocks += [Heading("Environment", 2), *_environments(methods)]
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
    members, others = _other_sets(task)
    sections = {
        "Summary": _summary(task, look, prefix),
        "Datasets of the mixture": _sets(task, members),
        "Out-of-distribution test sets": _sets(task, others),
        "Other metrics": _other_metrics(task),
        "Learning curves": _curves(task, look, prefix),
        "Cost against quality": _costs(task, look, prefix),
        "Differences, question by question": _differences(task),
        "Prompts": _prompts(task, prefix),
        "Answers side by side": _answers(task),
        "Answers during training": _samples(task),
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


def _lacking(task: Task, what: str, has: Callable[[Run], bool]) -> list[Block]:
    """Name the runs that lack a file."""
    names = []
    for method in task.methods:
        without = [run for run in method.runs if not has(run)]
        if without:
            part = "" if len(without) == len(method.runs) else f" ({len(without)} of {len(method.runs)} seeds)"
            names.append(f"{method.name}{part}")
    return [Text(f"Without {what}: {', '.join(names)}.", "note")] if names else []


def _parts(items: Sequence[T], size: int = COLUMNS) -> Iterator[Sequence[T]]:
    """Split items into parts of at most so many, as even as possible."""
    if items:
        count = -(-len(items) // size)
        size = -(-len(items) // count)
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --- how good the methods are -----------------------------------------------------------------------------------------


def _summary(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """The table and the bars, the best method first."""
    missing = _lacking(task, "metrics.json or predictions.jsonl", lambda run: bool(run.metrics))
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
        counts = sorted({f"{int(count):,}" for count in method.values(f"{MAIN}/examples")})
        of_all = f"{scored}" if scored == len(method.runs) else f"{scored} of {len(method.runs)}"
        rows.append([*row, of_all, "–".join(dict.fromkeys((counts[0], counts[-1]))) if counts else NONE])
    pictures = []
    for metric, bars in shown.items():
        if bars:
            alt = f"{metric.title} of each method with its 95% interval"
            picture = charts.bars(_title(metric), bars, metric.percent)
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


def _title(metric: Metric) -> str:
    return metric.title if metric.percent else f"{metric.title} (nats per answer token)"


def _over_questions(method: Method, metric: Metric) -> tuple[float, float] | None:
    found = values(method.rows, metric.field)
    return (
        bootstrap(np.array(list(found.values())), np.random.default_rng(0), questions(list(found))) if found else None
    )


def _metric_names(task: Task) -> list[str]:
    return list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.metrics))


def _other_sets(task: Task) -> tuple[list[str], list[str]]:
    """Find the further test sets: the datasets of a mixture, and those out of distribution."""
    ends = tuple(f"/{metric.name}" for metric in METRICS)
    sets = dict.fromkeys(name.rpartition("/")[0] for name in _metric_names(task) if name.endswith(ends))
    sets.pop(MAIN, None)
    settings = [method.settings or {} for method in task.methods]
    members = [name for name in sets if any(f"data.members.{name.removeprefix('test/')}" in one for one in settings)]
    return members, [name for name in sets if name not in members]


def _sets(task: Task, sets: Sequence[str]) -> list[Block]:
    columns = []
    for name, metric in itertools.product(sets, METRICS):
        columns.append((f"{name}/{metric.name}", f"{name.removeprefix('test/')}: {metric.title}", metric.percent))
    return _metric_tables(task, columns)


def _other_metrics(task: Task) -> list[Block]:
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
    for part in _parts([column for column in columns if column[0] in known], COLUMNS + 1):
        cells = [[spread(method.values(name), percent) for name, _, percent in part] for method in task.ranked]
        rows = [[method.name, *row] for method, row in zip(task.ranked, cells, strict=True) if set(row) != {NONE}]
        blocks.append(Table(["method", *(title for _, title, _ in part)], rows))
    return blocks


def _differences(task: Task) -> list[Block]:
    """A table of the compared pairs for each metric."""
    missing = _lacking(task, "predictions.jsonl", lambda run: run.predictions is not None)
    found = [method for method in task.methods if method.rows]
    if len(found) < 2:
        return missing if len(task.methods) > 1 else []
    blocks: list[Block] = [
        Text(
            "Each row is one method less the one that it is compared with, on the rows of predictions.jsonl that both "
            f"have (the baseline, {task.baseline.name}, first): positive exact match and negative NLL mean that the "
            "first is better. The p-value is that of a paired permutation test over questions, two-sided; Holm's is "
            "adjusted for the number of rows in the table. Both are about these prompts on other questions, not about "
            "other seeds."
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


# --- how training went, and what it cost ------------------------------------------------------------------------------


def _curves(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
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
    missing = _lacking(
        task, "logs/version_*/metrics.csv though trained", lambda run: bool(run.curves) or not run.trained
    )
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


def _costs(task: Task, looks: dict[str, Look], prefix: str) -> list[Block]:
    """The cost of training, and the quality that it bought."""
    names = list(dict.fromkeys(name for method in task.methods for run in method.runs for name in run.budget))
    if not names:
        return []
    pictures = []
    labels = {"tokens": "training tokens through the LM", "seconds": "seconds of training"}
    for metric, (paid, label) in itertools.product(METRICS, labels.items()):
        spots = [spot for method in task.ranked if (spot := _spot(method, looks[method.name], metric, paid))]
        if any(spot.cost for spot in spots):
            picture = charts.costs(_title(metric), spots, label, metric.percent)
            alt = f"{metric.title} of each method by its {label}"
            pictures.append(Picture(f"{prefix}-{paid}-{metric.name}", picture, alt))
    rows = [[method.name, *(_cost_cell(method.cost(name)) for name in names)] for method in task.ranked]
    caption = (
        "A large mark is the mean over seeds, small ones are seeds. A dashed line across: not trained. The grey line "
        "is the Pareto frontier: no method on it is beaten by one that costs less. Validation is not counted; seconds "
        "depend on the machine and its load."
    )
    header = ["method", *("memory, GB" if name == "memory_gb" else name.replace("_", " ") for name in names)]
    missing = _lacking(task, "budget.json though trained", lambda run: bool(run.budget) or not run.trained)
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


# --- the prompts ------------------------------------------------------------------------------------------------------


def _prompts(task: Task, prefix: str) -> list[Block]:
    """Texts, nearest tokens, what moved, and paths."""
    rows: list[list[str]] = []
    moved: list[list[str]] = []
    pictures = []
    for number, method in enumerate(task.methods):
        for run in method.runs:
            if prompt := _prompt(run):
                rows.append([method.name, run.seed or NONE, *prompt])
        path = next((path for run in method.runs if (path := PromptPath.of(run))), None)
        if path:
            moved += [[method.name, *row] for row in path.moves()]
            lines, vocabulary, share = path.tracks()
            picture = charts.paths(f"{method.name} (the plane shows {share:.0%} of the variance)", lines, vocabulary)
            pictures.append(Picture(f"{prefix}-path-{number}", picture, f"path of the prompt's vectors, {method.name}"))
    blocks = _lacking(task, "prompt.jsonl though trained", lambda run: bool(run.readout) or not run.trained)
    blocks += _lacking(
        task,
        "prompt_path.jsonl, so without a picture of the path",
        lambda run: bool(run.path) or not any("tokens" in row for row in run.readout),
    )
    if rows:
        text = (
            "The prompt after the best validation: its text, or for vectors the nearest vocabulary tokens with their "
            "cosine similarity. The nearest tokens do not say what the vectors do: compare the NLL of these tokens "
            "used as words with that on validation. Distance from start is Euclidean, mean over the prompt's vectors."
        )
        judged = ["NLL as words", "NLL on validation", "exact match on validation", "distance from start"]
        blocks += [Text(text), Table(["method", "seed", "prompt", "step", *judged], rows, texts=3)]
    if moved:
        text = (
            "What moved: for some places of the prompt, the nearest token at the start and at the end of training, and "
            "how far the vector is from its start and from that token. For comparison, the distance between two tokens "
            "of the vocabulary (median). Distances are approximate, of vectors projected at random to a few numbers. "
            "First seed that kept its path."
        )
        distances = ["from its start", "from the nearest token", "between two tokens"]
        header = ["method", "place", "nearest at the start", "nearest at the end", *distances]
        blocks += [Text(text), Table(header, moved, texts=4)]
    if pictures:
        caption = (
            "From a ring (where training began) to a disc (where it ended), a dot per validation, for some places "
            "of the prompt; the number is the place, the cross and the text its nearest token in the end; grey: tokens "
            "of the vocabulary, drawn at random. The plane is that of the vectors' two principal components."
        )
        blocks.append(Pictures(pictures, caption))
    return [*blocks, *_own_prompts(task), *_tried(task)]


def _prompt(run: Run) -> list[str] | None:
    """Prompt, step, NLL as words, NLL, exact match and distance at the validation that chose the best checkpoint."""
    name, larger = run.monitor
    judged = {step: -value if larger else value for step, value in _finite(run, name).items()}
    readouts = {int(row["step"]): row for row in run.readout if isinstance(row.get("step"), int)}
    both = [step for step in readouts if step in judged]
    step = min(both, key=lambda step: judged[step]) if both else max(readouts, default=-1)
    row = readouts.get(step, {})
    nll, match = (_finite(run, f"val/{name}").get(step) for name in ("nll", "exact_match"))
    percent = NONE if match is None else spread([match], percent=True)
    numbers = [_cell(row.get("nll_as_words")), _cell(nll), percent, _cell(row.get("distance"))]
    shown = NONE if step < 0 else str(step)
    if run.text is not None:
        return [repr(run.text) if "\n" not in run.text else run.text, shown, *numbers]
    tokens = row.get("tokens")
    if not isinstance(tokens, list):
        return [NONE, shown, *numbers] if numbers[-1] != NONE else None
    cosines = row.get("cosine") if isinstance(row.get("cosine"), list) else []
    near = [f" ({value:.2f})" if isinstance(value, float) else "" for value in cosines or []]
    words = [f"{str(token)!r}{cosine}" for token, cosine in itertools.zip_longest(tokens, near, fillvalue="")]
    more = f" and {len(words) - TOKENS} more" if len(words) > TOKENS else ""
    path = PromptPath.of(run)
    begun = "\n(the tokens that the prompt started from)" if path and path.started_from(tokens) else ""
    return [", ".join(words[:TOKENS]) + more + begun, shown, *numbers]


def _finite(run: Run, metric: str) -> dict[int, float]:
    """A metric's curve, without what is not a number."""
    return {step: value for step, value in run.curves.get(metric, {}).items() if np.isfinite(value)}


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else NONE


def _own_prompts(task: Task) -> list[Block]:
    """Prompts of methods that write one for each question."""
    rows = []
    for method in task.methods:
        counts = Counter(row.prompt for row in itertools.chain(*method.rows.values()) if row.prompt is not None)
        for prompt, count in counts.most_common(4):
            rows.append([method.name, repr(prompt), f"{count:,} of {counts.total():,}", f"{len(counts):,}"])
    text = (
        "Prompts written for single questions (for vectors, the nearest tokens): the commonest, and how many different "
        "ones there are."
    )
    return [Text(text), Table(["method", "prompt", "questions", "different prompts"], rows, texts=2)] if rows else []


def _tried(task: Task) -> list[Block]:
    """Prompts of methods that propose them, of validations that were better than all before."""
    rows = []
    for method in task.methods:
        run = next((run for run in method.runs if run.candidates), None)
        best = float("-inf")
        for row in run.candidates if run else []:
            accuracy, prompts = row.get("accuracy"), row.get("prompts")
            if isinstance(accuracy, int | float) and isinstance(prompts, list) and accuracy > best:
                best = float(accuracy)
                text = "\n–\n".join(str(prompt) for prompt in prompts)
                rows.append([method.name, text, str(row.get("step", NONE)), f"{accuracy:.1%}"])
    text = "Prompts that were better on validation than all before them (prompts.jsonl; the first seed that has one)."
    return [Text(text), Table(["method", "prompts, layer by layer", "step", "accuracy"], rows, texts=2)] if rows else []


# --- the answers ------------------------------------------------------------------------------------------------------


def _answers(task: Task) -> list[Block]:
    """The same questions, answered by every method."""
    methods = [method for method in task.methods if method.rows]
    if not methods:
        return []
    answered = [method.rows_among(methods) for method in methods]
    seeds = [seed for seed in answered[0] if all(seed in rows for rows in answered)]
    tables = [{(row.question, row.answer): row for row in rows[seeds[0]]} for rows in answered]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        return [Text("No question was answered by all methods.", "note")]
    chosen = [shared[round(place)] for place in np.linspace(0, len(shared) - 1, min(SAMPLES, len(shared)))]
    seed = f" (seed {seeds[0]})" if seeds[0] else ""
    text = f"Evenly spaced, whatever the answers, among the {len(shared):,} questions that all have answered{seed}."
    blocks: list[Block] = [Text(text)]
    for part in _parts(list(zip(methods, tables, strict=True))):
        rows = [[*map(_short, key), *(_answer(table[key]) for _, table in part)] for key in chosen]
        header = ["question", "reference", *(method.name for method, _ in part)]
        blocks.append(Table(header, rows, texts=len(header)))
    return blocks


def _answer(row: Prediction) -> str:
    mark = "" if row.correct is None else "✓ " if row.correct else "✗ "
    return f"{mark}{_short(row.generated)}" + ("" if row.nll is None else f"\nNLL {row.nll:.2f}")


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _samples(task: Task) -> list[Block]:
    """Begin, middle and end of samples.jsonl, first seed that has one."""
    blocks: list[Block] = []
    for method in task.methods:
        rows = next((run.samples for run in method.runs if run.samples), [])
        steps = sorted({step for row in rows if isinstance(step := row.get("step"), int)})
        if len(steps) < 2:
            continue
        chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
        said = {
            (str(row.get("question")), str(row.get("answer")), row.get("step")): str(row.get("generated", ""))
            for row in rows
        }
        asked = list(dict.fromkeys(key[:2] for key in said))
        cells = [[*map(_short, key), *(_short(said.get((*key, step), NONE), 120) for step in chosen)] for key in asked]
        header = ["question", "reference", *(f"step {step}" for step in chosen)]
        blocks += [Text(f"{method.name}, on validation:"), Table(header, cells, texts=len(header))]
    return [*blocks, *_lacking(task, "samples.jsonl though trained", lambda run: bool(run.samples) or not run.trained)]


# --- configs and environments -----------------------------------------------------------------------------------------


def _configs(tasks: Sequence[Task]) -> list[Block]:
    """The settings that differ, task by task."""
    blocks: list[Block] = []
    for task in tasks:
        known = [(method, found) for method in task.methods if (found := _settings(method))]
        without = _lacking(task, "config.yaml", lambda run: run.settings is not None)
        keys = list(dict.fromkeys(key for _, settings in known for key in settings))
        differing = [key for key in keys if _differs([settings for _, settings in known], key)]
        if len(tasks) > 1 and (differing or without):
            blocks.append(Heading(task.name, 3))
        for part in _parts(known) if differing else ():
            rows = [[key, *(_value(settings, key) for _, settings in part)] for key in differing]
            rows = [row for row in rows if set(row[1:]) != {NONE}]
            blocks.append(Table(["setting", *(method.name for method, _ in part)], rows, texts=1 + len(part)))
        blocks += without
        if not without and not differing and len(known) > 1:
            blocks.append(Text(f"{task.name}: the configs are the same.", "note"))
    intro = (
        "Settings in which the methods' configs differ. Seeds and folders are left out, and so are settings that one "
        "method lacks and the others have switched off."
    )
    return [Text(intro), *blocks] if blocks else []


def _settings(method: Method) -> Settings | None:
    """The settings, and whether something was trained: a config can be tested without training, too."""
    run = next((run for run in method.runs if run.settings), None)
    return {"trained": run.trained, **without_seeds(run.settings or {})} if run else None


def _differs(configs: Sequence[Settings], key: str) -> bool:
    """Whether configs differ in a setting; one that is missing equals one that is off."""
    found = {_value(settings, key) for settings in configs if settings.get(key) not in (None, False, "", 0)}
    return len(found) > 1 or (len(found) == 1 and any(not settings.get(key) for settings in configs))


def _value(settings: Settings, key: str) -> str:
    """Write a setting, its numbers with at most six digits."""
    value = settings.get(key, NONE)
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False, default=str)
    short = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return json.dumps(short, ensure_ascii=False)


def _environments(methods: Sequence[Method]) -> list[Block]:
    """Each different environment once, and the methods that ran in it."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    without = []
    for name, run in [(method.name, run) for method in methods for run in method.runs]:
        if run.environment is None:
            without.append(name)
        else:
            found.setdefault(json.dumps(run.environment, sort_keys=True), (run.environment, []))[1].append(name)
    blocks: list[Block] = []
    keys = list(dict.fromkeys(key for environment, _ in found.values() for key in environment))
    for part in _parts(list(found.values())):
        alone = len(found) == 1 and not without
        header = ["", *("all" if alone else ", ".join(dict.fromkeys(names)) for _, names in part)]
        rows = [[key, *(_value(environment, key) for environment, _ in part)] for key in keys]
        blocks.append(Table(header, rows, texts=len(header)))
    if without:
        blocks.append(Text(f"Without environment.json: {', '.join(dict.fromkeys(without))}.", "note"))
    return blocks
