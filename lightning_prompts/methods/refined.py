"""The base class of methods that write a prompt for each question."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import FrozenLM, LMConfig, Query, StateStore
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.refiners.refiner import part_sizes
from lightning_prompts.types import Example


class RefinerMethod(PromptMethod):
    """A prompt per question, from the frozen LM's hidden states of an instruction and the question.

    A subclass builds ``self.refiner`` and implements `refine`.

    Args:
        query: Which hidden states of the question the refiner reads.
        cache_states: Compute the hidden states once and keep them on disk, instead of in every step.
        reader: The LM whose hidden states the refiner reads; ``None`` for ``lm``.
        base_lr: Learning rate of the base, which all questions share; the optimiser's own is for the network.
        lm: The frozen language model.
        optimizer: Optimiser of the base and the network.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
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
        reader: LMConfig | None = None,
    ) -> None:
        """Keep the settings."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_finite("base_lr", base_lr, above=True)
        if reader is not None and reader.server is not None:
            raise UserError("reader needs hidden states, and a server gives texts; leave out model.reader.server")
        self.query = query
        self.reader_config = lm if reader is None else reader
        self.cache_states = cache_states
        self.base_lr = base_lr
        self.pooled = True
        self._store: StateStore | None = None

    @abstractmethod
    def refine(self, states: Tensor, mask: Tensor) -> Tensor:
        """Compute the prompts of an evaluation.

        Args:
            states: Hidden states ``[B, T, D]`` float32.
            mask: ``[B, T]`` bool.

        Returns:
            Prompts ``[B, P, D]``.
        """

    @property
    def reader(self) -> FrozenLM:
        """The LM whose hidden states the refiner reads."""
        lm = self.lms[self.reader_config]
        assert isinstance(lm, FrozenLM)
        return lm

    def other_lms(self) -> list[LMConfig]:
        """See `PromptMethod`; return the reader if it is another LM."""
        return [config for config in [self.reader_config] if config != self.lm_config]

    @property
    def store(self) -> StateStore:
        """The store of hidden states."""
        if self._store is None:
            self._store = StateStore(self.reader, self.query, self.pooled)
        return self._store

    def configure_model(self) -> None:
        """Load the LM, build the refiner, check the questions, and load or compute the cached hidden states."""
        super().configure_model()
        data = getattr(self._trainer, "datamodule", None)
        if data is None or self.trainer.state.fn is None or not self.reads_questions():
            return
        splits = [data.examples(split) for split in data.splits(self.trainer.state.fn.value)]
        for example in (example for examples in splits for example in examples):
            self.query.check_question(self.reader, example)
        if self.cache_states and self.reader.shards is None:  # a split LM computes them on all processes when needed
            progress = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
            for examples in splits:
                self.store.prepare([example.question for example in examples], progress)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; a network works only with the hidden states that it was trained on."""
        reader = [f"{config.name} {config.revision or ''}".strip() for config in self.other_lms()]
        return {
            **super().checkpoint_meta(),
            "query": repr(self.query) if self.reads_questions() else "",
            "reader": "".join(reader),
        }

    def reads_questions(self) -> bool:
        """Return whether the method reads hidden states of the questions."""
        return True

    def states(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return hidden states ``[B, T, D]`` and mask ``[B, T]`` of the examples' questions."""
        if not self.reads_questions():
            return torch.zeros(len(examples), 1, 1, device=self.lm.device), torch.ones(
                len(examples), 1, dtype=torch.bool, device=self.lm.device
            )
        return self.store([example.question for example in examples])

    def prompt_for(self, examples: Sequence[Example]) -> Tensor:
        """Return a prompt for each example, ``[B, P, D]``."""
        return self.refine(*self.states(examples))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the base, with its own learning rate, and the network as two groups."""
        base = [parameter for name, parameter in self.refiner.named_parameters() if name == "base"]
        known = {id(parameter) for parameter in base}
        rest = [parameter for parameter in self.trainable_parameters() if id(parameter) not in known]
        groups: list[dict[str, Any]] = [{"params": base, "lr": self.base_lr}]
        return [*groups, {"params": rest}] if rest else groups

    def describe_trained(self) -> str:
        """Return the number of trained parameters, by part."""
        sizes = part_sizes(self.refiner)
        return f"{sum(sizes.values()):,} ({', '.join(f'{part} {size:,}' for part, size in sizes.items())})"
