"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint to go on from."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prompts.callbacks.last_checkpoint import LastCheckpoint

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(L.Callback):
    """On the first Ctrl-C or SIGTERM, finishes the step and a validation that has begun, saves, and ends the run.

    The exit code is 130 or 143, as shells have it. A second signal ends the run at once; what it goes on from is then
    the checkpoint before it. Of several processes one is enough to stop all, at the same step.

    Lightning's own way would save nothing, and end with 1 and 0. Where Lightning requeues jobs on a SLURM cluster,
    SIGTERM stays in its hands.
    """

    def __init__(self) -> None:
        """Nothing came yet."""
        super().__init__()
        self.signal: int | None = None  # what all processes have agreed to follow
        self._mine: int | None = None  # what came to this one
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, in Lightning's place; only a main thread can. What ignores a signal goes on ignoring it."""
        self.signal = self._mine = None
        if threading.current_thread() is not threading.main_thread():
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        requeued = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        for number in _SIGNALS[: 1 if requeued else 2]:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._mine is not None:
            self._listen_no_more()
            raise SIGTERMException(128 + number)
        self._mine = number
        log.warning("%s: stopping after this step; once more stops at once", signal.Signals(number).name)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Remember where the step begins."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Ask the loop to end, unless gradients are still being accumulated, which no checkpoint holds.

        Not at the end of an epoch, which Lightning would count as over: the next one's first step will do.
        """
        if trainer.global_step > self._step and self._asked(trainer) and not trainer.is_last_batch:
            _end_loop(trainer, True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Half a validation has no result."""
        if self.signal is not None:
            _end_loop(trainer, False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Now the loop may end."""
        if self.signal is not None and not trainer.sanity_checking and not trainer.is_last_batch and self._before:
            _end_loop(trainer, True)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether a signal reached any process; all know of it afterwards."""
        if trainer.world_size > 1:
            mine = torch.tensor(float(self._mine or 0), device=trainer.strategy.root_device)
            highest = float(trainer.strategy.reduce(mine, reduce_op="max"))
            self.signal = int(highest) or None
        else:
            self.signal = self._mine
        return self.signal is not None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, if the loop ended by our request."""
        between_steps = isinstance(exception, SIGTERMException) and not exception.code
        self._listen_no_more()
        if self.signal is None or not between_steps:
            return
        exception.code = 128 + self.signal  # type: ignore[attr-defined]
        if not trainer.checkpoint_callbacks:
            log.warning("stopped after step %d; nothing is saved, as checkpointing is off", trainer.global_step)
            return
        path = LastCheckpoint.path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        log.warning("stopped after step %d; go on with --ckpt_path %s", trainer.global_step, path)

    @property
    def exit_code(self) -> int:
        """0, or what a signal asks for that came so late that the run was at its end."""
        came = self.signal or self._mine
        return 0 if came is None else 128 + came

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _end_loop(trainer: L.Trainer, value: bool) -> None:
    """Lightning looks at this between steps, where everything is as a checkpoint needs it; there is no other way."""
    trainer._signal_connector.received_sigterm = value
