"""Log the speed of training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import lightning as L

from lightning_prompts.callbacks.files import logs_now
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class Throughput(L.Callback):
    """Logs seconds per step, and examples and LM tokens per second, averaged between two log steps.

    Tokens are those that the LM has run, so a prompt that the batch shares counts once. Time excludes validation.
    """

    def __init__(self) -> None:
        """Start with zero counts."""
        self._reset()

    def _reset(self) -> None:
        self._seconds = 0.0
        self._examples = self._steps = self._tokens = 0

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._tokens_before = cast("PromptMethod", pl_module).tokens_forwarded

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Stop the clock, and log at log steps."""
        self._seconds += time.perf_counter() - self._start
        self._steps += 1
        self._examples += len(batch)
        self._tokens += cast("PromptMethod", pl_module).tokens_forwarded - self._tokens_before
        if logs_now(trainer):
            (tokens,) = cast("PromptMethod", pl_module).data_parallel_rank.all_reduce(self._tokens)
            pl_module.log_dict(
                {
                    "throughput/seconds_per_step": self._seconds / self._steps,
                    "throughput/examples_per_second": self._examples / self._seconds,
                    "throughput/tokens_per_second": tokens / self._seconds,
                }
            )
            self._reset()
