"""``lightning-prompts sweep``: seeds x methods x settings as trials of Ray Tune, here or on a cluster.

Resuming goes by the run folders, not by ``Tuner.restore``: a run that has its metrics is kept. So a sweep goes on after
whatever ended it, on another cluster or with another version of Ray, and seeds, methods and values can be added to it;
and no pickled file of Ray's is ever read.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import write_atomic
from lightning_prompts.studies.plan import SweepPlan, read_plan
from lightning_prompts.studies.runs import Run
from lightning_prompts.studies.tables import (
    Key,
    Results,
    by_metric,
    check_metric,
    long_table,
    mixture_tasks,
    ranked,
    side_by_side,
)

if TYPE_CHECKING:
    from lightning_prompts.studies.progress import Watch

INSTALL = "pip install 'ray[tune]>=2.48'"
OBJECT_STORE = 100_000_000  # bytes; nothing but small dictionaries passes through it
# Before Ray is imported: no calls home, no tables of its own on the screen, no change of folder, Ctrl-C is ours; and
# runs at the priority of any other, not of the background, since the table has their seconds.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        prog="lightning-prompts sweep",
        description="Seeds x methods x settings on Ray Tune, and a table: the best first. Runs that have their metrics "
        "are kept, so that the same command goes on with an interrupted sweep.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("-c", "--config", type=Path, required=True, metavar="SWEEP.yaml",
                      help="methods, tasks, seeds, settings; see experiments/sweep")  # fmt: skip
    made.add_argument("--address", help="a Ray cluster's, HOST:PORT or auto; this machine by default")
    made.add_argument("--folder", help="where everything goes, in place of the file's own")
    made.add_argument("--table", action="store_true", help="run nothing, print the table of what is there")
    return made


def main(args: Sequence[str]) -> int:
    """Run what is not done yet, print the tables.

    Args:
        args: The command line's words.

    Returns:
        0 if every run has its metrics, 1 if not, 130 after Ctrl-C.

    Raises:
        UserError: The sweep's file or the cluster is not as it has to be; or no run has the metric that the table is
            sorted by, which is said once the table is there.
    """
    given = parser().parse_args(list(args))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    try:
        importlib.import_module("ray.tune")  # Ray may be there without what its part Tune needs
    except ImportError as error:
        package = error.name or getattr(error.__context__, "name", None) or "a package that it needs"
        raise UserError(f"sweep needs Ray Tune: {package} is not installed; install it with: {INSTALL}") from error
    plan = read_plan(given.config, given.folder)
    runs = [run for group in plan.runs.values() for run in group]
    todo = [run for run in runs if not run.done]
    console = Console(stderr=True)
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are done and kept", highlight=False)
    errors: dict[str, str] = {}
    interrupted = False
    if todo and not given.table:
        try:
            errors = _run(todo, plan, given.address, console)
        except KeyboardInterrupt:
            interrupted = True
    found = results(plan)
    text = "\n".join(tables(plan, found, errors))
    write_atomic(plan.folder / "table.md", text + "\n")
    print(text)
    left = sum(not run.done for run in runs)
    if left:
        console.print(f"{left} of {len(runs)} runs are not done; the same command goes on with them", highlight=False)
    if interrupted:
        return 130
    check_metric(found, plan.config.metric)
    return int(bool(left))


def results(plan: SweepPlan) -> dict[Key, Results]:
    """What is done."""
    done = {key: [run.results() for run in group if run.done] for key, group in plan.runs.items()}
    return {key: by_metric(measured) for key, measured in done.items() if measured}


def tables(plan: SweepPlan, found: dict[Key, Results], errors: dict[str, str]) -> list[str]:
    """What is done, the best first; then what failed.

    Args:
        plan: The runs.
        found: See `results`.
        errors: What went wrong, by run folder.
    """
    failures: dict[Key, list[str]] = {}
    for key, group in plan.runs.items():
        done = [run for run in group if run.done]
        said = [f"seed {run.seed}: {errors[run.folder]}" for run in group if run.folder in errors]
        if done and len(done) < len(group):
            said.insert(0, f"{len(done)} of {len(group)} seeds")
        if said:
            failures[key] = said
    config = plan.config
    ordered = ranked(found, config.metric, config.mode)
    lines = long_table(ordered, failures, config.metric)
    if len(plan.tasks) > 1 and found:
        for what in ("exact_match", "nll"):
            lines += ["", *side_by_side(ordered, what, mixture_tasks(plan.tasks))]
    return lines


def _run(todo: Sequence[Run], plan: SweepPlan, address: str | None, console: Console) -> dict[str, str]:
    """Run on Ray; what went wrong, by run folder."""
    import ray

    _start(address)
    plan.folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".ray-", dir=plan.folder if address else None)  # all machines must see it
    try:
        from lightning_prompts.studies.progress import Watch

        with Watch(len(todo), console) as watch:
            _tune(todo, plan, watch, scratch)
        return watch.errors
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start(address: str | None) -> None:
    """Join a cluster, or make one of this machine."""
    import ray

    if address not in (None, "auto"):
        _check_address(address)
    for name, level in (("ray", logging.ERROR), ("ray.tune", logging.CRITICAL)):  # a failure is told in the table
        logging.getLogger(name).setLevel(level)
    settings: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        settings |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        if address == "auto":
            raise _no_cluster(address, said) from error
        if address:
            raise UserError(
                f"the Ray cluster at {address} does not let us in ({said}); install its Ray version here, and where it "
                "wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN)"
            ) from error
        raise UserError(
            f"Ray does not start on this machine: {said}; it needs room in /dev/shm or the folder for temporary files"
        ) from error


def _check_address(address: str) -> None:
    """Knock once; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--address {address!r} must be HOST:PORT, as `ray start --head` tells it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, said: str) -> UserError:
    return UserError(f"no Ray cluster at {address} ({said}); start one with `ray start --head`, or leave --address out")


def _tune(todo: Sequence[Run], plan: SweepPlan, watch: Watch, scratch: str) -> None:
    """One trial for each run."""
    import ray
    from ray import tune

    from lightning_prompts.studies.trial import Trial

    config = plan.config
    room = ray.cluster_resources()
    gpus = config.gpus if config.gpus is not None else float(room.get("GPU", 0) >= 1)
    for name, wanted in (("CPU", config.cpus), ("GPU", gpus)):
        if wanted > room.get(name, 0):
            raise UserError(
                f"each run asks for {wanted:g} {name}s ({name.lower()}s in the sweep's file), "
                f"and there are {room.get(name, 0):g}"
            )
    tuner = tune.Tuner(
        tune.with_resources(Trial, {"cpu": config.cpus, "gpu": gpus}),
        param_space={"run": tune.grid_search([run.to_json() for run in todo]), "place": str(Path.cwd())},
        tune_config=tune.TuneConfig(
            num_samples=1,
            max_concurrent_trials=config.at_once,
            time_budget_s=config.time_limit,
            reuse_actors=False,  # memory that a run has held must not count for the next one
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=scratch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
            callbacks=[watch],
        ),
    )
    tuner.fit()


def _name(trial: Any) -> str:  # noqa: ANN401 - Ray has no types
    return str(trial.trial_id)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
