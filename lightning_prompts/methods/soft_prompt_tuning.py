"""Prompt tuning (Lester et al. 2021); as an infill, "Can we backpropagate a prompt?".

Prompt: soft embeddings ``[P, D]``. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import check_at_least
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.soft import Reparametrization, SoftPrompt


class SoftPromptTuning(PromptMethod):
    """Trains ``P`` vectors in the template's prompt slot, before the text or inside it.

    Args:
        length: ``P``, number of vectors.
        init: Initial vectors.
        reparametrization: Network between the parameters and the prompt, merged into the prompt on export; ``None``
            for none.
        objective: Training objective.
        lm: The frozen language model.
        optimizer: Optimiser of the prompt's parameters.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "soft embeddings [P, D]"
    estimator_name = "backpropagation"

    def __init__(
        self,
        length: int = 20,
        init: Initializer = RandomTokens(),
        reparametrization: Reparametrization | None = None,
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the length; `build_prompt` creates the prompt."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_at_least("length", length)
        self.length = length
        self.init = init
        self.reparametrization = reparametrization
        self.objective = objective

    def build_prompt(self) -> None:
        """Start with the initialiser's vectors."""
        self.prompt = SoftPrompt(self.init(self.lm, self.length), self.reparametrization)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; the reparametrisation has its own parameters."""
        return {**super().checkpoint_meta(), "reparametrization": repr(self.reparametrization)}

    def current_prompt(self) -> Tensor:
        """Return the prompt, ``[P, D]``."""
        return self.prompt()  # type: ignore[no-any-return]

    def initial_prompt(self) -> Tensor:
        """Return the prompt before training, ``[P, D]``."""
        return self.prompt.initial

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        own = self.length * shape.width
        with torch.device("meta"):
            network = None if self.reparametrization is None else self.reparametrization.build(shape.width)
        trained = own + (0 if network is None else sum(parameter.numel() for parameter in network.parameters()))
        return MemoryEstimate(trained, kept=own, length=self.length, backward=True)
