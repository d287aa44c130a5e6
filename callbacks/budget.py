"""Measure the cost of training and limit it, in the same way for every method."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer

from lightning_prompts.callbacks.files import logs_now, write_json
from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import FrozenLM, Usage
from lightning_prompts.runs.names import BUDGET
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

GIGABYTE = 1e9
IDLE = 100  # steps that use no LM, after which a run that only a budget ends is over


class Budget(L.Callback):
    """Counts the LM usage, the time and the memory of training, and stops training at a limit.

    The counts are tokens (with a gradient, without one, and by servers; see `Usage`), calls (scored, read or generated
    texts), forward passes, seconds and steps, all without validation. With several processes, tokens, calls and passes
    are summed, and seconds are averaged. Memory is the peak of the process since the start of fitting, including
    loading and validation, in gigabytes (1e9 bytes); with several processes, the largest peak. On a GPU, it is the
    memory that torch has allocated. On a CPU, it is the resident memory, including Python and its packages: since the
    start of the process outside of Linux, and 0 on Windows, which has no such count.

    Schedules of learning rates and temperatures are rescaled to the budget of tokens, calls and seconds. The memory
    limit does not change schedules, because memory does not measure progress. Counts are logged as ``budget/...``,
    continue in a resumed run, and are written to ``budget.json``. Cached answers of a server cost nothing. Training
    stops only after an optimiser step, so that no accumulated gradients are lost. A run that is resumed with exhausted
    tokens, calls or seconds does not train. A run with a limit of tokens or calls and no other end also stops after 100
    steps that use no LM, such as those of a search that has tried everything.

    Args:
        tokens: Maximum number of tokens of all kinds; ``None`` for no limit.
        seconds: Maximum number of seconds; ``None`` for no limit.
        calls: Maximum number of calls; ``None`` for no limit.
        memory_gb: Stop when the peak memory reaches this number of gigabytes; ``None`` for no limit.
    """

    def __init__(
        self,
        tokens: int | None = None,
        seconds: float | None = None,
        calls: int | None = None,
        memory_gb: float | None = None,
    ) -> None:
        """Check the limits."""
        self.limits = {"tokens": tokens, "calls": calls, "seconds": seconds}
        self.memory_gb = memory_gb
        for name, value in (*self.limits.items(), ("memory_gb", memory_gb)):
            if value is not None and value <= 0:
                raise UserError(f"budget.{name} must be above 0, got {value}")
            if value is not None:
                check_finite(f"budget.{name}", value)
        names = ("tokens", *asdict(Usage()))
        self.used: dict[str, float] = {**dict.fromkeys(names, 0), "seconds": 0.0, "steps": 0, "memory_gb": 0.0}
        self._time, self._usage = 0.0, Usage()
        self._memory = 0.0  # peak of this process, in gigabytes
        self._idle = 0  # steps in a row that used no LM

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the peak memory, because earlier runs in this process do not count. The LM is loaded after this."""
        if stage == "fit":
            forget_peak(trainer.strategy.root_device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skip training if the budget of a resumed run is exhausted."""
        if self._fraction_used() >= 1:
            log.warning("%s, so there is no training; raise the limit to continue", self._used_up())
            trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting; a resumed run continues its counts and its schedules."""
        cast("PromptMethod", pl_module).budget_used = self._fraction_used()
        self._mark(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and stop training at a limit."""
        calls = self.used["calls"]
        self._count(trainer, pl_module)
        self._idle = 0 if self.used["calls"] > calls else self._idle + 1
        self.used["steps"] = trainer.global_step
        if logs_now(trainer):
            pl_module.log_dict({f"budget/{name}": float(value) for name, value in self.used.items() if name != "steps"})
        cast("PromptMethod", pl_module).budget_used = used = self._fraction_used()
        if cast("PromptMethod", pl_module).accumulating:
            return  # stop only after an optimiser step
        if used >= 1 and not trainer.should_stop:
            if trainer.is_global_zero:
                log.warning("step %d: %s; stopping", trainer.global_step, self._used_up())
            trainer.should_stop = True
        if self._idle >= IDLE and self._endless(trainer, cast("PromptMethod", pl_module)) and not trainer.should_stop:
            if trainer.is_global_zero:
                log.warning(
                    "step %d: the last %d steps used no language model, so they never use up the budget; stopping",
                    trainer.global_step,
                    IDLE,
                )
            trainer.should_stop = True
        if self.memory_gb is not None and self._memory >= self.memory_gb and not trainer.should_stop:
            log.warning(
                "step %d: peak memory is %.2f gigabytes, but budget.memory_gb is %g; stopping",
                trainer.global_step,
                self._memory,
                self.memory_gb,
            )
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the work since the last batch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._count(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exclude the validation from the counts."""
        self._mark(pl_module)

    def _endless(self, trainer: L.Trainer, pl_module: PromptMethod) -> bool:
        """Whether only tokens or calls end the run, and none of them are answers that a server's cache gives."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        timed = self.limits["seconds"] or any(isinstance(callback, Timer) for callback in callbacks)
        counted = self.limits["tokens"] or self.limits["calls"]
        local = all(isinstance(lm, FrozenLM) for lm in pl_module.lms.values())
        return bool(counted and local and not timed and trainer.max_steps == -1 and trainer.max_epochs == -1)

    def _fraction_used(self) -> float:
        """Return the used fraction of the tightest limit."""
        return max((self.used[name] / limit for name, limit in self.limits.items() if limit), default=0.0)

    def _used_up(self) -> str:
        """Describe the tightest limit."""
        name = max(self.limits, key=lambda name: self.used[name] / (self.limits[name] or math.inf))
        return f"budget.{name} is used up ({self.used[name]:.6g} of {self.limits[name]:g})"

    def _mark(self, pl_module: L.LightningModule) -> None:
        self._time, self._usage = time.perf_counter(), cast("PromptMethod", pl_module).usage + Usage()

    def _count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        time_before, usage_before = self._time, self._usage
        self._mark(pl_module)
        added = self._usage - usage_before
        counts: dict[str, int] = {"tokens": added.tokens, **asdict(added)}
        # Reduce over processes, so that all stop at the same step. Tensor-parallel processes count the same tokens, but
        # have their own clock and memory.
        totals = cast("PromptMethod", pl_module).data_parallel_rank.all_reduce(*counts.values())
        for name, count in zip(counts, totals, strict=True):
            self.used[name] += int(count)
        seconds, memory = self._time - time_before, peak_memory(pl_module.device) / GIGABYTE
        self.used["seconds"] += _of_all(trainer, seconds, "mean")
        self._memory = _of_all(trainer, memory, "max")
        self.used["memory_gb"] = max(self.used["memory_gb"], self._memory)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the counts."""
        self._count(trainer, pl_module)
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / BUDGET, self.used)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, which a resumed run continues."""
        return dict(self.used)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.used = {**self.used, **state_dict}


def _of_all(trainer: L.Trainer, value: float, how: str) -> float:
    """Reduce a number over all processes."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.double, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op=how))


def forget_peak(device: torch.device) -> None:
    """Reset `peak_memory` to the current memory, if the system supports it."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # unsupported or not permitted
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process since `forget_peak` in bytes: allocated on a GPU, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    try:
        import resource  # missing on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
