"""What the host waits for between two steps, and what it may learn a step late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prompts.callbacks import NonFiniteGuard
from support.cases import TRAINED
from support.pretend_device import NAME, waits
from support.runs import trainer

GRADIENT = (
    "soft",
    "prefix, mlp",
    "distillation, prefix",
    "relaxed, gumbel",
    "refiner, mlp, gumbel",
    "refiner, bertscore",
    "lora",
)


class Counted(L.Callback):
    """Waits from one batch to the next."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.append(sum(waits.values()))


@pytest.mark.parametrize("name", GRADIENT)
def test_the_host_waits_once_a_step(name: str, tmp_path: Path) -> None:
    counted = Counted()
    case = TRAINED[name]
    fit = trainer(NAME, tmp_path, max_steps=5, log_every_n_steps=10**9, limit_val_batches=0)
    fit.callbacks.append(counted)
    fit.fit(case.make(), case.data())
    assert [later - earlier for earlier, later in zip(counted.seen[1:], counted.seen[2:], strict=False)] == [1] * 3


class Broken(L.Callback):
    """Breaks what is trained behind a step, ahead of the guard."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                broken = pl_module.trainable_parameters()[0]
                broken.view(-1)[:1].fill_(float("nan"))
                trainer.optimizers[0].state[broken]["exp_avg"].view(-1)[:1].fill_(float("nan"))


class Saved(L.Callback):
    """Saves a checkpoint behind each step, and keeps whether its prompt and optimiser are finite."""

    def __init__(self, folder: Path) -> None:
        self.path, self.finite = folder / "x.ckpt", list[bool]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.path)
        saved = torch.load(self.path, weights_only=True, map_location="cpu")
        values = [*saved["state_dict"].values(), *tree_leaves(saved["optimizer_states"])]
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        self.finite.append(all(bool(torch.isfinite(value).all()) for value in tensors if value.dim()))


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("step", [2, 4])
def test_what_is_broken_is_restored_before_it_is_kept_saved_or_trained_on(
    step: int, saving: bool, tmp_path: Path
) -> None:
    guard, saved, case = NonFiniteGuard(max_restores=1, snapshot_every=1000), Saved(tmp_path), TRAINED["soft"]
    fit = trainer(NAME, tmp_path, max_steps=4, log_every_n_steps=10**9, limit_val_batches=0)
    others = [one for one in fit.callbacks if not isinstance(one, NonFiniteGuard)]
    fit.callbacks[:] = [Broken(step), guard, *([saved] if saving else []), *others]
    model = case.make()
    fit.fit(model, case.data())
    assert (guard.restores, guard.skipped) == (1, 0)
    assert all(bool(torch.isfinite(value).all()) for value in model.trainable_parameters())
    assert saved.finite == ([True] * 4 if saving else [])
