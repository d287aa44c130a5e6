"""A small transformer trained from scratch on the task alone: what can be learned without a language model.

Prompt: none. Estimator: backpropagation. Objective: answer likelihood.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, LMShape, MemoryEstimate
from lightning_prompts.lm.loading import load_tokenizer
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.randomness import from_run_seed
from lightning_prompts.types import Batch


class ScratchTransformer(PromptMethod):
    """Trains a decoder of Llama's shape from random weights, on answers only like every other method.

    Args:
        layers: ``L``.
        width: ``D``.
        heads: ``H``; must divide ``width``.
        context: Tokens of the longest row.
        tokens: ``characters`` (bytes, so that digits and letters stand alone) or ``lm`` for the LM's tokenizer.
        objective: What is good.
        lm: Whose tokenizer ``tokens: lm`` takes; nothing else of it is used.
        optimizer: Makes the optimiser of all weights.
        scheduler: Makes a learning-rate scheduler that steps every training step; ``None`` for a linear decay to zero
            over the whole run.
        max_new_tokens: How long a generated answer may get, in its own tokens.
    """

    prompt_kind = "none; all weights of a small decoder"
    estimator_name = "backpropagation"
    objective_name = "answer likelihood"
    trains_lm = True

    def __init__(
        self,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 256,
        tokens: Literal["characters", "lm"] = "characters",
        objective: Likelihood = Likelihood(mean_over="tokens"),  # noqa: B008
        lm: LMConfig = LMConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Check the shape; weights are made in `configure_model`."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        if min(layers, width, heads) < 1 or width % heads or width // heads % 2:
            raise UserError(
                f"width ({width}) must be an even multiple of heads ({heads}), and layers ({layers}) at least 1"
            )
        self.layers, self.width, self.heads, self.context, self.tokens = layers, width, heads, context, tokens
        self.objective = objective

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        tokenizer = shape.encoder.tokenizer if self.tokens == "lm" else None
        own = LMShape.of(self.small_lm(tokenizer), tokenizer)
        inputs = sum({linear.reads: linear.inputs for linear in own.linears}.values())
        saved = inputs + 2 * own.width
        return MemoryEstimate(own.in_layers + own.outside, backward=True, inputs_saved=saved, shape=own)

    def load_lm(self, config: LMConfig, device: torch.device) -> FrozenLM:
        """A random model in the LM's place, so that scoring and generation are the same code."""
        tokenizer = load_tokenizer(config) if self.tokens == "lm" else None
        lm = FrozenLM.load(self.small_lm(tokenizer), tokenizer, device="cpu")
        with from_run_seed():
            for part in (*lm.model.modules(), *lm.model.parameters()):
                setattr(part, "_is_hf_initialized", False)  # noqa: B010 - or transformers would leave them as they are
            lm.model.init_weights()
            lm.model.tie_weights()
        return lm.to(device)

    def small_lm(self, tokenizer: PreTrainedTokenizerBase | None) -> LMConfig:
        """The decoder's shape, for another tokenizer's vocabulary if one is given."""
        shape = {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": "true",
        }
        if tokenizer is not None:
            shape["vocab_size"] = len(tokenizer)
        return LMConfig("random:llama," + ",".join(f"{key}={value}" for key, value in shape.items()))

    def build_prompt(self) -> None:
        """Let the weights be trained."""
        self.network = self.lm.model.requires_grad_(True)  # the LM stays out of checkpoints, this name for it does not

    def describe(self) -> str:
        """The method in words, and how large it is."""
        trained = sum(parameter.numel() for parameter in self.trainable_parameters())
        return f"{type(self).__name__}: {self.layers} layers, width {self.width}; trained from scratch: {trained:,}"

    def current_prompt(self) -> Tensor:
        """Nothing, ``[0, D]``."""
        return torch.zeros(0, self.width, device=self.lm.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        del batch_idx
        return self.answer_step(self.own_part(batch), self.current_prompt(), self.objective)
