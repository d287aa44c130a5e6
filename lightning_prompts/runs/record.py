"""Writes the record of a run: its settings, its environment, its loggers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_prompts.errors import UserError
from lightning_prompts.files import FAST_LOADER, write_atomic
from lightning_prompts.lm import FrozenLM
from lightning_prompts.methods import PromptMethod
from lightning_prompts.runs import loggers, names

PACKAGES = (
    "lightning-prompts",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "bitsandbytes",
    "openai",
    "ray",
)


class RunFolder(SaveConfigCallback):
    """Writes to the run folder only once the first step can start.

    By then the model and the checkpoint are loaded and every example fits the context window, so a run that fails
    earlier leaves no files. ``config.yaml`` is the record of the run.
    """

    given_loggers: Any = None  # of the config: one, several, or a switch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet; `SaveConfigCallback` writes here."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what is trained, and create the loggers in a new folder for each start.

        The loggers are ``metrics.csv`` and those of the config, TensorBoard by default. ``trainer.logger: false`` turns
        all of them off.
        """
        assert isinstance(pl_module, PromptMethod)
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            if self.config.overwrite and self.config.ckpt_path is None:
                clear(folder)
            print(pl_module.describe())
            print(f"run folder: {trainer.default_root_dir}")  # its name holds the time if the user gave none
        if self.given_loggers is not False:
            version = trainer.strategy.broadcast(_next_version(folder / names.LOGS))
            given = self.given_loggers
            if given in (None, True):
                given = TensorBoardLogger(folder, name=names.LOGS, version=version, default_hp_metric=False)
            metrics = CSVLogger(folder, name=names.LOGS, version=version, flush_logs_every_n_steps=10)
            trainer.loggers = [metrics, *([given] if isinstance(given, Logger) else given)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``config.yaml`` and ``environment.json``, and pass the settings to the loggers."""
        record = self._record(trainer)
        if trainer.is_global_zero:
            for name in (*names.RESULTS, names.SECONDS):  # they belong to an earlier state of the prompt
                (Path(trainer.default_root_dir) / name).unlink(missing_ok=True)
            self._write(trainer, pl_module, record)
        self.settings = yaml.load(record, FAST_LOADER)
        for logger in trainer.loggers:
            loggers.log_settings(logger, self.settings)
        if trainer.is_global_zero and (found := loggers.ids(trainer.loggers)):
            write_atomic(Path(trainer.default_root_dir) / names.LOGS / names.LOGGERS, json.dumps(found))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the best score; the last validation may have come at the end of training."""
        assert isinstance(pl_module, PromptMethod)
        for callback in trainer.checkpoint_callbacks:
            score = getattr(callback, "best_model_score", None)
            if score is not None and getattr(callback, "monitor", None) == pl_module.monitor.metric:
                step = trainer.global_step - 1  # as Lightning counts
                for logger in trainer.loggers:
                    loggers.log_best(logger, self.settings, pl_module.monitor.metric, float(score), step)
                return

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record of a test without training, which is a run as well."""
        folder = Path(trainer.default_root_dir)
        if self.config.ckpt_path is not None and trainer.loggers:  # log at the step of the checkpoint
            trainer.fit_loop.epoch_loop._batches_that_stepped = max(_step(self.config.ckpt_path) - 1, 0)
        # Keep the config of a training, and a config.yaml that the user wrote.
        foreign = (folder / self.config_filename).exists() and not (folder / names.ENVIRONMENT).exists()
        trained = self.config.ckpt_path is not None or (folder / names.LOGS).exists()
        if trainer.is_global_zero and not trained and not foreign:
            record = self._record(trainer)
            self._write(trainer, pl_module, record)
            for logger in trainer.loggers:
                loggers.log_settings(logger, yaml.load(record, FAST_LOADER))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write which checkpoint was tested: its place in the run folder, or its name elsewhere; and its step."""
        folder, given = Path(trainer.default_root_dir).absolute(), self.config.ckpt_path
        found: dict[str, object] = {"checkpoint": None, "step": None}
        if given is not None and trainer.is_global_zero:
            path = Path(given).absolute()
            place = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
            found = {"checkpoint": place, "step": _step(path)}
        if trainer.is_global_zero:
            write_atomic(folder / names.TESTED, json.dumps(found) + "\n")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, record: str) -> None:
        """Write ``config.yaml`` and ``environment.json``."""
        assert isinstance(pl_module, PromptMethod)
        folder = Path(trainer.default_root_dir)
        write_atomic(folder / self.config_filename, record)
        lm = pl_module.language_model
        dtype = lm.model.dtype if isinstance(lm, FrozenLM) else None  # else behind a server
        found = environment(trainer.strategy.root_device, trainer.world_size, dtype, pl_module.lm_config.quantization)
        write_atomic(folder / names.ENVIRONMENT, json.dumps(found, indent=2) + "\n")

    def _record(self, trainer: L.Trainer) -> str:
        """The config as YAML."""
        config = self.config.clone()
        config.trainer.default_root_dir = str(Path(trainer.default_root_dir))
        config.ckpt_path = None
        config.overwrite = False
        tested = config.pop("verbose", None) is not None  # `fit` has no such setting
        return str(self.parser.dump(config, skip_none=False, skip_validation=tested))


def environment(
    device: torch.device, processes: int, dtype: torch.dtype | None, quantization: str | None
) -> Mapping[str, object]:
    """Versions, machine and precision, as ``environment.json`` holds them; nothing names a person or a place.

    Args:
        device: The device of this process.
        processes: The number of processes.
        dtype: The LM's; ``None`` for an LM behind a server.
        quantization: The LM's quantization, if any.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def check_writable(folder: Path) -> None:
    """Check before hours of work that the run folder can be written; this leaves no files.

    Raises:
        UserError: The folder cannot be made or written.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"the run folder {folder} cannot be made: {existing} is a file")
    probe = existing / f".writable-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run folder {folder} is not writable: {error.strerror}") from error


def _step(checkpoint: str | Path) -> int:
    """The number of training steps of a checkpoint."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def _next_version(logs: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in logs.glob("version_*") if path.name[8:].isdigit()]
    return max(taken, default=-1) + 1


def clear(folder: Path) -> None:
    """Remove the files that an earlier run wrote, and no others."""
    own = (names.CONFIG, names.ENVIRONMENT, names.SECONDS, names.RECORD, *names.RESULTS, *names.TRAINING)
    paths = [folder / name for name in own]
    for pattern in (names.BEST, names.LAST, "epoch=*-step=*.ckpt"):
        paths += (folder / names.CHECKPOINTS).glob(pattern)
    paths.append(folder / names.LOGS / names.LOGGERS)
    for pattern in (names.CURVES, "hparams.yaml", "events.out.tfevents.*"):
        paths += (folder / names.LOGS).glob(f"version_*/{pattern}")
    for path in paths:
        if not path.is_dir():
            path.unlink(missing_ok=True)
    for path in (folder / names.LOGS).glob("version_*"):
        if not any(path.iterdir()):
            path.rmdir()
