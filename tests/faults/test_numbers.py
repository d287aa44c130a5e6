"""Numbers that are not finite, put into runs of the command line: the result is finite, and every fault is counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prompts.callbacks import NonFiniteGuard
from support.faults import METHODS, Run, command, last

# Counted from 0; each in a step of its own, also with two batches a step.
BATCHES = {"loss": {4, 9}, "gradient": {3, 12}, "weights": {7}}


def breaks_numbers(value: float) -> None:
    """Ahead of the guard: a loss, a gradient or a weight of some batches becomes ``value``."""
    backward, step, end = (
        getattr(NonFiniteGuard, name)
        for name in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
    )

    def due(trainer: Any, kind: str) -> bool:
        return trainer.fit_loop.total_batch_idx in BATCHES[kind]

    def on_before_backward(self: Any, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if due(trainer, "loss"):
            loss.mul_(value)
        backward(self, trainer, pl_module, loss)

    def on_before_optimizer_step(self: Any, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if due(trainer, "gradient"):
            next(part for part in pl_module.trainable_parameters() if part.grad is not None).grad.view(-1)[0] = value
        step(self, trainer, pl_module, optimizer)

    def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
        if due(trainer, "weights"):
            with torch.no_grad():
                pl_module.trainable_parameters()[0].view(-1)[0] = value
        end(self, trainer, pl_module, *args)
        assert all(torch.isfinite(part).all() for part in pl_module.trainable_parameters())

    for function in (on_before_backward, on_before_optimizer_step, on_train_batch_end):
        setattr(NonFiniteGuard, function.__name__, function)


# The guard asks whether numbers are finite, whatever the method: each method has one of both.
@pytest.mark.parametrize(("method", "value"), [*zip(METHODS, [float("nan"), float("inf")] * 2, strict=True)])
def test_faults_are_counted_and_leave_nothing_behind(method: str, value: float, tmp_path: Path) -> None:
    run = Run(command(method, tmp_path / "run"), tmp_path / "log", partial(breaks_numbers, value))
    assert run.wait() == 0, run.output
    checkpoint = torch.load(last(tmp_path / "run"), weights_only=True)
    for name, part in checkpoint["state_dict"].items():
        if part.is_floating_point() and name != "best_nll":
            assert torch.isfinite(part).all(), name
    guard = next(state for name, state in checkpoint["callbacks"].items() if "NonFiniteGuard" in name)
    assert (guard["skipped"], guard["restores"]) == (4, 1)
