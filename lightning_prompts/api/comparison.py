"""Compare methods with several seeds on the same data."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prompts.api.data import Data, module_of
from lightning_prompts.api.display import MAIN, bars_html, shown, table_html
from lightning_prompts.api.job import Job, Method, method_settings
from lightning_prompts.api.loaded_lms import LMS
from lightning_prompts.api.plain import is_yaml
from lightning_prompts.api.prompt_run import PromptRun
from lightning_prompts.cli.classes import settings_of
from lightning_prompts.cli.notebook import Line, in_notebook
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.reuse import keep_lms
from lightning_prompts.methods import PromptMethod
from lightning_prompts.runs import names
from lightning_prompts.runs.launcher import RunSpec, attempt
from lightning_prompts.runs.reader import SEED_FOLDER, Run
from lightning_prompts.runs.record import check_writable

if TYPE_CHECKING:
    import pandas as pd


def compare(
    methods: Iterable[Method] | Mapping[str, Method | Mapping[str, Any]],
    data: Data,
    *,
    seeds: int | Sequence[int] = 3,
    lm: str | LMConfig | None = None,
    folder: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    verbose: bool = True,
    **settings: object,
) -> Comparison:
    """Train and test several methods with several seeds on the same data, and compare them.

    A seed sets the splits of the data, the initial prompt and the order of batches. Finished runs in the folder are
    kept, so the same call continues an interrupted comparison.

    Args:
        methods: Methods as in `fit`; or by name, each a method or a dict with ``method`` and its settings, such as
            ``{"8 vectors": {"method": "soft_prompt", "length": 8}}``.
        data: See `fit`.
        seeds: How many seeds, or the seeds.
        lm: See `fit`.
        folder: Where the runs are stored, as FOLDER/METHOD/seed-K; by default a new one below ``runs``.
        trainer: Settings of the trainer for all methods, as a dict; a method's own override them.
        verbose: Show which run is in progress, and each result.
        settings: Settings of the trainer for all methods, ``budget``, and settings of every method that has them.

    Raises:
        UserError: A setting is wrong, the folder holds runs with other settings or data, or every run failed. A failed
            run does not stop the others.
    """
    jobs = _jobs(methods, module_of(data), lm, _trainer_settings(trainer), settings)
    place = Path(folder) if folder is not None else Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S-%f}"
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise UserError(f"seeds must be at least 1, or name seeds as in [0, 1], got {seeds!r}")
    check_writable(place)
    configs = {name: job.write(place / "settings" / f"{folder_of(name)}.yaml", place) for name, job in jobs.items()}
    errors: dict[str, str] = {}
    line = Line() if in_notebook() and verbose else None
    with keep_lms(LMS):
        for done, (name, seed) in enumerate(runs := list(itertools.product(jobs, chosen))):
            if line:
                line.show(done / len(runs), f"run {done + 1} of {len(runs)}: {name}, seed {seed}", now=True)
            where = place / folder_of(name) / f"seed-{seed}"
            if error := _run(jobs[name], configs[name], where, seed):
                errors[str(where)] = error
            if verbose and not line:
                print(f"{name}, seed {seed}: {error or _summary(Run(where))}")
    if line:
        line.clear()
    if len(errors) == len(runs):
        raise UserError(f"every run failed; the first: {next(iter(errors.values()))}")
    return Comparison(place, list(jobs), errors)


def _jobs(
    methods: Iterable[Method] | Mapping[str, Method | Mapping[str, Any]],
    data: Data,
    lm: str | LMConfig | None,
    trainer: Mapping[str, Any],
    settings: Mapping[str, object],
) -> dict[str, Job]:
    """Return one job per method, by name; see `compare`."""
    listed = list(methods.items()) if isinstance(methods, Mapping) else [(_name(one), one) for one in methods]
    if not listed:
        raise UserError("methods must name at least one method")
    if len({folder_of(name) for name, _ in listed}) < len(listed):
        raise UserError("two methods have the same name; give a dict with a name for each")
    jobs: dict[str, Job] = {}
    known: set[str] = set()
    for name, given in listed:
        own: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"method": given}
        if "method" not in own:
            raise UserError(f"methods: {name!r} has no key 'method'; give a method's name")
        kind = own.pop("method")
        own_trainer = _trainer_settings(own.pop("trainer", None))
        settings_here = settings_of(method_settings(kind)[0])
        names_here = {*settings_here, *settings_of(L.Trainer), "budget"}
        shared = {key: value for key, value in settings.items() if key in names_here}
        known |= shared.keys()
        for key in own_trainer.keys() - settings_here.keys():
            shared.pop(key, None)
        jobs[name] = Job.of(kind, data, own.pop("lm", lm), {**shared, **own}, {**trainer, **own_trainer})
    if unused := settings.keys() - known:
        raise UserError(f"no method has the setting {min(unused)!r}")
    return jobs


def _trainer_settings(given: object) -> Mapping[str, Any]:
    """Return the settings of the trainer for all runs, or for those of one method."""
    if isinstance(given, L.Trainer):
        raise UserError("a Trainer trains once; give its settings as a dict, such as trainer={'max_steps': 130}")
    if not isinstance(given, Mapping | None):
        raise UserError(f"trainer must be a dict such as {{'max_steps': 130}}, got {given!r}")
    return given or {}


def _run(job: Job, config: Path, folder: Path, seed: int) -> str:
    """Train and test one method with one seed unless that is done; return the error in one line, or nothing."""
    spec = RunSpec(str(folder), (*job.configs, str(config)), job.options, seed, job.trains)
    spec.check_record()
    try:
        return "" if spec.done else attempt(spec)
    except SIGTERMException as stop:
        if stop.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from stop
        raise


@dataclass(frozen=True)
class Comparison:
    """Methods beside each other: mean and standard deviation over seeds.

    Attributes:
        folder: Where the runs are.
        methods: Their names, in the order that was given.
        errors: Errors of failed runs in one line each, by run folder.
    """

    folder: Path
    methods: list[str]
    errors: dict[str, str] = field(default_factory=dict)

    def runs(self, method: str) -> list[PromptRun]:
        """The finished runs of a method, by seed."""
        places = (self.folder / folder_of(method)).glob("seed-*")
        seeds = {int(found[1]): place for place in places if (found := SEED_FOLDER.fullmatch(place.name))}
        return [PromptRun(place) for _, place in sorted(seeds.items()) if (place / names.METRICS).is_file()]

    @property
    def table(self) -> pd.DataFrame:
        """One row per method: mean and standard deviation of each test metric over seeds, tokens and seconds.

        A metric that a seed does not have, or has as NaN, is NaN. Tokens and seconds are means over the runs that
        recorded them.
        """
        import pandas as pd

        found = {}
        for name in self.methods:
            runs = [Run(run.folder) for run in self.runs(name)]
            each = pd.DataFrame(
                [
                    {
                        **{
                            key.removeprefix("test/"): value
                            for key, value in run.metrics.items()
                            if key.startswith("test/") and "/predicted/" not in key
                        },
                        "train_tokens": run.budget.get("tokens", unrecorded),
                        "train_seconds": run.budget.get("seconds", unrecorded),
                    }
                    for run in runs
                    for unrecorded in [math.nan if run.trained else 0.0]
                ]
            )
            row: dict[str, Any] = {"seeds": len(runs)}
            for column in each.columns:
                cost = column.startswith("train_")
                if column != "examples":
                    row[column] = each[column].mean(skipna=cost)
                    if not cost:
                        row[f"{column}_sd"] = each[column].std(ddof=1, skipna=False) if len(runs) > 1 else 0.0
            found[name] = row
        return pd.DataFrame.from_dict(found, orient="index")

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report page of all runs.

        Args:
            out: The page, ``....html``; by default ``report.html`` in the folder.

        Returns:
            The page. The same as Markdown is written beside it.
        """
        from lightning_prompts.report import command

        page = Path(out) if out is not None else self.folder / "report.html"
        command.main([str(self.folder), "--out", str(page)])
        return page

    def _repr_html_(self) -> str:
        """The table and bars as a notebook shows them."""
        runs = {name: [Run(run.folder).metrics for run in self.runs(name)] for name in self.methods}
        rows = {}
        for name, row in self.table.to_dict("index").items():
            cells = {"seeds": str(row.pop("seeds"))}
            known = {key for metrics in runs[str(name)] for key in metrics}
            for column, value in row.items():
                if column.startswith("train_") and not math.isnan(value):
                    cells[column.replace("_", " ")] = f"{value:,.0f}"
                elif f"test/{column}" in known:
                    cells[column] = shown(column, value, row[f"{column}_sd"])
            rows[str(name)] = cells
        values = {
            metric: {name: [found.get(f"test/{metric}", math.nan) for found in each] for name, each in runs.items()}
            for metric in MAIN
        }
        failed = "".join(f"<p>failed: {escape(place)}: {escape(error)}</p>" for place, error in self.errors.items())
        return f"{table_html('method', rows)}{failed}{bars_html(values)}"

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table.to_string(float_format="{:.4g}".format))


def _name(method: Method) -> str:
    """What to call a method in a table."""
    if isinstance(method, PromptMethod):
        return type(method).__name__
    return Path(method).stem if is_yaml(method) else str(method)


def folder_of(name: str) -> str:
    """The folder of a method in a comparison."""
    return name.replace("/", "-")


def _summary(run: Run) -> str:
    shown = [
        f"{name} {run.metrics[f'test/{name}']:.4f}" for name in ("nll", "exact_match") if f"test/{name}" in run.metrics
    ]
    return ", ".join(shown) or "done"
