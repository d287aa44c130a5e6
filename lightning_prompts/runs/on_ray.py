"""Runs a sweep on Ray Tune, on this machine or on a cluster: several runs at once, each in a process of its own."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.runs.launcher import RunSpec, attempt
from lightning_prompts.runs.sweep import SweepConfig

INSTALL = "pip install 'lightning-prompts[sweep]'"
OBJECT_STORE = 100_000_000  # bytes; only small dictionaries go through it
# Set before Ray is imported: Ray reports no usage, prints no tables, stays in this folder and leaves Ctrl-C to us. Runs
# have normal priority and not that of background jobs, since the table has their seconds.
ENVIRONMENT = {
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


def check_ray() -> None:
    """Import Ray Tune.

    Raises:
        UserError: Ray Tune or a package that it needs is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    try:
        importlib.import_module("ray.tune")  # Ray may be installed without the packages that Tune needs
    except ImportError as error:
        package = error.name or getattr(error.__context__, "name", None) or "a package that it needs"
        raise UserError(
            f"several workers need Ray Tune: {package} is not installed; install it with: {INSTALL}, or leave out "
            "workers and --address"
        ) from error


def launch_on_ray(
    specs: Sequence[RunSpec],
    config: SweepConfig,
    folder: Path,
    address: str | None,
    end: Callable[[RunSpec, str], None],
) -> None:
    """Launch runs on Ray.

    Resuming relies on the run folders and not on ``Tuner.restore``, so an interrupted sweep continues on another
    cluster or with another version of Ray, and no pickled file of Ray is read.

    Args:
        specs: The runs.
        config: How many at once, and what each needs.
        folder: The folder of the sweep, which all machines of a cluster share.
        address: The cluster's, HOST:PORT or ``auto``; ``None`` for this machine.
        end: Called after each run with its error, which is empty after success.

    Raises:
        UserError: Ray does not start, there is no such cluster, or no machine has room for a run.
    """
    import ray

    _start(address)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".ray-", dir=folder if address else None)  # all machines must see it
    try:
        _tune(specs, config, scratch, end)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start(address: str | None) -> None:
    """Join a cluster, or start one on this machine."""
    import ray

    if address not in (None, "auto"):
        _check_address(address)
    for name, level in (("ray", logging.ERROR), ("ray.tune", logging.CRITICAL)):  # the table has the failures
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
                f"the Ray cluster at {address} refuses the connection ({said}); install its Ray version here, and if "
                "it needs a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN)"
            ) from error
        raise UserError(
            f"Ray does not start on this machine: {said}; it needs room in /dev/shm or the folder for temporary files"
        ) from error


def _check_address(address: str) -> None:
    """Connect once; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--address {address!r} must be HOST:PORT, as `ray start --head` prints it, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, said: str) -> UserError:
    return UserError(f"no Ray cluster at {address} ({said}); start one with `ray start --head`, or leave --address out")


def _tune(specs: Sequence[RunSpec], config: SweepConfig, scratch: str, end: Callable[[RunSpec, str], None]) -> None:
    """Run one trial for each run."""
    import ray
    from ray import tune

    room = ray.cluster_resources()
    gpus = config.gpus if config.gpus is not None else float(room.get("GPU", 0) >= 1)
    for kind, wanted in (("CPU", config.cpus), ("GPU", gpus)):
        if wanted > room.get(kind, 0):
            raise UserError(
                f"each run asks for {wanted:g} {kind}s ({kind.lower()}s in the sweep file), but there are "
                f"{room.get(kind, 0):g}"
            )

    class Trial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
        """A run as one step on the main thread of a worker, which receives signals."""

        def setup(self, config: dict[str, Any]) -> None:
            self.given, self.place = RunSpec.from_json(config["run"]), config["place"]

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """The run folder has everything."""

        def step(self) -> dict[str, Any]:
            return {"error": _attempt(self.given, self.place), "done": True}

    class Watch(tune.Callback):  # type: ignore[misc]
        """Reports the end of each trial."""

        def __reduce__(self) -> tuple[Any, ...]:
            return (tune.Callback, ())  # Ray pickles its callbacks; this one is of no use elsewhere

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
            end(RunSpec.from_json(trial.config["run"]), str((trial.last_result or {}).get("error", "")))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
            cause = " ".join(str(trial.get_error() or "the worker died").split())
            end(RunSpec.from_json(trial.config["run"]), cause[:300])

    def name(trial: Any) -> str:  # noqa: ANN401
        return str(trial.trial_id)

    tuner = tune.Tuner(
        tune.with_resources(Trial, {"cpu": config.cpus, "gpu": gpus}),
        param_space={"run": tune.grid_search([spec.to_json() for spec in specs]), "place": str(Path.cwd())},
        tune_config=tune.TuneConfig(
            num_samples=1,
            max_concurrent_trials=config.workers or None,
            time_budget_s=config.time_limit,
            reuse_actors=False,  # the memory of a run must not count for the next one
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=scratch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
            callbacks=[Watch()],
        ),
    )
    tuner.fit()


def _attempt(spec: RunSpec, place: str) -> str:
    """`attempt` in the folder that relative paths in configs start from."""
    try:
        os.chdir(place)
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{error.filename}: {error.strerror}; every machine of the cluster must see the same folders"
    return attempt(spec)
