"""What training costs, and limits to it, the same way for every method."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

from lightning_prompts.callbacks.files import logs_now, write_json
from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import Usage
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)

GIGABYTE = 1e9


class Budget(L.Callback):
    """Counts what training runs through the LM, the seconds that it takes and the memory, and stops at a limit.

    Counted are tokens (with a gradient, without one, and by servers: see `Usage`), calls (texts that are scored, read
    or written), forward passes, seconds and steps, without validation; of several processes all tokens and calls
    together, and the mean of their seconds. The memory is the most that the process has held at a time since fitting
    began, loading and validation included, in gigabytes (1e9 bytes): resident memory on a CPU, Python and its packages
    included (outside of Linux since the process began, and 0 on Windows, which keeps no such count), what torch has
    allocated on a GPU; of several processes the largest.

    Learning rates and temperatures that fall over a run have fallen when tokens, calls or seconds are used up. Memory
    says nothing about how far a run is, so its limit just stops. The counts are logged as ``budget/...``, go on in a
    resumed run, and land in ``budget.json``. Answers of a server that were known from an earlier run cost nothing.
    Gradients that are being accumulated are first brought to their step; a run that is resumed with nothing left trains
    nothing.

    Args:
        tokens: Stop after so many tokens, all kinds together; ``None`` for no limit.
        seconds: Stop after so many seconds; ``None`` for no limit.
        calls: Stop after so many calls; ``None`` for no limit.
        memory_gb: Stop where so many gigabytes were held; ``None`` for no limit.
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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What an earlier run in this process has held is not this one's; the LM is loaded after this."""
        if stage == "fit":
            forget_peak(trainer.strategy.root_device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where a resumed run has nothing left, all stays as it is."""
        if self._share() >= 1:
            log.warning("%s, so nothing is trained; raise it to go on", self._used_up())
            trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting; a resumed run goes on where it was, learning rates included."""
        cast("PromptMethod", pl_module).budget_used = self._share()
        self._mark(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and stop training where a limit is."""
        self._count(trainer, pl_module)
        self.used["steps"] = trainer.global_step
        if logs_now(trainer):
            pl_module.log_dict({f"budget/{name}": float(value) for name, value in self.used.items() if name != "steps"})
        cast("PromptMethod", pl_module).budget_used = share = self._share()
        if cast("PromptMethod", pl_module).accumulating:
            return  # a run ends with a step
        if share >= 1 and not trainer.should_stop:
            if trainer.is_global_zero:
                log.warning("step %d: %s; training ends here", trainer.global_step, self._used_up())
            trainer.should_stop = True
        if self.memory_gb is not None and self.used["memory_gb"] >= self.memory_gb and not trainer.should_stop:
            log.warning("step %d: %.2f gigabytes were held, and budget.memory_gb is %g; training ends here",
                        trainer.global_step, self.used["memory_gb"], self.memory_gb)  # fmt: skip
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last batch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._count(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out."""
        self._mark(pl_module)

    def _share(self) -> float:
        """How much of the tightest limit is used up."""
        return max((self.used[name] / limit for name, limit in self.limits.items() if limit), default=0.0)

    def _used_up(self) -> str:
        """The tightest limit, in words."""
        name = max(self.limits, key=lambda name: self.used[name] / (self.limits[name] or math.inf))
        return f"budget.{name} is used up ({self.used[name]:.6g} of {self.limits[name]:g})"

    def _mark(self, pl_module: L.LightningModule) -> None:
        self._time, self._usage = time.perf_counter(), cast("PromptMethod", pl_module).usage + Usage()

    def _count(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        time_before, usage_before = self._time, self._usage
        self._mark(pl_module)
        added = self._usage - usage_before
        counts: dict[str, int] = {"tokens": added.tokens, **asdict(added)}
        # All processes come to the same, so that they stop at the same step. Those that share an LM's heads count the
        # same tokens, and have clocks and memory of their own.
        sums = cast("PromptMethod", pl_module).data_parallel_rank.all_reduce(*counts.values())
        for name, count in zip(counts, sums, strict=True):
            self.used[name] += int(count)
        seconds, memory = self._time - time_before, peak_memory(pl_module.device) / GIGABYTE
        self.used["seconds"] += _of_all(trainer, seconds, "mean")
        self.used["memory_gb"] = max(self.used["memory_gb"], _of_all(trainer, memory, "max"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the counts."""
        self._count(trainer, pl_module)
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "budget.json", self.used)

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on with them."""
        return dict(self.used)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts back."""
        self.used = {**self.used, **state_dict}


def _of_all(trainer: L.Trainer, value: float, how: str) -> float:
    """A number of this process, reduced over all."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.double, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(tensor, reduce_op=how))


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` start anew from what is held now, where the system can."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # another system, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at a time since `forget_peak`: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    try:
        import resource  # which Windows has not
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
