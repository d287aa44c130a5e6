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
    used up. The counts land in ``budget.json``.

    Args:
        tokens: Stop after so many tokens; ``None`` for no limit.
        seconds: Stop after so many seconds; ``None`` for no limit.
    """

    def __init__(self, tokens: int | None = None, seconds: float | None = None) -> None:
        """Check the limits."""
        for name, value in (("tokens", tokens), ("seconds", seconds)):
            if value is not None and value <= 0:
                raise UserError(f"Budget.{name} must be above 0, got {value}")
        self.tokens, self.seconds = tokens, seconds
        self.used: dict[str, float] = {"tokens": 0, "seconds": 0.0, "steps": 0}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start counting."""
        self._start = time.perf_counter()
        self._before = cast("PromptMethod", pl_module).lm.tokens_forwarded

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop counting, and stop training where the limit is."""
        method = cast("PromptMethod", pl_module)
        self.used["seconds"] += time.perf_counter() - self._start
        self.used["tokens"] += method.lm.tokens_forwarded - self._before
        self.used["steps"] = trainer.global_step
        shares = [
            self.used[name] / limit for name, limit in (("tokens", self.tokens), ("seconds", self.seconds)) if limit
        ]
        method.budget_used = max(shares, default=0.0)
        pl_module.log("budget/tokens", float(self.used["tokens"]))
        if method.budget_used >= 1:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the counts."""
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "budget.json", self.used)

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on with them."""
        return dict(self.used)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts back."""
        self.used = dict(state_dict)
