"""``lightning-prompts sweep``: methods x tasks x settings x seeds, and tables that compare them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import write_atomic
from lightning_prompts.runs.launcher import RunSpec, launch_all
from lightning_prompts.runs.reader import Run
from lightning_prompts.runs.sweep import SweepConfig, SweepPlan, make_plan, read_plan
from lightning_prompts.runs.tables import (
    Key,
    Results,
    by_metric,
    check_metric,
    long_table,
    mixture_tasks,
    ranked,
    side_by_side,
)

TABLE = "table.md"
WITHOUT_DOT = ("model", "data")  # options of runs without a dot


def parser() -> CommandParser:
    """The arguments of the command line, without the options that are passed on to every run."""
    made = CommandParser(
        prog="lightning-prompts sweep",
        usage="%(prog)s METHOD.yaml ... [OPTIONS] [--data.train FILE ...]\n       %(prog)s -c SWEEP.yaml [OPTIONS]",
        description="Run methods x tasks x settings x seeds and print tables of means and standard deviations over "
        "seeds. Finished runs are kept, so the same command continues an interrupted sweep. Options with a dot, such "
        "as --data.train FILE, go to every run.",
        allow_abbrev=False,
    )
    made.add_argument("methods", nargs="*", metavar="METHOD.yaml", help="configs of the methods to compare")
    made.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="SWEEP.yaml",
        help="methods, tasks, seeds and settings, see experiments/sweep; options here override all but settings",
    )
    made.add_argument("--folder", help="store runs in FOLDER/[TASK/]METHOD[-SETTING]/seed-K (default: runs/sweep)")
    made.add_argument("--tasks", nargs="+", metavar="TASK.yaml", help="configs of data; run each method on each task")
    made.add_argument("--seeds", nargs="+", type=int, metavar="K", help="one run for each (default: 0 1 2)")
    made.add_argument("--untrained", action="store_true", default=None, help="test the prompt before training as well")
    made.add_argument("--checkpoint", choices=["best", "last"], help="which prompt to test (default: best)")
    made.add_argument("--metric", help="sort the table by this metric (default: val/nll with -c, else keep the order)")
    made.add_argument("--mode", choices=["min", "max"], help="which values of the metric are better (default: min)")
    made.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="run N at once on Ray, 0 for as many as fit (default: 1, in this process)",
    )
    made.add_argument("--address", help="a Ray cluster, HOST:PORT or auto")
    made.add_argument("--table", action="store_true", help="run nothing, print the tables of what is there")
    return made


def main(args: Sequence[str]) -> int:
    """Run what is not done yet, and print the tables.

    Args:
        args: The arguments.

    Returns:
        0 if every run is done, 1 if not, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: An argument, the sweep file or the cluster is not valid; or, after the tables are printed, no run has
            the metric that they are sorted by.
    """
    own, options = _split(args)
    given = parser().parse_intermixed_args(own)
    plan = _plan(given, options)
    runs = plan.all_runs
    todo = [run for run in runs if not run.done]
    console = Console(file=sys.stderr)  # which runs redirect
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are done and kept", highlight=False)
    errors: dict[str, str] = {}
    code = 0
    if todo and not given.table:
        if plan.config.workers != 1:
            from lightning_prompts.runs.on_ray import check_ray

            check_ray()
        try:
            _launch(todo, plan, given.address, console, errors)
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:  # a run that a signal ended
            code = int(error.code or 0)
    found = results(plan)
    text = "\n".join(tables(plan, found, errors))
    write_atomic(plan.folder / TABLE, text + "\n")
    print(text)
    left = sum(not run.done for run in runs)
    if left:
        console.print(f"{left} of {len(runs)} runs are not done; the same command continues", highlight=False)
    if code:
        return code
    if plan.config.metric is not None:
        check_metric(found, plan.config.metric)
    return int(bool(left))


def _split(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate the arguments of the sweep from the options of the runs.

    >>> _split(["a.yaml", "--data.train", "x.tsv", "--seeds", "0", "1", "--budget.tokens=9"])
    (['a.yaml', '--seeds', '0', '1'], {'data.train': 'x.tsv', 'budget.tokens': '9'})
    """
    own: list[str] = []
    options: dict[str, Any] = {}
    words = iter(args)
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in name or name in WITHOUT_DOT):
            own.append(word)
            continue
        if not given and (value := next(words, "--")).startswith("--"):
            raise UserError(f"--{name} needs a value")
        if name in options:
            raise UserError(f"--{name} is given twice")
        options[name] = value
    return own, options


def _plan(given: argparse.Namespace, options: Mapping[str, str]) -> SweepPlan:
    """The runs that the arguments ask for."""
    keys = ("folder", "tasks", "seeds", "untrained", "checkpoint", "metric", "mode", "workers")
    values = {key: getattr(given, key) for key in keys if getattr(given, key) is not None}
    if given.methods:
        values["methods"] = given.methods
    if given.config is not None:
        plan = read_plan(given.config, values, options)
    elif given.methods:
        plan = make_plan(SweepConfig.from_mapping({"metric": None, **values, "options": dict(options)}))
    else:
        raise UserError("nothing to run; give configs of methods, or a sweep file with -c")
    if given.mode is not None and plan.config.metric is None:
        raise UserError("--mode says which values of --metric are better; give --metric, too")
    if given.address is None or plan.config.workers != 1:
        return plan
    if given.workers == 1:
        raise UserError("--workers 1 runs in this process, without the cluster of --address; leave out one of them")
    return replace(plan, config=replace(plan.config, workers=0))


def _launch(
    todo: Sequence[RunSpec], plan: SweepPlan, address: str | None, console: Console, errors: dict[str, str]
) -> None:
    """Launch the runs behind a progress bar, and collect their errors by run folder."""
    config = plan.config
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as bar:
        task = bar.add_task("runs", total=len(todo))

        def begin(spec: RunSpec) -> None:
            bar.update(task, description=_name(spec, plan))

        def end(spec: RunSpec, error: str) -> None:
            if error:
                errors[spec.folder] = error
                console.print(f"{_name(spec, plan)}: {error}", highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        if config.workers == 1:
            launch_all(_until(todo, config.time_limit), begin, end)
            return
        from lightning_prompts.runs.on_ray import launch_on_ray

        launch_on_ray(todo, config, plan.folder, address, end)


def _until(specs: Sequence[RunSpec], seconds: float | None) -> Iterator[RunSpec]:
    """The runs that start before a time limit."""
    start = time.monotonic()
    for spec in specs:
        if seconds is not None and time.monotonic() - start > seconds:
            return
        yield spec


def _name(spec: RunSpec, plan: SweepPlan) -> str:
    return str(Path(spec.folder).relative_to(plan.folder))


def results(plan: SweepPlan) -> dict[Key, Results]:
    """The results of the runs that were tested."""
    done = {key: [Run(Path(run.folder)).results for run in group if run.tested] for key, group in plan.runs.items()}
    return {key: by_metric(measured) for key, measured in done.items() if measured}


def tables(plan: SweepPlan, found: dict[Key, Results], errors: Mapping[str, str]) -> list[str]:
    """The tables: results, sorted if there is a metric, then failures; methods side by side if there are tasks.

    Args:
        plan: The runs.
        found: See `results`.
        errors: Errors by run folder.
    """
    failures: dict[Key, list[str]] = {}
    for key, group in plan.runs.items():
        done = [run for run in group if run.tested]
        said = [f"seed {run.seed}: {errors[run.folder]}" for run in group if run.folder in errors]
        if done and len(done) < len(group):
            said.insert(0, f"{len(done)} of {len(group)} seeds")
        if said:
            failures[key] = said
    metric = plan.config.metric
    ordered = found if metric is None else ranked(found, metric, plan.config.mode)
    lines = long_table(ordered, failures, metric)
    if plan.tasks and found:
        mixtures = mixture_tasks(plan.tasks)
        for what in ("exact_match", "nll"):
            lines += ["", *side_by_side(ordered, what, mixtures)]
    return lines
