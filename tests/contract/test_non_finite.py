"""Faults put into single steps: what is trained stays finite, training goes on, and counts are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_prompts.callbacks import NonFiniteGuard, ResultFiles
from lightning_prompts.cli import run
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.estimators.relaxations import GumbelSoftmax
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import PromptMethod, RefinerTuning, ReinforceRefiner, SoftPromptTuning
from lightning_prompts.refiners.networks import MLPRefiner
from support.models import SMALLEST
from support.training import MAKE, data, trainer

LM = LMConfig(SMALLEST)

METHODS: dict[str, Callable[[], PromptMethod]] = {
    **MAKE,
    "soft": lambda: SoftPromptTuning(3, lm=LM, max_new_tokens=1),
    "refiner": lambda: RefinerTuning(3, MLPRefiner(8), lm=LM, max_new_tokens=1),
    "refiner, gumbel": lambda: RefinerTuning(3, MLPRefiner(8), estimator=GumbelSoftmax(), lm=LM, max_new_tokens=1),
    "reinforce": lambda: ReinforceRefiner(2, 3, MLPRefiner(8), support=TopK(20), lm=LM, max_new_tokens=1),
}


class Fault(L.Callback):
    """Breaks the loss, a gradient or a weight at chosen steps; ahead of the guard, which stands after it."""

    def __init__(self, value: float, kinds: dict[int, str]) -> None:
        self.value, self.kinds = value, kinds

    def due(self, trainer: L.Trainer, kind: str) -> bool:
        return self.kinds.get(trainer.fit_loop.total_batch_idx) == kind

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        if self.due(trainer, "loss"):
            loss.mul_(self.value)
        if self.due(trainer, "loss alone"):  # the gradients are finite
            loss.detach().fill_(self.value)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.due(trainer, "gradient"):
            value = next(value for value in pl_module.trainable_parameters() if value.grad is not None)
            value.grad.view(-1)[0] = self.value

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.due(trainer, "weights"):
            with torch.no_grad():
                pl_module.trainable_parameters()[0].view(-1)[0] = self.value


class Finite(L.Callback):
    """Stands behind the guard: by now everything is finite."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        for value in pl_module.trainable_parameters():
            assert torch.isfinite(value).all()


KINDS = ("loss", "loss alone", "gradient", "weights")
ONE_EACH = ("loss", "gradient", "weights", "loss")


@pytest.mark.parametrize(
    ("name", "value", "kinds"),
    [
        # Every method meets every kind of fault; each kind by itself and with each value does not depend on the method.
        *((name, (torch.nan, torch.inf)[row % 2], ONE_EACH) for row, name in enumerate(METHODS)),
        *(("soft", value, (kind,) * 3) for value in (torch.nan, torch.inf) for kind in KINDS),
    ],
)
def test_faults_do_not_reach_the_prompt(name: str, value: float, kinds: tuple[str, ...], tmp_path: Path) -> None:
    L.seed_everything(0)
    model, guard = METHODS[name](), NonFiniteGuard(max_restores=9)
    fault = Fault(value, dict(zip((1, 2, 4, 5), kinds, strict=False)))
    fit = trainer(tmp_path, max_steps=7, max_epochs=-1, limit_val_batches=0, callbacks=[fault, guard, Finite()])
    fit.fit(model, datamodule=data())
    assert fit.global_step == 7
    assert all(torch.isfinite(part).all() for part in model.trainable_parameters())
    restores = kinds.count("weights")
    assert (guard.skipped, guard.restores) == (len(kinds) - restores, restores)
    assert fit.callback_metrics["train/non_finite_steps"] == guard.skipped
    assert fit.callback_metrics["train/restores"] == guard.restores


def test_a_skipped_step_leaves_optimiser_and_schedule_as_they_were(tmp_path: Path) -> None:
    L.seed_everything(0)
    model, seen = METHODS["soft"](), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            state = next(iter(trainer.optimizers[0].state.values()))
            seen.append(
                (
                    int(state["step"]),
                    state["exp_avg"].clone(),
                    trainer.optimizers[0].param_groups[0]["lr"],
                    pl_module.current_prompt().detach().clone(),
                )
            )

    callbacks = [Fault(float("nan"), {1: "gradient"}), NonFiniteGuard(), Watch()]
    trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=callbacks).fit(model, datamodule=data())
    (step0, average0, rate0, prompt0), (step1, average1, rate1, prompt1), (step2, _, rate2, prompt2) = seen
    assert (step0, step1, step2) == (1, 1, 2)
    assert torch.equal(average0, average1)
    assert rate0 == rate1 > rate2
    assert torch.equal(prompt0, prompt1)
    assert not torch.equal(prompt1, prompt2)


def test_after_some_in_a_row_the_last_good_state_is_back_at_half_the_rate(tmp_path: Path) -> None:
    L.seed_everything(0)
    model, prompts, rates = METHODS["soft"](), [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            prompts.append(pl_module.current_prompt().detach().clone())
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    guard = NonFiniteGuard(patience=2, snapshot_every=2)
    callbacks = [Fault(float("nan"), {3: "loss", 4: "loss"}), guard, Watch()]
    trainer(tmp_path, max_steps=7, max_epochs=-1, limit_val_batches=0, callbacks=callbacks).fit(
        model, datamodule=data()
    )
    assert (guard.skipped, guard.restores) == (2, 1)
    assert torch.equal(prompts[4], prompts[1]), "kept after the second good step"
    assert not torch.equal(prompts[3], prompts[1])
    assert rates[4] == pytest.approx(rates[3] / 2)
    assert rates[5] < rates[4]


def test_the_state_of_a_validation_is_a_good_state(tmp_path: Path) -> None:
    """What a method keeps of its best validation is part of its state."""
    L.seed_everything(0)
    model, prompts = METHODS["soft"](), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            prompts.append(pl_module.current_prompt().detach().clone())

    guard = NonFiniteGuard(patience=2, snapshot_every=100)
    callbacks = [Fault(float("nan"), {4: "loss", 5: "loss"}), guard, Watch()]
    settings = {"max_steps": 7, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer(tmp_path, **settings, callbacks=callbacks).fit(model, datamodule=data())
    assert guard.restores == 1
    assert torch.equal(prompts[5], prompts[2])


def test_it_gives_up_and_names_the_module(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = METHODS["soft"]()
    model.configure_model()
    model.lm.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    guard = NonFiniteGuard(patience=1, max_restores=2)
    fit = trainer(tmp_path, max_steps=20, max_epochs=-1, limit_val_batches=0, callbacks=[guard])
    with pytest.raises(UserError, match=r"after 2 restores .* is lm\.model\.model\.layers\.0\.mlp\. Lower the"):
        fit.fit(model, datamodule=data())
    assert all(torch.isfinite(value).all() for value in model.trainable_parameters())


def test_counts_are_in_the_checkpoint_and_in_the_metrics(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = METHODS["soft"]()
    callbacks = [Fault(torch.nan, {1: "loss", 2: "loss"}), NonFiniteGuard()]
    fit = trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=callbacks)
    fit.fit(model, datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    test = trainer(tmp_path, callbacks=[NonFiniteGuard(), ResultFiles()])
    test.test(METHODS["soft"](), datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train/non_finite_steps"] == 2
    assert metrics["train/restores"] == 0


def test_a_run_without_faults_is_what_it_was_without_the_guard(tmp_path: Path) -> None:
    prompts = []
    for callbacks in ([], [NonFiniteGuard(snapshot_every=1)]):
        L.seed_everything(0)
        model = METHODS["soft"]()
        trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=callbacks).fit(model, datamodule=data())
        prompts.append(model.current_prompt())
    assert torch.equal(*prompts)


def test_the_command_line_has_it(tmp_path: Path) -> None:
    assert (
        run(
            [
                "fit",
                "--model",
                "SoftPromptTuning",
                "--data",
                "Antonyms",
                "--model.lm.name",
                SMALLEST,
                "--data.max_train_examples",
                "8",
                "--trainer.max_steps",
                "1",
                "--trainer.limit_val_batches",
                "1",
                "--trainer.enable_progress_bar",
                "false",
                "--trainer.accelerator",
                "cpu",
                "--trainer.default_root_dir",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "lightning_prompts.callbacks.NonFiniteGuard" in config
    assert "lightning_prompts.callbacks.GradientScaling" in config


@pytest.mark.parametrize("settings", [{"patience": 0}, {"max_restores": -1}, {"snapshot_every": 0}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least"):
        NonFiniteGuard(**settings)
