"""Stop a run after its current step on Ctrl-C or SIGTERM, with a checkpoint for resuming."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prompts.callbacks.last_checkpoint import LastCheckpoint

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(L.Callback):
    """On the first Ctrl-C or SIGTERM, finishes the current step or validation, saves a checkpoint, and ends the run.

    The exit code is 130 or 143, as usual in shells. A second signal ends the run immediately, without another
    checkpoint. With several processes, a signal to one of them stops all at the same step.

    Lightning's default handlers save no checkpoint and exit with 1 and 0. If Lightning requeues jobs on a SLURM
    cluster, it handles SIGTERM itself.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        super().__init__()
        self.signal: int | None = None  # the signal that all processes have agreed on
        self._mine: int | None = None  # the signal that this process has received
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install handlers instead of Lightning's. This needs the main thread; ignored signals stay ignored."""
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
        log.warning("%s: stopping after this step; send it again to stop immediately", signal.Signals(number).name)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Remember the step at the start of the batch."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Request the end of the loop after an optimiser step, because checkpoints contain no accumulated gradients.

        After the last step of an epoch, wait for the end of the epoch, because its hooks would not run again.
        """
        if trainer.global_step > self._step and self._asked(trainer) and not trainer.is_last_batch:
            _end_loop(trainer, True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Withdraw the request, because an incomplete validation has no result."""
        if self.signal is not None:
            _end_loop(trainer, False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Request the end of the loop again."""
        if self.signal is not None and not trainer.sanity_checking and not trainer.is_last_batch and self._before:
            _end_loop(trainer, True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Request the end of the loop after the last step of an epoch, unless training is over with it."""
        loop = trainer.fit_loop
        epochs: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        over = (
            0 < trainer.max_steps <= trainer.global_step
            or 0 < (loop.max_epochs or 0) <= epochs
            or (trainer.should_stop and loop._can_stop_early)
        )
        if self._asked(trainer) and not over:
            _end_loop(trainer, True)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any process received a signal; informs all processes."""
        if trainer.world_size > 1:
            mine = torch.tensor(float(self._mine or 0), device=trainer.strategy.root_device)
            highest = float(trainer.strategy.reduce(mine, reduce_op="max"))
            self.signal = int(highest) or None
        else:
            self.signal = self._mine
        return self.signal is not None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save a checkpoint if the loop ended because of the request."""
        between_steps = isinstance(exception, SIGTERMException) and not exception.code
        self._listen_no_more()
        if self.signal is None or not between_steps:
            return
        exception.code = 128 + self.signal  # type: ignore[attr-defined]
        if not trainer.checkpoint_callbacks:
            log.warning("stopped after step %d without a checkpoint, because checkpointing is off", trainer.global_step)
            return
        path = LastCheckpoint.path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        log.warning("stopped after step %d; resume with --ckpt_path %s", trainer.global_step, path)

    @property
    def exit_code(self) -> int:
        """Exit code of a finished run: 0, or that of a signal that arrived at the end of the run."""
        came = self.signal or self._mine
        return 0 if came is None else 128 + came

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the earlier handlers."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _end_loop(trainer: L.Trainer, value: bool) -> None:
    """Set the flag that Lightning checks between steps, the only moments when the state is ready for a checkpoint."""
    trainer._signal_connector.received_sigterm = value
