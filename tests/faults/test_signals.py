"""A signal at any place of the loop: the run ends between two steps, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.callbacks import GradientScaling, LastCheckpoint, NonFiniteGuard, StopOnSignal
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.reuse import keep_lms
from lightning_prompts.methods import HardPromptSearch, PromptMethod, SoftPromptTuning
from lightning_prompts.prompts.initializers import FromText
from support.checkpoint_state import same
from support.models import SMALLEST
from support.training import trainer

BATCHES = 6  # of 4 of 12 examples: two epochs


class Sender(L.Callback):
    """Sends a signal to this process in one hook of one batch, and notes the hooks that it comes by."""

    def __init__(self, place: tuple[str, int] | None = None) -> None:
        self.place, self.places = place, list[tuple[str, int]]()
        self.validations: list[int] = []  # batches of each

    def send(self, trainer: L.Trainer, hook: str) -> None:
        place = (hook, trainer.fit_loop.total_batch_idx + 1)
        self.places.append(place)
        if place == self.place:
            self.place = None
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "start")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "end")

    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validations.append(0)
            self.send(trainer, "validation")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validations[-1] += 1

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.send(trainer, "epoch")


def soft() -> SoftPromptTuning:
    return SoftPromptTuning(3, lm=LMConfig(SMALLEST), max_new_tokens=1)


def search() -> HardPromptSearch:
    start = FromText(" ab")
    return HardPromptSearch(
        init=start, candidates=6, top_k=30, fluency=0.5, filter=False, lm=LMConfig(SMALLEST), max_new_tokens=1
    )


def fit(
    folder: Path,
    settings: dict[str, Any],
    *callbacks: L.Callback,
    resume: Path | None = None,
    make: Callable[[], PromptMethod] = soft,
) -> L.Trainer:
    L.seed_everything(0)
    data = Antonyms(batch_size=4, eval_batch_size=4, max_train_examples=12, val_fraction=0.01, test_fraction=0.01)
    # Two batches a step: the second step of each epoch has the one batch that is left.
    steps = 4 if "accumulate_grad_batches" in settings else BATCHES
    run = trainer(
        folder,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=2,
        enable_checkpointing=True,
        callbacks=[*callbacks, LastCheckpoint(), StopOnSignal()],
        **settings,
    )
    run.fit(make(), datamodule=data, ckpt_path=resume, weights_only=True)
    return run


def result(run: L.Trainer, path: Path) -> dict[str, Any]:
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    return {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
    }


HOOKS = ("start", "end", "validation", "epoch")


@pytest.mark.parametrize(
    ("settings", "hooks"),
    [
        ({"val_check_interval": 2}, HOOKS),
        ({}, ("end", "validation", "epoch")),  # the validation belongs to the end of an epoch
        ({"accumulate_grad_batches": 2}, ("start", "end")),
        ({"limit_train_batches": 1}, HOOKS),  # each step is the last one of its epoch
    ],
    ids=str,
)
def test_a_signal_anywhere(settings: dict[str, Any], hooks: tuple[str, ...], tmp_path: Path) -> None:
    look = Sender()
    with keep_lms():
        expected = result(fit(tmp_path / "whole", settings, look), tmp_path / "whole.ckpt")
        assert {hook for hook, _ in look.places} == set(HOOKS)
        assert max(batch for _, batch in look.places) == BATCHES
        for hook, batch in look.places:
            if hook not in hooks:
                continue
            folder = tmp_path / f"{hook}{batch}"
            code = 0
            sender, rest = Sender((hook, batch)), Sender()
            try:
                run = fit(folder, settings, sender)
            except SystemExit as ended:
                code = int(ended.code or 1)
                last = folder / "checkpoints" / "last.ckpt"
                assert "gradients" not in torch.load(last, weights_only=True), "it stops after a whole step"
                run = fit(folder, settings, rest, resume=last)
            assert sender.places + rest.places == look.places, f"{hook} of batch {batch}: each hook comes once"
            assert {*sender.validations} <= {2}, "a validation that has begun ends"
            assert code == 130 or (code == 0 and batch >= BATCHES - 1), f"{hook} of batch {batch}"
            assert same(result(run, tmp_path / "x.ckpt"), expected), f"{hook} of batch {batch}"


@pytest.mark.parametrize("make", [soft, search])
def test_a_checkpoint_while_gradients_are_accumulated(make: Callable[[], PromptMethod], tmp_path: Path) -> None:
    """A validation between two steps saves the gradients so far, too, and what a search keeps beside them."""
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 1}

    class Saver(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"batch-{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    expected = result(fit(tmp_path / "whole", settings, Saver(), make=make), tmp_path / "whole.ckpt")
    saved = sorted(tmp_path.glob("batch-*.ckpt"))
    between = [path for path in saved if "gradients" in torch.load(path, weights_only=True)]
    assert between
    assert len(between) < len(saved), "nothing is left behind a step"
    for path in between:
        resumed = fit(tmp_path / path.stem, settings, resume=path, make=make)
        assert same(result(resumed, tmp_path / "x.ckpt"), expected), path.stem


def test_the_guard_leaves_overflows_to_the_scaler(tmp_path: Path) -> None:
    """A scale that is far too high takes some steps to come down; that is no reason to change the learning rate."""
    L.seed_everything(0)
    model = SoftPromptTuning(3, lm=LMConfig(SMALLEST, dtype="float16"), max_new_tokens=1)
    data = Antonyms(batch_size=4, max_train_examples=16, val_fraction=0.01, test_fraction=0.01)
    guard, scaling = NonFiniteGuard(patience=2), GradientScaling(initial_scale=2.0**24)
    trainer(tmp_path, max_steps=16, max_epochs=-1, limit_val_batches=0, callbacks=[scaling, guard]).fit(
        model, datamodule=data
    )
    assert scaling.skipped > 4
    assert (guard.skipped, guard.restores) == (0, 0)
