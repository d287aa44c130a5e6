"""Attention over packed rows that share a prefix.

All rows of a batch travel through the frozen model as one packed sequence ``[1, M, D]``: first the ``S`` tokens that
every row begins with, once, then the remaining tokens of each row, without padding. Every layer but attention works
token by token and needs no change. Attention gets a `Layout` that says which tokens see which, so a prompt of 100
tokens costs 100 tokens per step and not 100 per row; its gradient is the sum over rows, as it must be. What is visible
follows from positions alone, which is why padding, batch size and order can change no result.

The function is registered with transformers as the attention implementation ``lightning_prompts``; without a layout
it is transformers' own SDPA attention, so the same model object also runs the plain path and ``generate``.
The idea of sharing a prefix in training is known from RL (PrefixGrouper, arXiv 2506.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_prompts.errors import UserError

ATTENTION_NAME = "lightning_prompts"

# Above this many scores per layer (16 MiB in float32, kept by every layer for the backward) the fused kernel is used:
# it keeps none, but needs the prefix copied into every row.
EXPLICIT_LIMIT = 1 << 22


class RowMemory:
    """Keys and values of earlier passes, per layer: the cache of batched generation.

    Args:
        capacity: Row tokens to hold per row, those to be generated included.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty; a layer's buffers are made when it first writes."""
        self.capacity = capacity
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}


class Layout:
    """Which packed tokens see which.

    Args:
        prefix: Tokens ``S`` that all rows share, whether they stand at the front of this pass or in ``memory``.
        lengths: Row tokens in this pass, one count per row, none zero.
        columns: How many of a row's own tokens earlier passes have put into ``memory``; zero for each without one.
        memory: Where keys and values are kept for later passes, or ``None``.
        device: Where the model runs.
    """

    def __init__(
        self,
        prefix: int,
        lengths: list[int],
        device: torch.device,
        columns: list[int] | None = None,
        memory: RowMemory | None = None,
    ) -> None:
        """Work out positions and the indices between packed and padded form once, for all layers."""
        rows, width = len(lengths), max(lengths)
        start = torch.tensor(columns or [0] * rows)
        count = torch.tensor(lengths)
        column = torch.arange(width)
        self.prefix, self.rows, self.width, self.memory = prefix, rows, width, memory
        self.prefix_in_pass = prefix if memory is None or not memory.prefix else 0
        self.even = bool((count == width).all())
        inside = column[None] < count[:, None]
        query_columns = start[:, None] + column[None]  # [B, T]: a token's index among its row's own tokens
        self.unpad_index = inside.flatten().nonzero()[:, 0].to(device)
        self.query_columns = query_columns.to(device)
        row_positions = prefix + query_columns[inside]
        self.positions = torch.cat([torch.arange(self.prefix_in_pass), row_positions])[None].to(device)  # [1, M]
        self.last = (self.prefix_in_pass + count.cumsum(0) - 1).to(device)  # [B] packed index of a row's last token
        keys = memory.capacity if memory else width
        self.key_columns = torch.arange(keys, device=device)
        self.memory_index = (
            (torch.arange(rows)[:, None] * keys + query_columns)[inside].to(device) if memory else self.unpad_index
        )
        self.followed = False  # set once a layer has attended by this layout
        self._masks: dict[tuple[str, int | None], Tensor] = {}

    def pad(self, packed: Tensor) -> Tensor:
        """``[N, ...]`` row tokens -> ``[B, T, ...]``, zeros where a row is shorter."""
        if not self.even:
            padded = packed.new_zeros(self.rows * self.width, *packed.shape[1:])
            packed = padded.index_copy(0, self.unpad_index, packed)
        return packed.reshape(self.rows, self.width, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """``[B, T, ...]`` -> ``[N, ...]``, the inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.even else flat.index_select(0, self.unpad_index)

    def prefix_mask(self, window: int | None) -> Tensor:
        """Additive causal mask ``[S, S]`` of the prefix on itself, float32."""
        position = torch.arange(self.prefix, device=self.positions.device)
        return self._mask("prefix", window, position[:, None], position[None])

    def rows_mask(self, window: int | None) -> Tensor:
        """Additive mask ``[B, 1, T, S + keys]`` of row tokens on the prefix and on their own row, float32."""
        query = self.prefix + self.query_columns[:, None, :, None]
        key = torch.cat([torch.arange(self.prefix, device=query.device), self.prefix + self.key_columns])
        return self._mask("rows", window, query, key)

    def _mask(self, name: str, window: int | None, query: Tensor, key: Tensor) -> Tensor:
        if (name, window) not in self._masks:  # the same for every layer of the kind
            visible = key <= query
            if window is not None:
                visible = visible & (key > query - window)
            self._masks[name, window] = torch.zeros(visible.shape, device=query.device).masked_fill(
                ~visible, float("-inf")
            )
        return self._masks[name, window]

    def remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add this pass's row keys and values ``[N, Hkv, Dh]`` to memory.

        Returns:
            All own keys and values of each row so far, ``[B, keys, Hkv, Dh]``.
        """
        if self.memory is None:
            return self.pad(key), self.pad(value)
        shape = (self.rows * self.memory.capacity, *key.shape[1:])
        if layer not in self.memory.rows:
            self.memory.rows[layer] = (key.new_zeros(shape), value.new_zeros((*shape[:2], value.shape[-1])))
        keys, values = self.memory.rows[layer]
        keys.index_copy_(0, self.memory_index, key)
        values.index_copy_(0, self.memory_index, value)
        return keys.unflatten(0, (self.rows, -1)), values.unflatten(0, (self.rows, -1))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    layer: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one layer over a packed sequence.

    Args:
        query: ``[M, H, Dh]``.
        key: ``[M, Hkv, Dh]``.
        value: ``[M, Hkv, Dh]``.
        layout: Which tokens see which.
        layer: The layer's index, for the memory of generation.
        scale: Factor on the scores.
        window: Sliding window in tokens, ``None`` for full attention.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).

    Returns:
        ``[M, H, Dh]``.
    """
    layout.followed = True
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float32:
        # The CPU's half-precision attention backward is many times slower than float32's, and less exact.
        query, key, value = query.float(), key.float(), value.float()
    s = layout.prefix_in_pass
    outputs = []
    if s:
        prefix_key, prefix_value = key[:s], value[:s]
        mask = layout.prefix_mask(window)[None, None]  # as one row without a prefix of its own
        outputs.append(_attend(query[None, :s], key[:0], value[:0], prefix_key[None], prefix_value[None], mask,
                               scale, softcap)[0])  # fmt: skip
        if layout.memory is not None:
            layout.memory.prefix[layer] = (prefix_key, prefix_value)
    elif layout.prefix and layout.memory is not None:
        prefix_key, prefix_value = layout.memory.prefix[layer]
    else:
        prefix_key, prefix_value = key[:0], value[:0]
    own_key, own_value = layout.remember(layer, key[s:], value[s:])
    rows = _attend(
        layout.pad(query[s:]), prefix_key, prefix_value, own_key, own_value, layout.rows_mask(window), scale, softcap
    )
    outputs.append(layout.unpad(rows))
    return torch.cat(outputs).to(dtype) if s else outputs[0].to(dtype)


def _attend(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Rows attend to a shared prefix and to themselves.

    Args:
        query: ``[B, T, H, Dh]``.
        prefix_key: ``[S, Hkv, Dh]``; as ``prefix_value``.
        prefix_value: ``[S, Hkv, Dh]``, ``S`` may be 0.
        key: ``[B, T', Hkv, Dh]``; as ``value``.
        value: ``[B, T', Hkv, Dh]``.
        mask: Additive, broadcasts to ``[B, 1, T, S + T']``.
        scale: Factor on the scores.
        softcap: See `packed_attention`.

    Returns:
        ``[B, T, H, Dh]``.
    """
    b, t, h, dh = query.shape
    s, hkv = prefix_key.shape[:2]
    g = h // hkv
    if b * h * t * (s + key.shape[1]) > EXPLICIT_LIMIT and softcap is None:
        keys = torch.cat([prefix_key.expand(b, *prefix_key.shape), key], 1).transpose(1, 2).repeat_interleave(g, 1)
        values = torch.cat([prefix_value.expand(b, *prefix_value.shape), value], 1).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values.repeat_interleave(g, 1), mask.to(query.dtype), scale=scale
        )
        return out.transpose(1, 2)
    # One big product per key/value head against the prefix, which is never copied, and small ones within each row.
    # Operands are brought into the order of the products once: a product of permuted ones would copy them every time.
    q = (query * scale).view(b, t, hkv, g, dh).permute(2, 0, 3, 1, 4).reshape(hkv, b * g * t, dh)
    k, v = key.permute(2, 0, 1, 3).contiguous(), value.permute(2, 0, 1, 3).contiguous()  # [Hkv, B, T', Dh]
    scores = (q.view(hkv, b, g * t, dh) @ k.transpose(2, 3)).view(hkv, b, g, t, -1)
    if s:
        shared = (q @ prefix_key.permute(1, 2, 0)).view(hkv, b, g, t, s)
        scores = torch.cat([shared, scores], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The mask's [B, 1, T, .] stands against [., B, g, T, .].
    weights = torch.softmax(scores.float() + mask, -1).to(query.dtype)
    out = weights[..., s:].reshape(hkv, b, g * t, -1) @ v
    if s:
        shared = weights[..., :s].reshape(hkv, b * g * t, s) @ prefix_value.permute(1, 0, 2)
        out = out + shared.view(hkv, b, g * t, -1)
    return out.view(hkv, b, g, t, -1).permute(1, 3, 0, 2, 4).reshape(b, t, h, -1)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401 - whatever else an architecture hands to its attention
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer; heads come as ``[1, H, M, Dh]``."""
    if layout is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layout is None:
        return _softcapped(query, key, value, attention_mask, scaling, softcap), None
    if s_aux is not None:
        raise UserError(f"{type(module).__name__} uses attention sinks, which packed scoring does not support yet")
    out = packed_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout,
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """What SDPA cannot do, for the plain path: ``[B, H, T, Dh]`` each -> ``[B, T, H, Dh]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    hidden = torch.finfo(torch.float32).min  # not -inf: a padding token may see nothing at all
    scores = scores.float().masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores.float() + mask
    return (torch.softmax(scores, -1).to(value.dtype) @ value).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
