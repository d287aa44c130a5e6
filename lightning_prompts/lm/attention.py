"""Attention over packed rows with shared prefixes, see `PackedLayout`.

This module registers the attention implementation ``lightning_prompts`` with transformers. Without a layout it runs
transformers' SDPA attention, so the same model object also supports the plain path and ``generate``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_prompts.lm.cascade import cascade_attention
from lightning_prompts.lm.layout import PackedLayout, Pair, score_limit

ATTENTION_NAME = "lightning_prompts"

Bias = Callable[[Tensor], Tensor]  # positions of keys [n, S] -> additive bias of their scores [n, H, S]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    layer: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """Compute the attention of one layer over a packed sequence.

    Args:
        query: ``[M, H, Dh]``.
        key: ``[M, Hkv, Dh]``.
        value: ``[M, Hkv, Dh]``.
        layout: The tokens that each token attends to.
        layer: Index of the layer, for the KV cache.
        scale: Factor on the scores.
        window: Sliding window in tokens; ``None`` for full attention.
        softcap: Replace scores by ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: Attention sinks (gpt-oss): one additional score per head in the softmax, without a token; ``[H]``.
        bias: Additive bias of the scores from the positions of keys (ALiBi).

    Returns:
        ``[M, H, Dh]``.
    """
    layout.followed = True
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float32:
        # On the CPU, the backward pass of half-precision attention is many times slower and less exact than float32.
        query, key, value = query.float(), key.float(), value.float()
    elif torch.is_autocast_enabled(query.device.type):
        mixed = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(mixed), key.to(mixed), value.to(mixed)
    if softcap is None and sinks is None and bias is None and layout.cascades(query, value, window):
        return cascade_attention(query, key, value, layout, layer, scale).to(dtype)
    shared = layout.shared(layer, key)
    outputs = []
    for index, level in enumerate(layout.passing):
        own = layout.own(level, layer, key[level.place], value[level.place])
        mask = layout.mask(index, window)
        if bias is not None:
            mask = mask + bias(layout.key_positions(index))[:, :, None]
        keys, values = own
        if sinks is not None:  # append a key and a value of zeros; the mask adds the sink to its score
            keys, values = (nn.functional.pad(part, (0, 0, 0, 0, 0, 1)) for part in own)
            shape = (level.size, len(sinks), level.width)
            sink = sinks.float()[:, None, None].expand(*shape, 1)
            mask = torch.cat([mask.expand(*shape, -1), sink], -1)
        outputs.append(level.unpad(_attend(level.pad(query[level.place]), shared, keys, values, mask, scale, softcap)))
        if index < len(layout.passing) - 1:
            shared = [*shared, own]
    if layout.cache is not None:
        layout.cache.shared[layer] = shared
    return torch.cat(outputs).to(dtype) if len(outputs) > 1 else outputs[0].to(dtype)


def _attend(
    query: Tensor,
    shared: list[Pair],
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute the attention of segments to themselves and to the levels above.

    Args:
        query: ``[n, T, H, Dh]``.
        shared: Keys and values ``[n', S, Hkv, Dh]`` of each level above; ``n`` is a multiple of ``n'``.
        key: ``[n, T', Hkv, Dh]``.
        value: ``[n, T', Hkv, Dh]``.
        mask: Additive mask ``[n, 1, T, all S + T']``, or ``[n, H, T, all S + T']`` if heads differ.
        scale: Factor on the scores.
        softcap: See `packed_attention`.

    Returns:
        ``[n, T, H, Dh]``.
    """
    n, t, h, dh = query.shape
    hkv = key.shape[2]
    g = h // hkv
    if n * h * t * mask.shape[-1] > score_limit() and softcap is None:
        pairs = [(k.repeat_interleave(n // len(k), 0), v.repeat_interleave(n // len(v), 0)) for k, v in shared]
        keys, values = (torch.cat(parts, 1).transpose(1, 2) for parts in zip(*pairs, (key, value), strict=True))
        out = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.repeat_interleave(g, 1),
            values.repeat_interleave(g, 1),
            mask.to(query.dtype),
            scale=scale,
        )
        return out.transpose(1, 2)
    # One matrix product per key/value head and shared segment, without a copy of the segment, and small products within
    # segments. Operands are permuted once: a product of permuted operands would copy them every time.
    q = (query * scale).view(n, t, hkv, g, dh).permute(2, 0, 3, 1, 4).reshape(hkv, n, g * t, dh)
    pairs = [
        (k.permute(2, 0, 1, 3).flatten(0, 1), v.permute(2, 0, 1, 3).flatten(0, 1)) for k, v in (*shared, (key, value))
    ]
    scores = torch.cat([_by_segment(q, k.transpose(1, 2)) for k, _ in pairs], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The mask [n, 1, T, .] broadcasts to the scores [., n, g, T, .].
    mask = mask if mask.shape[1] == 1 else mask.unflatten(1, (hkv, g)).transpose(0, 1)
    weights = torch.softmax(scores.view(hkv, n, g, t, -1).float() + mask, -1).to(query.dtype)
    weights = weights.view(hkv, n, g * t, -1)
    ends = list(itertools.accumulate(v.shape[1] for _, v in pairs))
    parts = [_by_segment(weights[..., end - v.shape[1] : end], v) for end, (_, v) in zip(ends, pairs, strict=True)]
    return functools.reduce(torch.add, parts).view(hkv, n, g, t, -1).permute(1, 3, 0, 2, 4).reshape(n, t, h, -1)


def _by_segment(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[Hkv, n, R, X] @ [Hkv * n', X, Y]`` -> ``[Hkv, n, R, Y]``, ``n / n'`` segments per product."""
    hkv, n, rows, x = left.shape
    return (left.reshape(len(right), -1, x) @ right).view(hkv, n, rows, -1)


_followed: ContextVar[PackedLayout | None] = ContextVar("layout", default=None)


def followed_layout() -> PackedLayout | None:
    """The layout of the running pass, for attention modules that do not receive it as an argument."""
    return _followed.get()


@contextmanager
def following(layout: PackedLayout | None) -> Iterator[None]:
    """Set the layout of a pass; not every architecture forwards keyword arguments to its attention."""
    token = _followed.set(layout)
    try:
        yield
    finally:
        _followed.reset(token)


def checkpoint_contexts() -> tuple[Any, Any]:
    """The ``context_fn`` of gradient checkpointing, which recomputes a layer with the layout of its forward pass."""
    return nullcontext(), following(followed_layout())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: PackedLayout | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers, which calls this in every layer with heads ``[1, H, M, Dh]``."""
    layout = followed_layout() if layout is None else layout
    if layout is not None:
        out = layer_attention(module, query, key, value, layout, scaling, sliding_window, softcap, s_aux)
        return out, None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return _explicit(query, key, value, attention_mask, scaling, softcap, s_aux), None


def layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """Run `packed_attention` for a layer of transformers, from heads ``[1, H, M, Dh]`` to ``[1, M, H, Dh]``.

    `lightning_prompts.lm.architectures` may set two attributes of the layer: ``packed_window``, a window that is not an
    argument of its attention, and ``packed_layer``, the layer whose keys and values it reads.
    """
    own = getattr(module, "packed_layer", None)
    out = packed_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout,
        layer=int(module.layer_idx if own is None else own),  # type: ignore[arg-type]
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=getattr(module, "packed_window", window),
        softcap=softcap,
        sinks=sinks,
        bias=bias,
    )
    return out[None].contiguous()  # some architectures call ``view`` on it


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft cap or sinks for the plain path, ``[B, H, T, Dh]`` each -> ``[B, T, H, Dh]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    hidden = torch.finfo(torch.float32).min  # not -inf: a padding token may attend to nothing
    scores = scores.float().masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores.float() + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
