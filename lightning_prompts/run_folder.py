"""The run folder: what is written into it, when, and what of an earlier run goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_prompts.environment import environment
from lightning_prompts.errors import UserError
from lightning_prompts.files import FAST_LOADER, write_atomic
from lightning_prompts.lm import FrozenLM
from lightning_prompts.methods import PromptMethod

RESULTS = ("validation.json", "metrics.json", "predictions.jsonl", "generations.jsonl")
ENVIRONMENT = "environment.json"


class RunFolder(SaveConfigCallback):
    """Begins to write into the run folder once nothing can fail any more before the first step.

    By then the model and the checkpoint are loaded and every example was found to fit; a run that fails earlier leaves
    nothing behind. ``config.yaml`` is the record of the run.
    """

    loggers: Any = None  # those that the config names, one or several, or a switch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Not yet."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is trained, and make the loggers, one folder for each start: metrics.csv, and those of the config.

        The config's is TensorBoard by default; without any (``false``) there is no metrics.csv either.
        """
        assert isinstance(pl_module, PromptMethod)
        if trainer.is_global_zero:
            if self.config.overwrite and self.config.ckpt_path is None:
                _clear(Path(trainer.default_root_dir))
            print(pl_module.describe())
            print(f"run folder: {trainer.default_root_dir}")  # which has a name of the moment if none was given
        if self.loggers is not False:
            folder = Path(trainer.default_root_dir)
            version = trainer.strategy.broadcast(_next_version(folder / "logs"))
            given = self.loggers
            if given in (None, True):
                given = TensorBoardLogger(folder, name="logs", version=version, default_hp_metric=False)
            metrics = CSVLogger(folder, name="logs", version=version, flush_logs_every_n_steps=10)
            trainer.loggers = [metrics, *([given] if isinstance(given, Logger) else given)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``config.yaml`` and ``environment.json``, and give the settings to the loggers."""
        record = self._record(trainer)
        if trainer.is_global_zero:
            for name in RESULTS:  # of what was trained so far
                (Path(trainer.default_root_dir) / name).unlink(missing_ok=True)
            self._write(trainer, pl_module, record)
        settings = yaml.load(record, FAST_LOADER)
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is tested without training is a run, too, and this is its record."""
        folder = Path(trainer.default_root_dir)
        # The config of a training, or of the user's own, is left as it is.
        other = (folder / self.config_filename).exists() and not (folder / ENVIRONMENT).exists()
        if trainer.is_global_zero and self.config.ckpt_path is None and not (folder / "logs").exists() and not other:
            self._write(trainer, pl_module, self._record(trainer))

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, record: str) -> None:
        """``config.yaml``, and what it is run with."""
        assert isinstance(pl_module, PromptMethod)
        folder = Path(trainer.default_root_dir)
        write_atomic(folder / self.config_filename, record)
        lm = pl_module.language_model
        dtype = lm.model.dtype if isinstance(lm, FrozenLM) else None  # else behind a server
        found = environment(trainer.strategy.root_device, trainer.world_size, dtype, pl_module.lm_config.quantization)
        write_atomic(folder / ENVIRONMENT, json.dumps(found, indent=2) + "\n")

    def _record(self, trainer: L.Trainer) -> str:
        """The config, as YAML."""
        config = self.config.clone()
        config.trainer.default_root_dir = str(Path(trainer.default_root_dir))
        config.ckpt_path = None
        config.overwrite = False
        tested = config.pop("verbose", None) is not None  # which `fit` has no such setting for
        return str(self.parser.dump(config, skip_none=False, skip_validation=tested))


def _next_version(logs: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in logs.glob("version_*") if path.name[8:].isdigit()]
    return max(taken, default=-1) + 1


def check_writable(folder: Path) -> None:
    """Raise before hours of work, not after; nothing is left behind."""
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


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote under the names that it gives, and nothing else."""
    files = [*RESULTS, "config.yaml", "prompt.jsonl", "prompt.txt", "prompts.jsonl", "prompt_path.jsonl",
             "samples.jsonl", "budget.json", ENVIRONMENT]  # fmt: skip
    paths = [folder / name for name in files]
    for pattern in ("best.ckpt", "last.ckpt", "epoch=*-step=*.ckpt"):
        paths += (folder / "checkpoints").glob(pattern)
    for pattern in ("metrics.csv", "hparams.yaml", "events.out.tfevents.*"):
        paths += (folder / "logs").glob(f"version_*/{pattern}")
    for path in paths:
        if not path.is_dir():
            path.unlink(missing_ok=True)
    for path in (folder / "logs").glob("version_*"):
        if not any(path.iterdir()):
            path.rmdir()
