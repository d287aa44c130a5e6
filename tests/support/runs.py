"""Runs of the table's methods on either device, and how to compare them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prompts import callbacks
from lightning_prompts.checkpoints import AtomicCheckpointIO
from lightning_prompts.cli import ALWAYS, CALLBACK_DEFAULTS, TRAINER_DEFAULTS
from lightning_prompts.export import command
from lightning_prompts.export.run import RestoredRun
from lightning_prompts.methods import PromptMethod
from support.cases import CALM_MODEL, MODEL, TRAINED, UNTRAINED
from support.pretend_device import NAME, STRATEGY

ALL = {**TRAINED, **UNTRAINED}
STEPS = 3
FORMATS = {
    "soft": "peft",
    "soft, reparametrised": "safetensors",
    "soft, infill": "npy",
    "soft, gradient checkpointing": "safetensors",
    "prefix": "peft",
    "prefix, mlp": "safetensors",
    "distillation": "safetensors",
    "distillation, prefix": "peft",
    "distillation, self-study": "npy",
    "lora": "peft",
}


@dataclass
class Recorder(L.Callback):
    """The tensors that training starts from and ends with, and what it logs in between."""

    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    logged: list[dict[str, float]] = field(default_factory=list)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = tensors(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.logged.append(
            {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = tensors(pl_module)


class SaveEach(ModelCheckpoint):
    """Keeps the checkpoint of every validation; Lightning tells it from the default ones by its class."""


@dataclass
class Run:
    """A finished training."""

    folder: Path
    record: Recorder
    metrics: dict[str, float]
    method: PromptMethod

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step={step}.ckpt"


Fit = Callable[..., Run]


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those of the LM included, on the CPU."""
    both = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: value.detach().cpu().clone() for name, value in both}


def train(
    name: str, device: str, folder: Path, dtype: str = "float32", resume: Path | None = None, steps: int = STEPS
) -> Run:
    """Train a method, validate after the second batch and at the end, and save after each validation."""
    L.seed_everything(1, verbose=False)
    record = Recorder()
    saves = SaveEach(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    fit = trainer(device, folder, record, saves, max_steps=steps, val_check_interval=2, log_every_n_steps=1)
    model = MODEL if dtype == "float32" else CALM_MODEL
    method = TRAINED[name].make(dtype, model)
    fit.fit(method, TRAINED[name].data(), ckpt_path=resume, weights_only=True)
    assert fit.global_step == steps
    return Run(folder, record, {key: value.item() for key, value in fit.callback_metrics.items()}, method)


def evaluate(
    name: str, device: str, folder: Path, checkpoint: Path | None, method: PromptMethod | None = None
) -> dict[str, Any]:
    """What ``validate``, ``test`` and ``predict`` write, and the metrics, of a checkpoint or of a method as it is."""
    L.seed_everything(2, verbose=False)
    again, method, data, found = trainer(device, folder), method or ALL[name].make(), ALL[name].data(), {}
    where: dict[str, Any] = {"datamodule": data, "ckpt_path": checkpoint, "weights_only": True}
    for what, quiet in (("validate", "verbose"), ("test", "verbose"), ("predict", "return_predictions")):
        getattr(again, what)(method, **where, **{quiet: False})
        found |= {key: value.item() for key, value in again.callback_metrics.items()}
    return {**found, **files(folder)}


def files(folder: Path) -> dict[str, Any]:
    """What a run has written beside checkpoints, by file."""
    readers: dict[str, Callable[[str], Any]] = {
        ".json": json.loads,
        ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
        ".txt": str,
    }
    found = {path.name: readers[path.suffix](path.read_text()) for path in folder.iterdir() if path.suffix in readers}
    for row in found.get("prompt_path.jsonl", []):
        row["vectors"] = np.frombuffer(base64.b64decode(row["vectors"]), np.float16).astype(float).tolist()
    return found


def assert_alike(one: Any, other: Any, tolerance: float = 1e-4, place: str = "") -> None:
    """Numbers are equal to rounding and the rest is equal; seconds, memory and counts since a start may differ."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance, nan_ok=True), place
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), place
        for key in one:
            if not any(word in key for word in ("seconds", "memory", "throughput", "train/calls", "train/tokens")):
                assert_alike(one[key], other[key], tolerance, f"{place}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, tolerance, f"{place}[{index}]")
    else:
        assert one == other, place


def default_callbacks() -> list[L.Callback]:
    """Every callback that a run of the command line has."""
    found: list[L.Callback] = [always() for always in ALWAYS]
    found += [callbacks.Budget(), callbacks.LastCheckpoint()]
    for config in CALLBACK_DEFAULTS:
        name, settings = config["class_path"].rpartition(".")[2], config.get("init_args", {})
        found.append(ModelCheckpoint(**settings) if name == "ModelCheckpoint" else getattr(callbacks, name)(**settings))
    return found


def trainer(device: str, folder: Path, *more: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer as the command line makes one, for ``"cpu"`` or the pretend device."""
    where = {"accelerator": NAME, "strategy": STRATEGY} if device == NAME else {"accelerator": device}
    used = default_callbacks()
    for callback in used:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "checkpoints")
    standard = {**TRAINER_DEFAULTS, **where, "default_root_dir": folder, "callbacks": [*used, *more]}
    made = L.Trainer(**{**standard, "logger": False, "enable_progress_bar": False, **settings})
    made.strategy.checkpoint_io = AtomicCheckpointIO()
    return made


def export_format(name: str) -> str | None:
    """A format that a case of the table is exported in; ``None`` where export is refused."""
    if name.startswith(("refiner", "latent seek", "scratch", "reinforce, mlp", "reinforce, transformer")):
        return None
    return FORMATS.get(name, "text")


def export(name: str, made: str, checkpoint: Path | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Export a case of the table, which has no config to rebuild it from."""
    again = trainer("cpu", folder / "run", limit_test_batches=0)
    rebuilt = RestoredRun(folder / "run", checkpoint, again, ALL[name].make(), ALL[name].data())
    monkeypatch.setattr(command, "open_run", lambda *args: rebuilt)
    base = [] if made == "text" else ["--base", str(folder / "base")]
    assert command.main([str(folder / "run"), "--format", made, "--out", str(folder / "out"), *base]) == 0
    return folder / "out"
