"""A small transformer trained from scratch on the task alone: the baseline without a language model.

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


class ScratchTransformer(PromptMethod):
    """Trains a decoder with Llama's architecture from random weights; like all methods, it learns the answers only.

    Args:
        layers: ``L``, number of layers.
        width: ``D``, size of the hidden states.
        heads: ``H``, number of attention heads; must divide ``width``.
        context: Maximum length of a row, in tokens.
        tokens: ``characters`` for bytes, so each digit and letter is a token, or ``lm`` for the LM's tokenizer.
        objective: Training objective.
        lm: The LM whose tokenizer ``tokens: lm`` uses; nothing else of it is used.
        optimizer: Optimiser of all weights.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in the decoder's own tokens.
    """

    prompt_kind = "none; all weights of a small decoder"
    estimator_name = "backpropagation"
    trains_lm = True

    def __init__(
        self,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 256,
        tokens: Literal["characters", "lm"] = "characters",
        objective: Likelihood = Likelihood(mean_over="tokens"),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Check the shape; `configure_model` creates the weights."""
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
        """Create a random model in place of the LM, so scoring and generation use the same code."""
        tokenizer = load_tokenizer(config) if self.tokens == "lm" else None
        lm = FrozenLM.load(self.small_lm(tokenizer), tokenizer, device="cpu")
        with from_run_seed():
            for part in (*lm.model.modules(), *lm.model.parameters()):
                setattr(part, "_is_hf_initialized", False)  # noqa: B010 - otherwise transformers skips them
            lm.model.init_weights()
            lm.model.tie_weights()
        return lm.to(device)

    def small_lm(self, tokenizer: PreTrainedTokenizerBase | None) -> LMConfig:
        """Return the decoder's settings, with the vocabulary of ``tokenizer`` if given."""
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
            for key in ("bos_token_id", "eos_token_id"):
                value = getattr(tokenizer, key)
                shape[key] = "null" if value is None else value
            shape["pad_token_id"] = "null"  # the embedding of a padding token gets no gradient
        return LMConfig("random:llama," + ",".join(f"{key}={value}" for key, value in shape.items()))

    def build_prompt(self) -> None:
        """Make the weights trainable."""
        self.network = self.lm.model.requires_grad_(True)  # checkpoints hold this name, but not the LM

    def describe(self) -> str:
        """Describe the method and its size."""
        trained = sum(parameter.numel() for parameter in self.trainable_parameters())
        return f"{type(self).__name__}: {self.layers} layers, width {self.width}; trained from scratch: {trained:,}"

    def current_prompt(self) -> Tensor:
        """Return an empty prompt, ``[0, D]``."""
        return torch.zeros(0, self.width, device=self.lm.device)
