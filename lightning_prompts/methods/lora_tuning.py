"""LoRA (Hu et al. 2022) through PEFT: a baseline that trains few parameters, but changes the weights.

Prompt: a fixed text. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

import re

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least, check_installed
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.from_peft import FromPeft
from lightning_prompts.randomness import from_run_seed


class LoraTuning(PromptMethod):
    """Trains low-rank updates of the LM's linear layers instead of a prompt.

    Args:
        rank: Rank of the updates.
        alpha: Scale of the updates: they are multiplied by ``alpha / rank``.
        target_modules: Names of the layers, or ``all-linear``.
        text: Text in the prompt slot.
        init: A PEFT adapter of the same rank, alpha and layers to start from; ``None`` for updates that change nothing.
        objective: Training objective.
        lm: The language model; its own weights do not change.
        optimizer: Optimiser of the updates.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "text, and low-rank weight updates"
    estimator_name = "backpropagation"
    trains_lm = True
    ids: Tensor

    def __init__(
        self,
        rank: int = 8,
        alpha: int = 16,
        target_modules: str | list[str] = "all-linear",
        text: str = "",
        init: FromPeft | None = None,
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the rank; `build_prompt` changes the layers."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_at_least("rank", rank)
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules
        self.text, self.init = text, init
        self.objective = objective

    def build_prompt(self) -> None:
        """Add the updates to the LM.

        Raises:
            UserError: PEFT is not installed, no layer has a name in ``target_modules``, or see `FromPeft.updates`.
        """
        check_installed("LoraTuning", "lora", "peft")
        from peft import LoraConfig, inject_adapter_in_model

        self.register_buffer("ids", self.lm.token_ids(self.text), persistent=False)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, task_type="CAUSAL_LM"
        )
        with from_run_seed():
            try:
                inject_adapter_in_model(config, self.lm.model)
            except ValueError as error:
                raise UserError(f"target_modules {self.target_modules!r}: {str(error).splitlines()[0]}") from error
        self.lm.train(False)
        # Checkpoints do not hold the LM, so its updates become parameters of this module.
        named = {name: value for name, value in self.lm.model.named_parameters() if value.requires_grad}
        for value in named.values():
            value.data = value.data.float()
        self.updates = torch.nn.ParameterDict({name.replace(".", "/"): value for name, value in named.items()})
        if self.init is not None:
            mine = self.by_peft_name()
            with torch.no_grad():
                for name, start in self.init.updates(mine, self.rank, self.alpha).items():
                    mine[name].copy_(start)

    def by_peft_name(self) -> dict[str, torch.nn.Parameter]:
        """Return the updates by their names in an adapter file: with PEFT's prefix, without the adapter's name."""
        return {
            f"base_model.model.{name.replace('/', '.').replace('.default.', '.')}": value
            for name, value in self.updates.items()
        }

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`."""
        return {**super().checkpoint_meta(), "rank": self.rank, "alpha": self.alpha}

    def current_prompt(self) -> Tensor:
        """Return the embeddings of the text, ``[P, D]``."""
        return self.lm.embed(self.ids).float()

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        updated = [linear for linear in shape.linears if self._updates(linear.name)]
        trained = shape.layers * self.rank * sum(linear.inputs + linear.outputs for linear in updated)
        if shape.bytes_each == 4:  # layers with the same input save it once; in half precision, each saves a copy
            inputs = sum({linear.reads: linear.inputs for linear in updated}.values())
        else:
            inputs = sum(linear.inputs for linear in updated)
        length = len(shape.encoder.tokens(self.text))
        inputs += self.rank * len(updated)
        return MemoryEstimate(trained, length=length, backward=True, inputs_saved=inputs)

    def _updates(self, name: str) -> bool:
        """Return whether a linear layer gets an update, by PEFT's rules."""
        if self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)
