"""LoRA (Hu et al. 2022) through PEFT: the baseline that changes the weights, with as few numbers.

Prompt: a fixed text. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

import re

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.from_peft import FromPeft
from lightning_prompts.randomness import from_run_seed
from lightning_prompts.types import Batch


class LoraTuning(PromptMethod):
    """Trains low-rank updates of the LM's linear layers instead of a prompt.

    Args:
        rank: Of the updates.
        alpha: The updates are scaled by ``alpha / rank``.
        target_modules: Names of the layers, or ``all-linear``.
        text: What stands in the prompt slot.
        init: A PEFT adapter of the same rank, alpha and layers to start from; ``None`` for updates that change nothing.
        objective: What is good.
        lm: The language model; its own weights stay as they are.
        optimizer: Makes the optimiser of the updates.
        scheduler: Makes a learning-rate scheduler that steps every training step; ``None`` for a linear decay to zero
            over the whole run.
        max_new_tokens: How long a generated answer may get.
    """

    prompt_kind = "text, and low-rank weight updates"
    estimator_name = "backpropagation"
    objective_name = "answer likelihood"
    trains_lm = True
    ids: Tensor

    def __init__(
        self,
        rank: int = 8,
        alpha: int = 16,
        target_modules: str | list[str] = "all-linear",
        text: str = "",
        init: FromPeft | None = None,
        objective: Likelihood = Likelihood(),  # noqa: B008
        lm: LMConfig = LMConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the rank; the layers are changed once the LM is loaded."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        if rank < 1:
            raise UserError(f"rank must be at least 1, got {rank}")
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules
        self.text, self.init = text, init
        self.objective = objective

    def build_prompt(self) -> None:
        """Put the updates into the LM.

        Raises:
            UserError: PEFT is not installed, no layer has such a name, or see `FromPeft.updates`.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("LoraTuning needs PEFT: pip install peft") from error
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
        # The LM stays out of checkpoints; its updates are this module's own parameters as well, and go in.
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
        """The updates by the names that they have in an adapter's file: PEFT's model in front, no adapter's name."""
        return {
            f"base_model.model.{name.replace('/', '.').replace('.default.', '.')}": value
            for name, value in self.updates.items()
        }

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`."""
        return {**super().checkpoint_meta(), "rank": self.rank, "alpha": self.alpha}

    def current_prompt(self) -> Tensor:
        """The embeddings of the text, ``[P, D]``."""
        return self.lm.embed(self.ids).float()

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        updated = [linear for linear in shape.linears if self._updates(linear.name)]
        trained = shape.layers * self.rank * sum(linear.inputs + linear.outputs for linear in updated)
        if shape.bytes_each == 4:  # layers that read the same keep it once; of half precision, each has a copy
            inputs = sum({linear.reads: linear.inputs for linear in updated}.values())
        else:
            inputs = sum(linear.inputs for linear in updated)
        length = len(shape.encoder.tokens(self.text))
        inputs += self.rank * len(updated)
        return MemoryEstimate(trained, length=length, backward=True, inputs_saved=inputs)

    def _updates(self, name: str) -> bool:
        """Whether a linear layer gets an update, by PEFT's rules."""
        if self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        del batch_idx
        return self.answer_step(self.own_part(batch), self.current_prompt(), self.objective)
