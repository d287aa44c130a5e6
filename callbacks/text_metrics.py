"""Additional metrics of generated answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_prompts.errors import UserError
from lightning_prompts.objectives.rewards import Reward
from lightning_prompts.template import final_result
from lightning_prompts.types import MEASURED

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod
    from lightning_prompts.types import Batch


class TextMetrics(L.Callback):
    """Rates the generations of validation and tests with rewards, the functions that also train `ReinforceRefiner`.

    Logs means over examples as ``val/NAME`` and ``test/NAME`` (``bertscore``, ``token_f1``, ``numeric_match``). Names
    that methods log themselves get a prefix: ``text_exact_match``.

    Args:
        rewards: The rewards.
    """

    def __init__(self, rewards: list[Reward]) -> None:
        """Check that all rewards need only texts."""
        super().__init__()
        for reward in rewards:
            if reward.needs_likelihood:
                raise UserError("TextMetrics rates texts only; for the likelihood of answers see val/nll and test/nll")
        self.rewards = rewards

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that all rewards are available, before the run starts."""
        for reward in self.rewards:
            reward.check(trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PromptMethod,  # type: ignore[override]
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rate a batch of validation."""
        self._judge(pl_module, "val", outputs["rows"], batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PromptMethod,  # type: ignore[override]
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rate a batch of a test set."""
        self._judge(pl_module, batch.split, outputs["rows"], batch)

    def _judge(self, pl_module: PromptMethod, split: str, rows: Sequence[dict[str, Any]], batch: Batch) -> None:
        pairs = [
            (final_result(str(row["generated"]), example.extract), str(row["answer"]))
            for row, example in zip(rows, batch.examples, strict=True)
        ]
        for reward in self.rewards:
            values = pl_module.map_across_ranks(pairs, functools.partial(_values, reward))
            name = f"text_{reward.name}" if reward.name in MEASURED else reward.name
            pl_module.log_mean(f"{split}/{name}", sum(values) / len(values), len(values))


def _values(reward: Reward, pairs: Sequence[tuple[str, str]]) -> list[float]:
    texts, references = ([pair[side] for pair in pairs] for side in (0, 1))
    return reward(texts, references, [])
