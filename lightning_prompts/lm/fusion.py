"""Compile decoder layers, to fuse their small operations into few kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_prompts.lm.architectures import attention_of
from lightning_prompts.lm.attention import ATTENTION_NAME, attention_forward

RECOMPILATIONS = 32


def compile_layers(model: PreTrainedModel) -> bool:
    """Compile the decoder layers of a model, except their attention. The layers share one compilation.

    Args:
        model: A model on a CUDA device.

    Returns:
        Whether any layer was compiled. Compilation needs Triton, and does not support gradient checkpointing, quantised
        weights, or layers that contain their attention code.
    """
    quantized = getattr(model, "quantization_method", None) is not None
    if importlib.util.find_spec("triton") is None or quantized or attention_of(model.config) is None:
        return False
    layers = [layer for layer in _layers(model) if not getattr(layer, "gradient_checkpointing", False)]
    # The operations of attention depend on the layout, and its kernels are already fused.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(attention_forward))
    for layer in layers:
        layer.compile(dynamic=True)
    # Each shape, precision and gradient mode needs a compilation. Beyond the limit, layers run without compilation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    return bool(layers)


def uncompile_layers(model: PreTrainedModel) -> None:
    """Run the decoder layers of a model without compilation again."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


def _layers(model: PreTrainedModel) -> Iterator[GradientCheckpointingLayer]:
    return (layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
