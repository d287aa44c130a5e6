"""`last.ckpt` exists whenever something was trained, and training goes on from it as if it had never stopped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_prompts.callbacks import LastCheckpoint
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import PromptMethod, RelaxedPromptTuning, SoftPromptTuning
from lightning_prompts.search.rounding import Rounding
from support.checkpoint_state import same, state_of
from support.models import SMALLEST
from support.training import trainer

LM = LMConfig(SMALLEST)
STEPS = 12  # epochs have four batches


def soft(scheduler: Any = None) -> SoftPromptTuning:
    return SoftPromptTuning(3, lm=LM, max_new_tokens=1, scheduler=scheduler)


def constant() -> SoftPromptTuning:
    """A learning rate that does not know where the run ends."""
    return soft(lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))


def plateau() -> SoftPromptTuning:
    return soft(lambda optimizer: ReduceLROnPlateau(optimizer, "val/nll", factor=0.5, patience=0, threshold=9))


def relaxed(metric: str) -> RelaxedPromptTuning:
    return RelaxedPromptTuning(
        3,
        lm=LM,
        max_new_tokens=1,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02),
        scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, metric, factor=0.5, patience=0, threshold=9),
    )


def rounded() -> RelaxedPromptTuning:
    return RelaxedPromptTuning(3, rounding=Rounding(every=2, examples=4, top_k=3), lm=LM, max_new_tokens=1)


class Saves(Callback):
    """Notes the steps that checkpoints are of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, *args: object) -> None:
        self.steps.append(trainer.global_step)


def fit(
    folder: Path,
    settings: dict[str, Any],
    make: Callable[[], PromptMethod] = soft,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
) -> tuple[Trainer, PromptMethod]:
    seed_everything(0)
    data = Antonyms(batch_size=4, max_train_examples=16, val_fraction=0.01, test_fraction=0.01)
    model, own = make(), [*callbacks, *([] if callbacks else [LastCheckpoint()])]
    common = {"enable_checkpointing": True, "max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 1}
    run = trainer(folder, **{**common, **settings}, callbacks=own)
    run.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return run, model


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"limit_val_batches": 0, "max_steps": 3}, 3),
        ({"limit_val_batches": 0, "max_steps": 8}, 8),
        ({"limit_val_batches": 0, "max_steps": -1, "max_epochs": 2}, 8),
        ({"check_val_every_n_epoch": 5, "max_steps": 7}, 7),
        ({"check_val_every_n_epoch": 5, "max_steps": -1, "max_epochs": 2}, 8),
        ({"val_check_interval": 50, "check_val_every_n_epoch": None, "max_steps": 6}, 6),
        ({"max_steps": 3}, 3),
        ({"limit_val_batches": 0, "max_steps": -1, "max_epochs": 1, "limit_train_batches": 1}, 1),
        ({"limit_val_batches": 0, "max_steps": 3, "accumulate_grad_batches": 2}, 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_without_a_validation_leaves_its_last_state(settings: dict[str, Any], step: int, tmp_path: Path) -> None:
    _, model = fit(tmp_path, settings)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    assert same(checkpoint["state_dict"], model.state_dict())


def logged(run: Trainer) -> int:
    """The step that a logger would be given."""
    return run.fit_loop.epoch_loop._batches_that_stepped


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("settings", "stopped"),
    [
        ({"limit_val_batches": 0}, 3),
        ({"limit_val_batches": 0}, 4),
        ({"limit_val_batches": 0}, 8),
        ({"check_val_every_n_epoch": 2}, 4),
        ({"accumulate_grad_batches": 2, "limit_val_batches": 0}, 4),
        ({"overfit_batches": 2, "limit_val_batches": 0}, 3),
        ({"overfit_batches": 2, "limit_val_batches": 0}, 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_finished_run_is_prolonged_as_if_it_had_not_ended(
    settings: dict[str, Any], stopped: int, tmp_path: Path
) -> None:
    fit(tmp_path / "whole", settings, constant)
    fit(tmp_path / "run", {**settings, "max_steps": stopped}, constant)
    fit(tmp_path / "run", settings, constant, resume=last(tmp_path / "run"))
    assert same(state_of(last(tmp_path / "run")), state_of(last(tmp_path / "whole")))


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}], ids=str)
def test_checkpoints_of_lightning_at_the_end_of_an_epoch_go_on_with_the_next(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Lightning would go on with an epoch of one batch."""
    fit(tmp_path / "whole", settings, constant)
    expected = state_of(last(tmp_path / "whole"))["state_dict"]
    at_epoch_end = ModelCheckpoint(tmp_path, "epoch", save_on_train_epoch_end=True)
    run, _ = fit(tmp_path / "run", {**settings, "max_steps": 4}, constant, [at_epoch_end])
    run.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("epoch", "after"):
        _, model = fit(tmp_path / name, settings, constant, resume=tmp_path / f"{name}.ckpt")
        assert same(model.state_dict(), expected), name


class KilledError(Exception):
    """In place of a kill."""


class Killer(Callback):
    """Ends a run as a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (soft, {}),
        (soft, {"limit_val_batches": 0}),
        (soft, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
        (soft, {"accumulate_grad_batches": 3, "max_steps": 6}),
        (rounded, {"val_check_interval": 2}),
        (rounded, {"check_val_every_n_epoch": 2}),
        (plateau, {"check_val_every_n_epoch": 2}),
        (plateau, {"val_check_interval": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_killed_run_goes_on_from_its_last_step(
    make: Callable[[], PromptMethod], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, _ = fit(tmp_path / "whole", settings, make, [LastCheckpoint(steps=1)])
    run = tmp_path / "run"
    for step in (2, 4, 5):  # within an epoch, and at its end
        resume = last(run) if last(run).exists() else None
        with pytest.raises(KilledError):
            fit(run, settings, make, [LastCheckpoint(steps=1), Killer(step)], resume)
        assert torch.load(last(run), weights_only=True)["global_step"] == step
    resumed, _ = fit(run, settings, make, [LastCheckpoint(steps=1)], last(run))
    assert same(state_of(last(run)), state_of(last(tmp_path / "whole")))
    assert logged(resumed) == logged(whole)


def test_a_plateau_steps_with_the_validations(tmp_path: Path) -> None:
    """Not with epochs that have none; no NLL is good enough for that threshold."""
    run, _ = fit(tmp_path, {"check_val_every_n_epoch": 2, "max_steps": 24}, plateau)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.02 / 8  # three validations, none of them good enough
    with pytest.raises(UserError, match=r"ReduceLROnPlateau waits for validations; set trainer\.limit_val_batches"):
        fit(tmp_path, {"limit_val_batches": 0}, plateau)
    with pytest.raises(UserError, match=r"no metric 'val/nl'; did you mean val/nll"):
        fit(tmp_path, {}, lambda: soft(lambda optimizer: ReduceLROnPlateau(optimizer, "val/nl")))


@pytest.mark.parametrize("metric", ["val/nll", "val/selection_loss"])
def test_a_plateau_is_of_any_metric_of_a_validation(metric: str, tmp_path: Path) -> None:
    run, _ = fit(tmp_path, {"max_steps": 8}, lambda: relaxed(metric))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.02 / 4  # two validations, none of them good enough


def test_a_run_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 60)
    monkeypatch.setattr("lightning_prompts.callbacks.last_checkpoint.time.monotonic", lambda: float(next(ticks)))
    saves = Saves()  # each step asks for the time once, and so does each checkpoint
    fit(tmp_path, {"limit_val_batches": 0, "max_steps": 9}, callbacks=[LastCheckpoint(minutes=3), saves])
    assert saves.steps == [3, 6, 9]


def test_intervals_are_checked() -> None:
    for settings, words in (({"minutes": 0}, "checkpoint.minutes must be"), ({"steps": 0}, "checkpoint.steps must be")):
        with pytest.raises(UserError, match=words):
            LastCheckpoint(**settings)  # type: ignore[arg-type]
