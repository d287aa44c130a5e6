"""Loggers that a config names: what it leaves open, which settings they get, and how a run continues in them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_prompts.files import read_json
from lightning_prompts.runs import names
from lightning_prompts.runs.configs import flat

PROJECT = "lightning-prompts"
IDS = {"WandbLogger": "version", "MLFlowLogger": "run_id"}  # the setting that continues an earlier run


def fill(given: object, folder: Path, resumed: bool) -> Callable[[], None]:
    """Fill in what the config leaves open: the folder, the project, the name, and the ID of a resumed run.

    A W&B or MLflow run is named after the last two parts of its folder, as in ``soft_prompt/seed-0``, so that the runs
    of a sweep differ in name.

    Args:
        given: ``trainer.logger`` of the config.
        folder: The run folder.
        resumed: Whether the run in the folder is resumed or tested.

    Returns:
        A function that undoes it, so that the record of the run also fits another folder.
    """
    path = folder / names.LOGS / names.LOGGERS
    earlier = (read_json(path) if resumed else None) or {}
    before: list[tuple[Namespace, dict[str, Any]]] = []
    for node in given if isinstance(given, list) else [given]:
        if not isinstance(node, Namespace) or "init_args" not in node:
            continue
        settings = node.init_args
        kind = str(node.class_path).rpartition(".")[2]
        found: dict[str, str | None] = {"save_dir": str(folder)}
        title = "/".join(folder.absolute().parts[-2:])
        if kind == "WandbLogger":
            found |= {"name": title, "project": os.environ.get("WANDB_PROJECT", PROJECT)}
        elif kind == "MLFlowLogger":
            found |= {"run_name": title, "tracking_uri": _mlflow_store(settings)}
        if kind in earlier:
            found[IDS[kind]] = earlier[kind]
        opened = {name: settings.get(name) for name in found if name in settings and settings.get(name) in (None, "")}
        before.append((settings, opened))
        for name in opened:
            settings[name] = found[name]

    def undo() -> None:
        for settings, opened in before:
            for name, value in opened.items():
                settings[name] = value

    return undo


def _mlflow_store(settings: Namespace) -> str | None:
    """MLflow's own default, which ``mlflow ui`` shows; newer versions refuse Lightning's folder of files."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # two bars per validation
    if settings.get("save_dir"):
        return None
    try:
        return str(importlib.import_module("mlflow").get_tracking_uri())
    except ImportError:
        return None  # Lightning says what is missing


def log_settings(logger: Logger, record: Mapping[str, Any]) -> None:
    """Pass the settings of a run to a logger.

    Args:
        logger: `CSVLogger` gets the whole record; others get the settings by their names on the command line, such as
            ``model.length``, without callbacks, what is not set, and Lightning's defaults.
        record: The config of the run.
    """
    if isinstance(logger, CSVLogger):
        logger.log_hyperparams(dict(record))
        return
    settings = short(record)
    if isinstance(logger, MLFlowLogger) and logger.run_id is not None:  # MLflow refuses to change a setting
        client: Any = logger.experiment
        known = client.get_run(logger.run_id).data.params
        client.update_run(logger.run_id, status="RUNNING")
        settings = {name: value for name, value in settings.items() if name not in known}
    logger.log_hyperparams(settings)


def short(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that say what a run is, in one flat table.

    >>> short({"model": {"class_path": "a.B", "init_args": {"length": 4}}, "trainer": {"logger": None}})
    {'model': 'B', 'model.length': 4}
    """
    left_out = ("trainer.callbacks", "trainer.logger", "trainer.default_root_dir", "trainer.enable_", "overwrite")
    usual = {f"trainer.{name}": each.default for name, each in inspect.signature(L.Trainer).parameters.items()}
    return {
        name: value
        for name, value in flat(record, names.CONFIG).items()
        if value not in (None, "", []) and not name.startswith(left_out) and value != usual.get(name)
    }


def log_best(logger: Logger, record: Mapping[str, Any], metric: str, value: float, step: int) -> None:
    """Log the best validation score as ``best/NAME``, but not to ``metrics.csv``.

    TensorBoard shows it beside the settings, under HPARAMS.
    """
    if isinstance(logger, CSVLogger):
        return
    metrics = {f"best/{metric.rpartition('/')[2]}": value}
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(short(record), metrics, step)
    else:
        logger.log_metrics(metrics, step)


def ids(loggers: list[Logger]) -> dict[str, str]:
    """By class, the IDs that continue the runs of loggers; without classes of which there are several."""
    kinds = [type(each) for each in loggers]
    return {
        kind.__name__: str(each.version)
        for kind, each in zip(kinds, loggers, strict=True)
        if kind in (WandbLogger, MLFlowLogger) and kinds.count(kind) == 1 and each.version
    }


@contextmanager
def finished() -> Iterator[None]:
    """Finish the W&B run that a block starts, as the next run of this process would continue it."""
    before = _wandb_run()
    code = 1
    try:
        yield
        code = 0
    finally:
        run = _wandb_run()
        if run is not None and run is not before:
            run.finish(exit_code=code)


def _wandb_run() -> Any:  # noqa: ANN401 - `wandb.Run`
    return getattr(sys.modules.get("wandb"), "run", None)
