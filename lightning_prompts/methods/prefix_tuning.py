"""Prefix tuning (Li & Liang 2021; "LLM Studies (Part 3)").

Prompt: keys and values of each layer ``[L, 2, P, Hkv, Dh]``. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.lm import KeyValues, LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.prefix import Prefix, PrefixMLP


class PrefixTuning(PromptMethod):
    """Trains keys and values that every layer sees before the text; the template's prompt slot stays empty.

    The prefix starts with the LM's keys and values of the initialiser's vectors, so it initially behaves exactly like
    the soft prompt of the same initialiser: ``RandomTokens`` or ``VocabNormal`` for a random start, ``FromText`` for a
    trigger text, ``Hybrid`` for a trigger text followed by random vectors. ``FromPeft`` takes the keys and values of a
    PEFT adapter.

    Args:
        length: ``P``, number of positions.
        init: Initial prefix.
        mlp: Network that computes the keys and values, merged into the prefix on export; ``None`` trains them directly.
        objective: Training objective.
        lm: The frozen language model.
        optimizer: Optimiser of the prefix's parameters.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "keys and values of each layer"
    estimator_name = "backpropagation"

    def __init__(
        self,
        length: int = 20,
        init: Initializer = RandomTokens(),
        mlp: PrefixMLP | None = PrefixMLP(),
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-4, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the length; `build_prompt` creates the prefix."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_at_least("length", length)
        self.length = length
        self.init = init
        self.mlp = mlp
        self.objective = objective

    def build_prompt(self) -> None:
        """Create the prefix from the LM's keys and values of the initialiser's vectors.

        Raises:
            UserError: The prefix leaves no room in the context window.
        """
        if self.length >= self.lm.context:
            raise UserError(
                f"length ({self.length}) leaves no room in the context window of {self.lm.name} ({self.lm.context})"
            )
        like = self.lm.key_values(RandomTokens()(self.lm, min(64, self.lm.context)))  # for the scale
        self.prefix = Prefix(self.init.key_values(self.lm, self.length), like, self.mlp)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; the network has its own parameters."""
        return {**super().checkpoint_meta(), "mlp": repr(self.mlp)}

    def current_prompt(self) -> KeyValues:
        """Return the prefix."""
        return self.prefix()  # type: ignore[no-any-return]

    def initial_prompt(self) -> KeyValues:
        """Return the prefix before training."""
        return self.prefix.start()

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        own = self.length * shape.key_value_width
        with torch.device("meta"):
            network = None if self.mlp is None else self.mlp.build(self.length, shape.key_value_width)
        trained = own if network is None else sum(parameter.numel() for parameter in network.parameters())
        # Kept: the start. Saved: the network's output in units of each layer's scale, and its sum with the start.
        return MemoryEstimate(trained, kept=own, saved=2 * own, ahead=self.length, backward=True)
