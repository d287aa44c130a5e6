"""Prefix tuning (Li & Liang 2021; "LLM Studies (Part 3)").

Prompt: keys and values of each layer ``[L, 2, P, Hkv, Dh]``. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import KeyValues, LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.prefix import Prefix, PrefixMLP
from lightning_prompts.types import Batch


class PrefixTuning(PromptMethod):
    """Trains keys and values that every layer sees in front of the text; the template's prompt slot stays empty.

    The prefix starts as the keys and values that the LM itself computes for the initialiser's vectors, so that it does
    at first exactly what the soft prompt of the same initialiser does: ``RandomTokens`` or ``VocabNormal`` for a random
    start, ``FromText`` for a trigger text, ``Hybrid`` for the trigger first and random vectors after it.
    ``FromPeft`` takes the keys and values of a PEFT adapter.

    Args:
        length: ``P``, positions of the prefix.
        init: Where it starts.
        mlp: A network that makes the keys and values, folded away on export; ``None`` trains them freely.
        objective: What is good.
        lm: The frozen language model.
        optimizer: Makes the optimiser of the prefix's parameters.
        scheduler: Makes a learning-rate scheduler that steps every training step; ``None`` for a linear decay to zero
            over the whole run.
        max_new_tokens: How long a generated answer may get.
    """

    prompt_kind = "keys and values of each layer"
    estimator_name = "backpropagation"
    objective_name = "answer likelihood"

    def __init__(
        self,
        length: int = 20,
        init: Initializer = RandomTokens(),  # noqa: B008
        mlp: PrefixMLP | None = PrefixMLP(),  # noqa: B008
        objective: Likelihood = Likelihood(),  # noqa: B008
        lm: LMConfig = LMConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-4, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the length; the prefix is made once the LM is loaded."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        if length < 1:
            raise UserError(f"length must be at least 1, got {length}")
        self.length = length
        self.init = init
        self.mlp = mlp
        self.objective = objective

    def build_prompt(self) -> None:
        """Run the initialiser's vectors through the LM, and take its keys and values.

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
        """See `PromptMethod`; the network has parameters of its own."""
        return {**super().checkpoint_meta(), "mlp": repr(self.mlp)}

    def current_prompt(self) -> KeyValues:
        """The prefix."""
        return self.prefix()  # type: ignore[no-any-return]

    def initial_prompt(self) -> KeyValues:
        """The prefix before training."""
        return self.prefix.start()

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        own = self.length * shape.key_value_width
        with torch.device("meta"):
            network = None if self.mlp is None else self.mlp.build(self.length, shape.key_value_width)
        trained = own if network is None else sum(parameter.numel() for parameter in network.parameters())
        # The start; what the network gives, in units of each layer's scale, and the sum of both.
        return MemoryEstimate(trained, kept=own, saved=2 * own, ahead=self.length, backward=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        del batch_idx
        return self.answer_step(self.own_part(batch), self.current_prompt(), self.objective)
