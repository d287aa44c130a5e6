"""No NaN reaches a prompt: steps without finite numbers are skipped, and a prompt that is hurt is restored."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prompts.callbacks.files import logs_now
from lightning_prompts.errors import UserError
from lightning_prompts.lm.finite import first_not_finite

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.types import Batch

log = logging.getLogger(__name__)

STATE = "something trained is not finite"


class NonFiniteGuard(L.Callback):
    """Watches the loss, the gradients and what is trained.

    A step whose loss or gradients are not finite is skipped: optimiser, learning rate and prompt stay as they are.
    After ``patience`` such steps in a row, or as soon as something trained is not finite, the last good state is
    restored, optimiser included, and the learning rate halved. After ``max_restores`` of these, training ends with one
    line that names the first module whose output is not finite. In distributed training all processes decide alike.
    Works with automatic and with manual optimisation. Logs ``train/non_finite_steps`` and ``train/restores``; both
    counts are in checkpoints and in ``metrics.json``.

    On an accelerator the host asks once a step: whether the state is finite after a step is read together with the next
    step's gradients, and always before it is validated, kept or saved. In float16 it is read at once.

    Args:
        patience: Skipped steps in a row until the last good state is restored.
        max_restores: How often.
        snapshot_every: Good steps between two looks at the state that would be restored.
    """

    def __init__(self, patience: int = 5, max_restores: int = 3, snapshot_every: int = 20) -> None:
        """Check the numbers."""
        super().__init__()
        for name, value, least in (
            ("patience", patience, 1), ("max_restores", max_restores, 0), ("snapshot_every", snapshot_every, 1)
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        self.patience, self.max_restores, self.snapshot_every = patience, max_restores, snapshot_every
        self.skipped = self.restores = 0
        self._in_a_row = self._good = 0
        self._loss_finite: list[Tensor] = []  # of each loss since the last step; looked at together with the gradients
        self._state_finite: Tensor | None = None  # after the last step, where nobody has looked yet
        self._skipped_now = False
        self._step = 0
        self._snapshot: dict[str, Any] = {}
        self._batch: tuple[Batch, int] | None = None

    # --- the step -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an interrupted training has left."""
        self._loss_finite, self._state_finite = [], None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What training starts from is good."""
        self._keep(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch, in case it has to be looked into."""
        self._batch = (batch, batch_idx)
        self._skipped_now = False
        self._step = trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note whether the loss is finite; with accumulation, each of them."""
        self._loss_finite.append(torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Skip the step by taking the gradients away: optimisers pass over what has none.

        Gradients that overflow under a loss scale are the scaler's: it skips the step, counts it, and tries another.
        """
        flags, self._loss_finite = self._loss_finite, []
        if not _scaled(trainer):
            flags += [torch.isfinite(value.grad).all() for value in _values(optimizer) if value.grad is not None]
        state, self._state_finite = self._state_finite, None
        step_is_good, state_is_good = _all_agree(trainer, [flags, [] if state is None else [state]])
        if not state_is_good:  # so the gradients are those of a state that is gone
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
        """Restore where it is needed, and keep what is good."""
        numbers = [value for value in _state(pl_module).values() if value.is_floating_point()]
        self._state_finite = torch.stack([_healthy(value) for value in numbers]).all() if numbers else None
        good = not self._skipped_now and trainer.global_step > self._step
        keep = good and (self._good + 1) % self.snapshot_every == 0
        hurt = self._in_a_row >= self.patience
        on_cpu = self._state_finite is None or self._state_finite.device.type == "cpu"
        at_once = on_cpu or _in_float16(pl_module)
        restored = (at_once or keep or hurt or logs_now(trainer)) and self._look(trainer, pl_module)
        if hurt and not restored:
            self._restore(trainer, pl_module, f"{self._in_a_row} steps in a row had no finite loss or gradient")
        elif good and not restored:
            self._good += 1
            if keep:
                self._keep(trainer, pl_module)
        if logs_now(trainer):
            pl_module.log("train/non_finite_steps", float(self.skipped))
            pl_module.log("train/restores", float(self.restores))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is validated, or saved after it, that is not finite."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint between two steps holds what is restored."""
        if self._look(trainer, pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            if "optimizer_states" in checkpoint:
                optimizers, schedules = trainer.optimizers, trainer.lr_scheduler_configs
                checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(one) for one in optimizers]
                checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in schedules]
                checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise."""
        self._look(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what happened."""
        if self.skipped or self.restores:
            log.warning("%d steps were skipped for want of finite numbers, and the prompt was restored %d times",
                        self.skipped, self.restores)  # fmt: skip

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether something trained was not finite, and is restored."""
        state, self._state_finite = self._state_finite, None
        if state is None or _all_agree(trainer, [[state]])[0]:
            return False
        self._restore(trainer, pl_module, STATE)
        return True

    # --- what is restored ---------------------------------------------------------------------------------------------

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
            optimizer.zero_grad(set_to_none=True)  # what was accumulated belongs to the state that is gone
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if name in group:
                        group[name] = group[name] / 2
        for config in trainer.lr_scheduler_configs:
            _halve(config.scheduler)
        self._in_a_row = 0
        log.warning("step %d: %s; the last good state is back, with half the learning rate", trainer.global_step, why)

    def _first_bad_module(self, pl_module: L.LightningModule) -> str:
        """Run the batch again, and find out where numbers stop being finite."""
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
            return "all modules' outputs are finite, the loss is not"
        return "on this batch everything is finite again, so it was the gradient or the weights"

    def counts(self) -> dict[str, int]:
        """What goes into ``metrics.json``."""
        return {"train/non_finite_steps": self.skipped, "train/restores": self.restores}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "restores": self.restores, "in_a_row": self._in_a_row, "good": self._good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.skipped, self.restores = state_dict["skipped"], state_dict["restores"]
        self._in_a_row, self._good = state_dict["in_a_row"], state_dict["good"]


def _halve(scheduler: Any) -> None:
    """A scheduler's own idea of the learning rates, those that it is made of included."""
    for name in ("base_lrs", "max_lrs", "min_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])
    for part in getattr(scheduler, "_schedulers", []):
        _halve(part)


def _scaled(trainer: L.Trainer) -> bool:
    """Whether a loss scaler is at work."""
    return getattr(trainer.strategy.precision_plugin, "scaler", None) is not None


def _in_float16(pl_module: L.LightningModule) -> bool:
    """Whether the LM computes in float16, where a pass over a broken state is an error by itself."""
    return getattr(getattr(getattr(pl_module, "lm", None), "model", None), "dtype", None) == torch.float16


def _values(optimizer: Optimizer) -> list[nn.Parameter]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def _state(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Everything that a checkpoint would hold: the LM is not part of it."""
    return pl_module.state_dict()


def _healthy(value: Tensor) -> Tensor:
    """Whether all numbers are finite. A single infinity is the loss of a best prompt that has not been found yet."""
    return torch.isfinite(value).all() if value.dim() else ~torch.isnan(value)


def _all_agree(trainer: L.Trainer, groups: list[list[Tensor]]) -> list[bool]:
    """Whether all flags of a group are set in every process, asking the device once; an empty group is good."""
    if trainer.world_size == 1 and not any(groups):
        return [True] * len(groups)
    device = trainer.strategy.root_device
    good = [torch.stack(flags).all().to(device) if flags else torch.ones((), device=device) for flags in groups]
    bad = 1 - torch.stack([flag.float() for flag in good])
    return [count == 0 for count in trainer.strategy.reduce(bad, reduce_op="sum").tolist()]


@contextmanager
def _no_logging(pl_module: L.LightningModule) -> Iterator[None]:
    """A step that is only looked at leaves no metrics."""
    pl_module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.__dict__["log"]
