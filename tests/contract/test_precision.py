"""Loss scaling for float16 models, on a CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prompts.callbacks import GradientScaling, NonFiniteGuard
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.relaxations import GumbelSoftmax
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import (
    HardPromptSearch,
    LoraTuning,
    PrefixTuning,
    PromptMethod,
    RefinerTuning,
    RelaxedPromptTuning,
    SoftPromptTuning,
)
from lightning_prompts.objectives import BertScoreLoss
from lightning_prompts.refiners.networks import MLPRefiner
from support.models import TINY
from support.training import data, trainer

HALF = LMConfig(TINY, dtype="float16")
MAKE = {
    "soft": lambda lm: SoftPromptTuning(3, lm=lm, max_new_tokens=1),
    "prefix": lambda lm: PrefixTuning(3, lm=lm, max_new_tokens=1),
    "relaxed": lambda lm: RelaxedPromptTuning(3, lm=lm, max_new_tokens=1),
    "refiner": lambda lm: RefinerTuning(
        3, MLPRefiner(8), estimator=GumbelSoftmax(), objective=BertScoreLoss(), lm=lm, max_new_tokens=1
    ),
}

TRAINED = {
    **MAKE,
    "search": lambda lm: HardPromptSearch(2, candidates=32, lm=lm, max_new_tokens=1),
    "lora": lambda lm: LoraTuning(lm=lm, max_new_tokens=1),
}


def gradients(model: PromptMethod, folder: Path, *callbacks: L.Callback, **settings: Any) -> list[Tensor]:
    """Of the first step, as the optimiser gets them."""
    found: list[Tensor] = []
    model.configure_gradient_clipping = lambda *args, **kwargs: found.extend(  # type: ignore[method-assign]
        value.grad.clone() for value in model.trainable_parameters()
    )
    trainer(folder, max_steps=1, limit_val_batches=0, callbacks=list(callbacks), **settings).fit(
        model, datamodule=data()
    )
    return found


@pytest.mark.parametrize("name", MAKE)
def test_scaled_gradients_are_the_gradients(name: str, tmp_path: Path) -> None:
    found = {}
    for kind, lm, callbacks in (
        ("scaled", HALF, [GradientScaling(2.0**6)]),
        ("plain", LMConfig(TINY, dtype="float32"), []),
    ):
        L.seed_everything(0)
        found[kind] = torch.cat([value.flatten() for value in gradients(MAKE[name](lm), tmp_path, *callbacks)])
    distance = (found["scaled"] - found["plain"]).norm() / found["plain"].norm()
    assert distance < 0.05, "what float16 rounds away"


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_gradient_method_trains_through_quantised_weights(name: str, quantization: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    blocks = TINY.replace("hidden_size=32,intermediate_size=48", "hidden_size=64,intermediate_size=128")
    model = TRAINED[name](LMConfig(blocks, quantization=quantization))  # type: ignore[arg-type]
    model.configure_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit.fit(model, datamodule=data())
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    assert all(torch.isfinite(value).all() for value in model.trainable_parameters())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_precisions_are_left_alone(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        scaling = GradientScaling()
        fit = trainer(tmp_path, callbacks=[scaling], limit_val_batches=0)
        fit.fit(MAKE["soft"](LMConfig(TINY, dtype=dtype)), datamodule=data())
        assert scaling._plugin is None
        assert "train/scale" not in fit.callback_metrics


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflow_costs_one_step(accumulate: int, tmp_path: Path) -> None:
    """The scale is halved; prompt, optimiser and learning rate stay as they were."""
    L.seed_everything(0)
    model = MAKE["soft"](HALF)
    scaling = GradientScaling(2.0**12)
    seen: list[tuple[float, Tensor, float, int]] = []

    class Watch(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
            if trainer.fit_loop.total_batch_idx // accumulate == 1:
                loss.mul_(torch.inf)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if (trainer.fit_loop.total_batch_idx + 1) % accumulate == 0:
                optimizer = trainer.optimizers[0]
                steps = [int(state["step"]) for state in optimizer.state.values()]
                seen.append(
                    (
                        scaling._plugin.scale,
                        pl_module.current_prompt().detach().clone(),
                        optimizer.param_groups[0]["lr"],
                        steps[0],
                    )
                )

    fit = trainer(
        tmp_path,
        max_steps=4,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[scaling, Watch()],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        limit_train_batches=4,
    )
    fit.fit(model, datamodule=data())
    scales, prompts, rates, steps = zip(*seen, strict=True)
    assert scales == (2.0**12, 2.0**11, 2.0**11, 2.0**11)
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[1], prompts[2])
    assert steps == (1, 1, 2, 3)
    assert rates[0] == rates[1] > rates[2]
    assert scaling.skipped == 1
    assert fit.callback_metrics["train/skipped_steps"] == 1
    assert torch.isfinite(model.current_prompt()).all()


def test_the_scale_grows_again(tmp_path: Path) -> None:
    scaling = GradientScaling(4.0, growth_interval=2)
    trainer(tmp_path, max_steps=5, limit_val_batches=0, callbacks=[scaling]).fit(MAKE["soft"](HALF), datamodule=data())
    assert scaling._plugin.scale == 16.0


def test_where_scaling_does_not_help_it_says_so(tmp_path: Path) -> None:
    class Broken(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
            loss.mul_(torch.inf)

    fit = trainer(
        tmp_path, max_steps=20, max_epochs=-1, limit_val_batches=0, callbacks=[GradientScaling(4.0), Broken()]
    )
    with pytest.raises(UserError, match=r"the loss scale fell below 1 after 3 skipped steps: .* bfloat16"):
        fit.fit(MAKE["soft"](HALF), datamodule=data())


def test_fused_optimisers_are_refused(tmp_path: Path) -> None:
    model = SoftPromptTuning(3, lm=HALF, max_new_tokens=1, optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    with pytest.raises(UserError, match="AdamW with fused: true cannot be used"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[GradientScaling()]).fit(model, datamodule=data())


def test_a_resumed_run_has_the_same_scale(tmp_path: Path) -> None:
    found = []
    for folder, resume in (("whole", None), ("rest", tmp_path / "whole" / "step=3.ckpt")):
        L.seed_everything(3)
        model, scaling = MAKE["soft"](HALF), GradientScaling(4.0, growth_interval=2)
        saves = ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        fit = trainer(
            tmp_path / folder, callbacks=[saves, scaling], enable_checkpointing=True, max_steps=5, limit_val_batches=0
        )
        fit.fit(model, datamodule=data(), ckpt_path=resume, weights_only=True)
        found.append((scaling._plugin.scale, model.current_prompt().tolist()))
    assert found[0] == found[1]


def test_an_overflow_in_the_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No scale helps; the guard skips the steps, and the layer is named once. In evaluation it is an error."""
    L.seed_everything(0)
    model = MAKE["soft"](HALF)
    model.configure_model()
    model.lm.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 1e9)
    where = r"no finite numbers in float16 from model\.layers\.1\.mlp on.*set model\.lm\.dtype to bfloat16"
    before = model.current_prompt().detach().clone()
    trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[NonFiniteGuard()]).fit(model, datamodule=data())
    assert len([line for line in caplog.messages if re.search(where, line)]) == 1
    assert torch.equal(model.current_prompt(), before)
    with pytest.raises(UserError, match=where):
        trainer(tmp_path).test(model, datamodule=data(), verbose=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_scale": 0.0}, "initial_scale must be a finite number above 0"),
        ({"floor": float("nan")}, "floor must be a finite number"),
        ({"growth_interval": 0}, "growth_interval must be at least 1"),
        ({"initial_scale": 1.0, "floor": 2.0}, "must not be above initial_scale"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradientScaling(**settings)
