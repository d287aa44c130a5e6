"""Protect training against NaN and infinity: skip non-finite steps, and restore non-finite state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prompts.callbacks.files import logs_now
from lightning_prompts.errors import UserError
from lightning_prompts.lm.failures import first_not_finite

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.types import Batch

log = logging.getLogger(__name__)

STATE = "a trained parameter is not finite"


class NonFiniteGuard(L.Callback):
    """Checks the loss, the gradients and the trained state.

    A step with a non-finite loss or gradient is skipped, without a change of prompt, optimiser and learning rate. After
    ``patience`` consecutive skipped steps, or if the trained state is not finite, the last good state is restored
    including the optimiser, and the learning rate is halved. After ``max_restores`` restores, training ends with an
    error that names the first module with a non-finite output. All processes of a distributed run take the same
    decision. Automatic and manual optimisation are supported. Logs ``train/non_finite_steps`` and ``train/restores``;
    checkpoints and ``metrics.json`` contain both counts.

    On an accelerator, the host waits once per step: it reads the check of the state together with the check of the next
    gradients, and always before the state is validated, snapshotted or saved. With float16, it reads the check of the
    state immediately.

    Args:
        patience: Consecutive skipped steps before the last good state is restored.
        max_restores: Maximum number of restores.
        snapshot_every: Good steps between snapshots of the state, besides those at each validation.
    """

    def __init__(self, patience: int = 5, max_restores: int = 3, snapshot_every: int = 20) -> None:
        """Check the numbers."""
        super().__init__()
        limits = (("patience", patience, 1), ("max_restores", max_restores, 0), ("snapshot_every", snapshot_every, 1))
        for name, value, least in limits:
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        self.patience, self.max_restores, self.snapshot_every = patience, max_restores, snapshot_every
        self.skipped = self.restores = 0
        self._in_a_row = self._good = 0
        self._loss_finite: list[Tensor] = []  # one flag per loss since the last step, read together with the gradients
        self._state_finite: Tensor | None = None  # flag of the state after the last step, if it has not been read
        self._skipped_now = False
        self._step = 0
        self._snapshot: dict[str, Any] = {}
        self._batch: tuple[Batch, int] | None = None

    # --- the step -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear the flags of an interrupted training."""
        self._loss_finite, self._state_finite = [], None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a snapshot of the initial state."""
        self._keep(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch for an error report."""
        self._batch = (batch, batch_idx)
        self._skipped_now = False
        self._step = trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Record whether the loss is finite; with gradient accumulation, for each loss."""
        self._loss_finite.append(torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Skip a non-finite step by removing the gradients, because optimisers ignore parameters without gradients.

        With a loss scaler, gradients are not checked here, because the scaler skips and counts overflowing steps.
        """
        flags, self._loss_finite = self._loss_finite, []
        if not _scaled(trainer):
            flags += [torch.isfinite(value.grad).all() for value in _values(optimizer) if value.grad is not None]
        state, self._state_finite = self._state_finite, None
        step_is_good, state_is_good = _all_agree(trainer, [flags, [] if state is None else [state]])
        if not state_is_good:  # the gradients belong to the discarded state
            self._restore(trainer, pl_module, STATE)
            self._skipped_now = cast("PromptMethod", pl_module).step_skipped = True
            return
        if step_is_good:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        self._skipped_now = True
        for value in _values(optimizer):
            value.grad = None
        cast("PromptMethod", pl_module).step_skipped = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Restore the state if necessary, and keep snapshots of good states."""
        numbers = [value for value in _state(pl_module).values() if value.is_floating_point()]
        self._state_finite = torch.stack([_healthy(value) for value in numbers]).all() if numbers else None
        good = not self._skipped_now and trainer.global_step > self._step
        keep = good and (self._good + 1) % self.snapshot_every == 0
        hurt = self._in_a_row >= self.patience
        on_cpu = self._state_finite is None or self._state_finite.device.type == "cpu"
        at_once = on_cpu or _in_float16(pl_module)
        restored = (at_once or keep or hurt or logs_now(trainer)) and self._look(trainer, pl_module)
        if hurt and not restored:
            self._restore(trainer, pl_module, f"{self._in_a_row} consecutive steps had a non-finite loss or gradient")
        elif good and not restored:
            self._good += 1
            if keep:
                self._keep(trainer, pl_module)
        if logs_now(trainer):
            pl_module.log("train/non_finite_steps", float(self.skipped))
            pl_module.log("train/restores", float(self.restores))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the state, so that no non-finite state is validated or saved."""
        self._look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a snapshot, as the validation may have found the best prompt so far."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._keep(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the state, and save the restored state if it was not finite."""
        if self._look(trainer, pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            if "optimizer_states" in checkpoint:
                optimizers, schedules = trainer.optimizers, trainer.lr_scheduler_configs
                checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(one) for one in optimizers]
                checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in schedules]
                checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the state."""
        self._look(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of skipped steps and restores."""
        if self.skipped or self.restores:
            log.warning(
                "skipped %d steps with non-finite numbers, and restored the prompt %d times",
                self.skipped,
                self.restores,
            )

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Read the flag of the state; restore the state and return true if it is not finite."""
        state, self._state_finite = self._state_finite, None
        if state is None or _all_agree(trainer, [[state]])[0]:
            return False
        self._restore(trainer, pl_module, STATE)
        return True

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._snapshot = {
            "state": {name: value.detach().clone() for name, value in _state(pl_module).items()},
            "optimizers": [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
        }

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule, why: str) -> None:
        self.restores += 1
        if self.restores > self.max_restores:
            raise UserError(
                f"step {trainer.global_step}: {why}, after {self.max_restores} restores with half the learning rate "
                f"each; {self._first_bad_module(pl_module)}. Lower the learning rate, or set model.lm.dtype to "
                "bfloat16 or float32"
            )
        state = _state(pl_module)
        with torch.no_grad():
            for name, value in self._snapshot["state"].items():
                state[name].copy_(value)
        for optimizer, kept in zip(trainer.optimizers, self._snapshot["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(kept)})
            optimizer.zero_grad(set_to_none=True)  # accumulated gradients belong to the discarded state
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if name in group:
                        group[name] = group[name] / 2
        for config in trainer.lr_scheduler_configs:
            _halve(config.scheduler)
        self._in_a_row = 0
        log.warning("step %d: %s; restored the last good state, with half the learning rate", trainer.global_step, why)

    def _first_bad_module(self, pl_module: L.LightningModule) -> str:
        """Run the batch again, and describe where the first non-finite number appears."""
        if self._batch is None:
            return "the cause is unknown"
        losses: list[Any] = []
        batch = self._batch
        with _no_logging(pl_module), torch.enable_grad():
            found = first_not_finite(pl_module, lambda: losses.append(pl_module.training_step(*batch)))
        if found:
            return f"the first module whose output is not finite is {found}"
        (loss,) = losses
        if isinstance(loss, Tensor) and not torch.isfinite(loss).all():
            return "the outputs of all modules are finite, but the loss is not"
        return "with the restored state, this batch has only finite numbers, so the gradient or the weights were not"

    def counts(self) -> dict[str, int]:
        """Return the counts for ``metrics.json``."""
        return {"train/non_finite_steps": self.skipped, "train/restores": self.restores}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.skipped, "restores": self.restores, "in_a_row": self._in_a_row, "good": self._good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.skipped, self.restores = state_dict["skipped"], state_dict["restores"]
        self._in_a_row, self._good = state_dict["in_a_row"], state_dict["good"]


def _halve(scheduler: Any) -> None:
    """Halve the learning rates in a scheduler and in its nested schedulers."""
    for name in ("base_lrs", "max_lrs", "min_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])
    for part in getattr(scheduler, "_schedulers", []):
        _halve(part)


def _scaled(trainer: L.Trainer) -> bool:
    """Whether a loss scaler is active."""
    return getattr(trainer.strategy.precision_plugin, "scaler", None) is not None


def _in_float16(pl_module: L.LightningModule) -> bool:
    """Whether the LM is in float16, which raises an error for a pass with a non-finite state."""
    return getattr(getattr(getattr(pl_module, "lm", None), "model", None), "dtype", None) == torch.float16


def _values(optimizer: Optimizer) -> list[nn.Parameter]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _state(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Return the state of a checkpoint, which does not include the LM."""
    return pl_module.state_dict()


def _healthy(value: Tensor) -> Tensor:
    """Whether all numbers are finite. A scalar may be infinite: the initial loss of the best prompt is."""
    return torch.isfinite(value).all() if value.dim() else ~torch.isnan(value)


def _all_agree(trainer: L.Trainer, groups: list[list[Tensor]]) -> list[bool]:
    """Whether all flags of each group are set in all processes, with one wait for the device; empty groups are good."""
    if trainer.world_size == 1 and not any(groups):
        return [True] * len(groups)
    device = trainer.strategy.root_device
    good = [torch.stack(flags).all().to(device) if flags else torch.ones((), device=device) for flags in groups]
    bad = 1 - torch.stack([flag.float() for flag in good])
    return [count == 0 for count in trainer.strategy.reduce(bad, reduce_op="sum").tolist()]


@contextmanager
def _no_logging(pl_module: L.LightningModule) -> Iterator[None]:
    """Disable the logging of a step that is repeated for diagnosis."""
    pl_module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.__dict__["log"]
