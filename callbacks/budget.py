"""What training costs, and a limit to it, the same way for every method."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention

from callbacks.files import write_json
from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class Budget(L.Callback):
    """Counts the tokens that training runs through the LM and the seconds that it takes, and stops at a limit.

    Validation is left out of both. Learning rates and temperatures that fall over a run have fallen when the budget is
    used up. The counts land in ``budget.json``. Of several processes tokens are added up, and seconds are the mean.

    Args:
        tokens: Stop after so many tokens; ``None`` for no limit.
        seconds: Stop after so many seconds; ``None`` for no limit.
    """

    def __init__(self, tokens: int | None = None, seconds: float | None = None) -> None:
        """Check the limits."""
        for name, value in (("tokens", tokens), ("seconds", seconds)):
            if value is not None and value <= 0:
                raise UserError(f"budget.{name} must be above 0, got {value}")
        self.tokens, self.seconds = tokens, seconds
        self.used: dict[str, float] = {"tokens": 0, "seconds": 0.0, "steps": 0}
        self._time, self._tokens = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting; a resumed run goes on where it was, learning rates included."""
        cast("PromptMethod", pl_module).budget_used = self._share()
        self._mark(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and stop training where the limit is."""
        self._count(pl_module)
        self.used["steps"] = trainer.global_step
        pl_module.log("budget/tokens", float(self.used["tokens"]))
        cast("PromptMethod", pl_module).budget_used = share = self._share()
        if share >= 1:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last batch."""
        if trainer.state.fn == "fit":
            self._count(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out."""
        self._mark(pl_module)

    def _share(self) -> float:
        """How much of the tighter limit is used up."""
        limits = {"tokens": self.tokens, "seconds": self.seconds}
        return max((self.used[name] / limit for name, limit in limits.items() if limit), default=0.0)

    def _mark(self, pl_module: L.LightningModule) -> None:
        self._time, self._tokens = time.perf_counter(), cast("PromptMethod", pl_module).tokens_forwarded

    def _count(self, pl_module: L.LightningModule) -> None:
        time_before, tokens_before = self._time, self._tokens
        self._mark(pl_module)
        # All processes come to the same, so that they stop at the same step.
        replica = cast("PromptMethod", pl_module).replica
        tokens, seconds = replica.sums(self._tokens - tokens_before, self._time - time_before)
        self.used["seconds"] += seconds / replica.count
        self.used["tokens"] += int(tokens)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the counts."""
        self._count(pl_module)
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "budget.json", self.used)

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on with them."""
        return dict(self.used)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts back."""
        self.used = dict(state_dict)
