"""A signal at any place of the loop: the run ends between two steps, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.callbacks import GradientScaling, LastCheckpoint, NonFiniteGuard, StopOnSignal
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import SoftPromptTuning
from support.checkpoint_state import same
from support.models import TINY
from support.training import trainer

STEPS = 12  # of batches of 4, 16 examples: epochs of 4 batches


class Sender(L.Callback):
    """Sends a signal to this process in one hook of one batch."""

    def __init__(self, hook: str, batch: int) -> None:
        self.hook, self.batch = hook, batch

    def send(self, trainer: L.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.fit_loop.total_batch_idx + 1 == self.batch:
            self.batch = -1
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "start")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "end")

    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "epoch")


def fit(folder: Path, settings: dict[str, Any], *callbacks: L.Callback, resume: Path | None = None) -> L.Trainer:
    L.seed_everything(0)
    data = Antonyms(batch_size=4, max_train_examples=16, val_fraction=0.01, test_fraction=0.01)
    model = SoftPromptTuning(3, lm=LMConfig(TINY), max_new_tokens=1)
    run = trainer(folder, max_steps=STEPS // settings.get("accumulate_grad_batches", 1), max_epochs=-1,
                  limit_val_batches=2, enable_checkpointing=True,
                  callbacks=[*callbacks, LastCheckpoint(), StopOnSignal()], **settings)  # fmt: skip
    run.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return run


def result(run: L.Trainer, path: Path) -> dict[str, Any]:
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    return {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
    }


@pytest.mark.timeout(900)  # 48 runs, most of them resumed
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 3}, {"accumulate_grad_batches": 3}], ids=str)
def test_a_signal_anywhere(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = result(fit(tmp_path / "whole", settings), tmp_path / "whole.ckpt")
    stopped = 0
    for hook in ("start", "end", "validation", "epoch"):
        for batch in range(1, STEPS + 1):
            folder = tmp_path / f"{hook}{batch}"
            sender = Sender(hook, batch)
            code = 0
            try:
                run = fit(folder, settings, sender)
            except SystemExit as ended:
                code = int(ended.code or 1)
                run = fit(folder, settings, resume=folder / "checkpoints" / "last.ckpt")
            assert code in (0, 130)
            stopped += code > 0
            assert same(result(run, tmp_path / "x.ckpt"), expected), f"{hook} of batch {batch}"
    assert stopped >= 2 * (STEPS - 5)


def test_a_checkpoint_while_gradients_are_accumulated(tmp_path: Path) -> None:
    """A validation between two steps saves the gradients so far, too."""
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 2}

    class Saver(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"batch-{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    expected = result(fit(tmp_path / "whole", settings, Saver()), tmp_path / "whole.ckpt")
    saved = sorted(tmp_path.glob("batch-*.ckpt"))
    between = [path for path in saved if "gradients" in torch.load(path, weights_only=True)]
    assert between
    assert len(between) < len(saved), "nothing is left behind a step"
    for path in between:
        assert same(result(fit(tmp_path / path.stem, settings, resume=path), tmp_path / "x.ckpt"), expected), path.stem


def test_the_guard_leaves_overflows_to_the_scaler(tmp_path: Path) -> None:
    """A scale that is far too high takes some steps to come down; that is no reason to change the learning rate."""
    L.seed_everything(0)
    model = SoftPromptTuning(3, lm=LMConfig(TINY, dtype="float16"), max_new_tokens=1)
    data = Antonyms(batch_size=4, max_train_examples=16, val_fraction=0.01, test_fraction=0.01)
    guard, scaling = NonFiniteGuard(patience=2), GradientScaling(initial_scale=2.0**24)
    trainer(tmp_path, max_steps=16, max_epochs=-1, limit_val_batches=0, callbacks=[scaling, guard]).fit(
        model, datamodule=data
    )
    assert scaling.skipped > 4
    assert (guard.skipped, guard.restores) == (0, 0)
