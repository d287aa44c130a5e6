"""Fuses the small operations of a decoder layer into few kernels."""

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
    """Compile the decoder layers of a model, which share one compilation; attention itself stays as it is.

    Args:
        model: On a CUDA device.

    Returns:
        Whether anything was compiled: not without Triton, not with gradient checkpointing or quantised weights, not
        where attention is written out in the layer.
    """
    quantized = getattr(model, "quantization_method", None) is not None
    if importlib.util.find_spec("triton") is None or quantized or attention_of(model.config) is None:
        return False
    layers = [layer for layer in _layers(model) if not getattr(layer, "gradient_checkpointing", False)]
    # What attention does depends on the layout, and its kernels are fused already.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(attention_forward))
    for layer in layers:
        layer.compile(dynamic=True)
    # Shapes, precisions, and passes with and without a gradient each count; beyond the limit layers run as they are.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    return bool(layers)


def uncompile_layers(model: PreTrainedModel) -> None:
    """Run the decoder layers of a model as they are again."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


def _layers(model: PreTrainedModel) -> Iterator[GradientCheckpointingLayer]:
    return (layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
