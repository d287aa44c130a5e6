"""What methods share that write a prompt for each question."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import check_finite
from lightning_prompts.lm import LMConfig, Prompt, Query, StateStore
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.refiners.refiner import part_sizes
from lightning_prompts.types import Example


class RefinerMethod(PromptMethod):
    """A prompt per question, from the frozen LM's hidden states of an instruction and the question.

    A subclass builds ``self.refiner`` and gives `refine`.

    Args:
        query: What of the LM's reading of a question the refiner sees.
        cache_states: Compute the hidden states once and keep them on disk, instead of in every step.
        base_lr: Learning rate of what all questions share; the optimiser's own is for the network.
        lm: The frozen language model.
        optimizer: Makes the optimiser.
        scheduler: Makes a learning-rate scheduler that steps every training step.
        max_new_tokens: How long a generated answer may get.
    """

    refiner: torch.nn.Module

    def __init__(
        self,
        query: Query,
        cache_states: bool,
        base_lr: float,
        lm: LMConfig,
        max_new_tokens: int,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
    ) -> None:
        """Keep the settings."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_finite("base_lr", base_lr, above=True)
        self.query = query
        self.cache_states = cache_states
        self.base_lr = base_lr
        self.pooled = True
        self._store: StateStore | None = None

    @abstractmethod
    def refine(self, states: Tensor, mask: Tensor) -> Tensor:
        """The prompts as they go into the LM in evaluation.

        Args:
            states: Hidden states ``[B, T, D]`` float32.
            mask: ``[B, T]`` bool.

        Returns:
            ``[B, P, D]``.
        """

    @property
    def store(self) -> StateStore:
        """Where hidden states come from."""
        if self._store is None:
            self._store = StateStore(self.lm, self.query, self.pooled)
        return self._store

    def configure_model(self) -> None:
        """Load the LM, build the refiner, and look up or compute the hidden states."""
        super().configure_model()
        data = getattr(self._trainer, "datamodule", None)
        if data is None or self.trainer.state.fn is None or not self.reads_questions():
            return
        splits = [data.examples(split) for split in data.splits(self.trainer.state.fn.value)]
        for example in (example for examples in splits for example in examples):
            self.query.check_question(self.lm, example)
        if self.cache_states and self.lm.shards is None:  # or else they are computed by all, whenever they are needed
            progress = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
            for examples in splits:
                self.store.prepare([example.question for example in examples], progress)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; a network understands the hidden states that it was trained on."""
        return {**super().checkpoint_meta(), "query": repr(self.query) if self.reads_questions() else ""}

    def reads_questions(self) -> bool:
        """Whether there is a network that does."""
        return True

    def states(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, D]`` and mask ``[B, T]`` of the examples' questions."""
        if not self.reads_questions():
            return torch.zeros(len(examples), 1, 1, device=self.lm.device), torch.ones(
                len(examples), 1, dtype=torch.bool, device=self.lm.device
            )
        return self.store([example.question for example in examples])

    def prompt_for(self, examples: Sequence[Example]) -> Tensor:
        """A prompt for each example, ``[B, P, D]``."""
        return self.refine(*self.states(examples))

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        """As in `PromptMethod`, with the prompt of each question in words: its tokens, or those nearest to it."""
        rows = super().evaluate(examples, prompt)
        assert isinstance(prompt, Tensor)
        ids = self.lm.nearest_tokens(prompt.flatten(0, 1))[0].view(prompt.shape[:2])
        for row, own in zip(rows, ids.tolist(), strict=True):
            row["prompt"] = self.lm.text(own)
        return rows

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What all questions share learns faster than what tells them apart."""
        base = [parameter for name, parameter in self.refiner.named_parameters() if name == "base"]
        known = {id(parameter) for parameter in base}
        rest = [parameter for parameter in self.trainable_parameters() if id(parameter) not in known]
        groups: list[dict[str, Any]] = [{"params": base, "lr": self.base_lr}]
        return [*groups, {"params": rest}] if rest else groups

    def describe_trained(self) -> str:
        """By part."""
        sizes = part_sizes(self.refiner)
        return f"{sum(sizes.values()):,} ({', '.join(f'{part} {size:,}' for part, size in sizes.items())})"
