"""Adaptations that make the attention of particular architectures follow a `PackedLayout`.

Most architectures of transformers look up their attention function by name and pass it a window and a scale. The
exceptions are architectures with attention code in the layer (Falcon, BLOOM, MPT, GPT-J, CodeGen, GPT-Neo, GPT-NeoX
Japanese, XGLM), a window that only the mask contains (PhiMoE), layers that read the keys and values of another layer,
and per-layer token inputs (Gemma 3n, Gemma 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_prompts.lm.attention import ATTENTION_NAME, Bias, followed_layout, layer_attention


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation for a model; ``None`` for the default, if the layer contains its attention code."""
    written_out = ("falcon", "bloom", "mpt", "gptj", "codegen", "gpt_neox_japanese", "gpt_neo", "xglm")
    return None if config.model_type in written_out else ATTENTION_NAME


def adapt(model: PreTrainedModel) -> PreTrainedModel:
    """Change a model in place, so that its attention follows layouts.

    Args:
        model: A model of transformers, built with the attention implementation `attention_of`.
    """
    for module in model.modules():
        if change := _CHANGES.get(type(module).__name__):
            change(module)
        if getattr(module, "is_kv_shared_layer", False):
            module.packed_layer = _read_layer(module)  # type: ignore[assignment]
        if getattr(module, "hidden_size_per_layer_input", 0) and hasattr(module, "embed_tokens_per_layer"):
            model.register_forward_pre_hook(TokenInputs(module), with_kwargs=True)
    return model


# --- attention code in the layer -------------------------------------------------------------------------------------


def _dot_product(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
    """Replace the attention between rotation and output projection of GPT-J, CodeGen, GPT-Neo and GPT-NeoX Japanese."""
    layout = followed_layout()
    if layout is None:
        return type(module)._attn(module, query, key, value, mask)
    scale = 1.0 if hasattr(module, "attention_type") else None  # GPT-Neo does not divide its scores
    out = layer_attention(module, query.to(value.dtype), key.to(value.dtype), value, layout, scale)
    return out.transpose(1, 2), None


def _falcon(module: Any, hidden_states: Tensor, alibi: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    layout = followed_layout()
    if layout is None:
        return type(module).forward(module, hidden_states, alibi, *args, **kwargs)
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden_states)))
    bias: Bias | None = None
    if module.config.alibi:
        slopes, scale = _slopes(module, hidden_states.device).bfloat16(), float(module.inv_norm_factor)

        def rounded(positions: Tensor) -> Tensor:  # Falcon rounds its biases to bfloat16
            return (slopes[:, None] * positions[:, None]).float() * scale

        bias = rounded

    else:
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    out = layer_attention(module, query, key, value, layout, bias=bias)
    return module.dense(out.flatten(2)), None


def _bloom(module: Any, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = followed_layout()
    if layout is None:
        return type(module).forward(module, hidden_states, residual, *args, **kwargs)
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    bias = _alibi(_slopes(module, hidden_states.device))
    out = layer_attention(module, query, key, value, layout, bias=bias)
    return module.dense(out.flatten(2)) + residual, None


def _mpt(module: Any, hidden_states: Tensor, position_bias: Tensor, *args: Any, **kwargs: Any) -> Any:
    layout = followed_layout()
    if layout is None:
        return type(module).forward(module, hidden_states, position_bias, *args, **kwargs)
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = qkv.unflatten(-1, (3, module.n_heads, -1)).permute(2, 0, 3, 1, 4)
    slopes = -build_mpt_alibi_tensor(module.n_heads, 2, device=hidden_states.device)[:, 0, 0]
    out = layer_attention(module, query, key, value, layout, module.softmax_scale, bias=_alibi(slopes))
    return module.out_proj(out.flatten(2)), None


def _xglm(module: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    layout = followed_layout()
    if layout is None:
        return type(module).forward(module, hidden_states, **kwargs)
    query, key, value = (
        project(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    return module.out_proj(layer_attention(module, query, key, value, layout, module.scaling).flatten(2)), None


def _slopes(module: Any, device: torch.device) -> Tensor:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    return build_alibi_tensor(torch.ones(1, 2, device=device), module.num_heads, torch.float32)[:, 0, 1]


def _alibi(slopes: Tensor) -> Bias:
    """Make a bias from the distance to the last key; a term that all keys of a query share cancels in the softmax."""
    return lambda positions: slopes.float()[:, None] * (positions - positions.amax(-1, keepdim=True))[:, None]


def _no_alibi(module: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Build the biases of BLOOM's plain path; with a layout there is no mask to build them from, nor need for them."""
    layout = followed_layout()
    return type(module).build_alibi_tensor(module, *args, **kwargs) if layout is None else None


def _falcon_alibi(module: Any, inputs: Any) -> None:
    """Switch off the biases of Falcon's plain path; see `_no_alibi`."""
    del inputs
    module.use_alibi = module.config.alibi and followed_layout() is None


# --- windows and keys of other layers --------------------------------------------------------------------------------


def _mask_window(module: Any) -> None:
    module.packed_window = module.config.sliding_window


def _gpt_neo(module: Any) -> None:
    module._attn = partial(_dot_product, module)
    module.packed_layer = module.layer_id
    module.packed_window = module.config.window_size if module.attention_type == "local" else None


def _read_layer(module: Any) -> int:
    """The index of the layer whose keys and values this layer reads."""
    config = module.config
    computing = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    return max(layer for layer, kind in enumerate(computing) if kind == module.layer_type)


# --- per-layer token inputs ------------------------------------------------------------------------------------------


class TokenInputs:
    """Adds the per-layer token inputs of Gemma 3n and Gemma 4 to passes that start from vectors.

    A vector that equals the embedding of a token counts as that token. Any other vector, such as a vector of a soft
    prompt, gets the inputs of the padding token, as images do in these models.

    Args:
        decoder: The decoder with the embedding tables.
    """

    def __init__(self, decoder: Any) -> None:
        """Start without digests of the embeddings."""
        self.decoder = decoder
        self._known: tuple[Tensor, Tensor] | None = None
        self._table: int | None = None  # address of the embeddings that `_known` was computed from

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add ``per_layer_inputs`` to the arguments of a model."""
        vectors = kwargs.get("inputs_embeds")
        if vectors is None or kwargs.get("per_layer_inputs") is not None:
            return args, kwargs
        inputs = self.decoder.get_per_layer_inputs
        # Some versions of Gemma 4 ask for the vectors, too, and use them only if there are no ids.
        given = (self.tokens(vectors), None)[: len(signature(inputs).parameters)]
        return args, {**kwargs, "per_layer_inputs": inputs(*given)}

    @torch.no_grad()
    def tokens(self, vectors: Tensor) -> Tensor:
        """Look up the token ids ``[...]`` of vectors ``[..., D]``; other vectors get the padding token."""
        table = self.decoder.embed_tokens
        if self._known is None or self._table != table.weight.data_ptr():
            self._table = table.weight.data_ptr()
            ids = torch.arange(len(table.weight), device=vectors.device)
            # The stable sort picks the first of several tokens with equal embeddings.
            self._known = torch.cat([_digest(table(part)) for part in ids.split(4096)]).sort(stable=True)
        known, ids = self._known
        wanted = _digest(vectors.to(table.weight.dtype))
        place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        padding = self.decoder.config.pad_token_id or 0
        return torch.where(known[place] == wanted, ids[place], padding)


def _digest(vectors: Tensor) -> Tensor:
    """Compute a 64-bit digest of each vector, ``[..., D]`` -> ``[...]``; equal vectors have equal digests."""
    bits = vectors.contiguous().view(torch.int16 if vectors.element_size() == 2 else torch.int32).long()
    factors = torch.arange(1, bits.shape[-1] + 1, device=bits.device) * 0x5851F42D4C957F2D + 1
    mixed = (bits ^ (bits << 29)) * factors
    return (mixed ^ (mixed >> 31)).sum(-1)


def _instead(name: str, function: Callable[..., Any]) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        setattr(module, name, partial(function, module))

    return change


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "GPTJAttention": _instead("_attn", _dot_product),
    "CodeGenAttention": _instead("_attn", _dot_product),
    "GPTNeoXJapaneseAttention": _instead("_attn", _dot_product),
    "GPTNeoSelfAttention": _gpt_neo,
    "FalconAttention": _instead("forward", _falcon),
    "FalconModel": lambda module: module.register_forward_pre_hook(_falcon_alibi),
    "BloomAttention": _instead("forward", _bloom),
    "BloomModel": _instead("build_alibi_tensor", _no_alibi),
    "MptAttention": _instead("forward", _mpt),
    "XGLMAttention": _instead("forward", _xglm),
    "PhimoeAttention": _mask_window,
}
