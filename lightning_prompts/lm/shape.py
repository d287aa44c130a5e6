"""Sizes of an LM and of a method for a memory plan, without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.encoding import Encoder
from lightning_prompts.lm.loading import context_window, load_tokenizer, weightless_model

# Bytes per weight of a linear layer in bitsandbytes: int8 has one scale per row, nf4 one per 64 weights.
_QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: Name within the decoder layer (``mlp.up_proj``).
        inputs: Width of the input.
        outputs: Width of the output.
    """

    name: str
    inputs: int
    outputs: int

    @property
    def reads(self) -> str:
        """A name of its input; input projections of the same part, such as q_proj and k_proj, share their input."""
        part, _, own = self.name.rpartition(".")
        return f"{part} {own if own in ('o_proj', 'down_proj', 'c_proj') else ''}"


@dataclass(frozen=True)
class LMShape:
    """Sizes of a causal LM.

    Attributes:
        name: Name of the model.
        dtype: Dtype of weights and activations.
        quantization: Quantisation of the linear layers; ``none`` for none.
        layers: ``L``.
        width: ``D``.
        inner: Width of the feed-forward part.
        gated: Whether the feed-forward part has a gate.
        heads: ``H``.
        kv_heads: ``Hkv``.
        head_width: ``Dh``.
        vocabulary: ``V``.
        context: Context window in tokens.
        linears: The linear layers of one decoder layer.
        in_layers: Number of parameters of all decoder layers.
        outside: Number of all other parameters: embeddings, the head unless it is tied to them, the last norm.
        gradient_checkpointing: See `LMConfig`.
        encoder: Encodes text as tokens.
    """

    name: str
    dtype: torch.dtype
    quantization: str
    layers: int
    width: int
    inner: int
    gated: bool
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    linears: tuple[Linear, ...]
    in_layers: int
    outside: int
    gradient_checkpointing: bool
    encoder: Encoder

    @classmethod
    def of(
        cls, config: LMConfig, tokenizer: PreTrainedTokenizerBase | None = None, device: torch.device | str = "cpu"
    ) -> LMShape:
        """Return the sizes of a model from its configuration, without loading weights.

        Args:
            config: Settings of the model.
            tokenizer: Replaces the tokenizer of the model, unless ``None``.
            device: Device that the model would run on; see `weightless_model`.

        Raises:
            UserError: The model does not exist or is not supported.
        """
        model = weightless_model(config, device)
        text = model.config.get_text_config()
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        linears = tuple(
            Linear(name, *(module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)))
            for name, module in blocks[0].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        )
        in_layers = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        heads = int(text.num_attention_heads)
        up = [linear for linear in linears if re.search(r"(up_proj|fc_in|c_fc|fc1|dense_h_to_4h)$", linear.name)]
        return cls(
            name=config.name,
            dtype=model.dtype,
            quantization=config.quantization or "none",
            layers=int(text.num_hidden_layers),
            width=int(text.hidden_size),
            inner=up[0].outputs if up else 4 * int(text.hidden_size),
            gated=any(linear.name.endswith("gate_proj") for linear in linears),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=int(text.vocab_size),
            context=context_window(model.config, config.name),
            linears=linears,
            in_layers=in_layers,
            outside=sum(parameter.numel() for parameter in model.parameters()) - in_layers,
            gradient_checkpointing=config.gradient_checkpointing,
            encoder=Encoder(tokenizer or load_tokenizer(config), config.name, int(text.vocab_size)),
        )

    @property
    def bytes_each(self) -> int:
        """Bytes per number in the LM's dtype."""
        return self.dtype.itemsize

    @property
    def key_value_width(self) -> int:
        """``W``, the width of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_width

    def weight_bytes(self, shards: int = 1, heads: int = 1) -> float:
        """Compute the bytes of the weights in one process.

        Args:
            shards: Number of processes over which each weight of a decoder layer is sharded.
            heads: Number of processes over which the heads of each layer are split.
        """
        linear = self.layers * sum(layer.inputs * layer.outputs for layer in self.linears)
        each = _QUANTIZED.get(self.quantization, self.bytes_each)
        layers = linear * each + (self.in_layers - linear) * self.bytes_each
        return layers / (shards * heads) + self.outside * self.bytes_each


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a method needs in addition to its LM.

    Attributes:
        trained: Number of float32 parameters with gradients and optimiser state.
        kept: Number of further float32 values: initial values, copies of E.
        saved: Number of float32 values that a step saves for the backward pass outside of the LM.
        length: ``P``, tokens of the prompt slot.
        ahead: Number of keys and values before all tokens.
        per_question: Whether every row has its own prompt.
        backward: Whether a step backpropagates through the LM.
        inputs_saved: Total width of the inputs of linear layers that each decoder layer saves for trained weights.
        rows: Rows of a pass, for steps with passes without gradients only; ``None`` for the rows of the batch.
        shape: The LM of the method, if it is not that of the config.
    """

    trained: int = 0
    kept: int = 0
    saved: int = 0
    length: int = 0
    ahead: int = 0
    per_question: bool = False
    backward: bool = False
    inputs_saved: int = 0
    rows: int | None = None
    shape: LMShape | None = None
