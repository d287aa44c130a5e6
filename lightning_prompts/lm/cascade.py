"""Cascade attention: one flash kernel call for each level that a row attends to, merged exactly.

A query of a row attends to each level above the row and, causally, to the row itself. A flash kernel computes one such
part without keeping scores, and returns the output with the log-sum-exp of the scores. Outputs ``o_i`` with
log-sum-exps ``l_i`` merge to ``sum_i exp(l_i - l) o_i``, where ``l`` is the log-sum-exp of all ``l_i``. The backward
pass calls the kernel of each part with the merged output and ``l``. The probabilities ``exp(score - l)`` are then those
of the whole softmax, so the gradients of keys and values are exact, and the gradients of queries add up. Shared
segments are never copied into rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_prompts.lm.layout import PackedLayout, SegmentLevel

# In the backward pass, a kernel processes all queries for each block of keys and each head. If many queries attend to
# few keys, distribute the queries over copies of the keys, to occupy more of the device.
QUERIES_OF_A_COPY = 128
MOST_COPIES = 8
Merge: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Part:
    """The queries and keys of one part of the attention, and their division into sequences.

    Attributes:
        queries: Slice of the queries in the packed sequence.
        source: Index of the level of the keys, among the levels above followed by the levels of the pass.
        keys: Slice of the keys in the packed sequence; ``None`` for keys before it.
        most_queries: Upper bound on the queries of a sequence.
        most_keys: Upper bound on the keys of a sequence.
        causal: Whether a query attends only to keys up to its own place.
        copies: Number of sequences that attend to the same keys.
        cuts: Ends of the sequences of queries and of keys, each starting with 0; ``[n + 1]``.
        query_ends: Device copy of the first, int32.
        key_ends: Device copy of the second, int32.
    """

    queries: slice
    source: int
    keys: slice | None
    most_queries: int
    most_keys: int
    causal: bool
    copies: int
    cuts: tuple[NDArray[np.int64], NDArray[np.int64]]
    query_ends: Tensor | None = None
    key_ends: Tensor | None = None

    def on(self, query_ends: Tensor, key_ends: Tensor) -> Part:
        """Return the part with the device copies of its cuts."""
        return replace(self, query_ends=query_ends.int(), key_ends=key_ends.int())


def parts_of(
    above: Sequence[SegmentLevel], passing: Sequence[SegmentLevel], together: bool
) -> tuple[list[Part], list[Part]]:
    """Divide the attention into parts: segments to themselves, and segments to the levels above.

    Args:
        above: Levels whose keys come before the packed sequence.
        passing: Levels of the packed sequence.
        together: Whether one part covers the attention of all levels to themselves; otherwise one part per level.

    Returns:
        The parts of segments to themselves, and the parts of segments to the levels above.
    """
    cuts = []
    for level in passing:
        # Padding tokens form sequences of their own, none longer than a row.
        rounds = -(-level.most_spare // level.width)
        behind = np.minimum(level.used + level.width * np.arange(1, rounds + 1), level.tokens)
        cuts.append(np.concatenate([level.ends(), behind]))
    own = []
    if together:
        place = slice(0, sum(level.tokens for level in passing))
        width = max(level.width for level in passing)
        shifted = [level.offset + cut[1:] for level, cut in zip(passing, cuts, strict=True)]
        cut = np.concatenate([np.zeros(1, dtype=np.int64), *shifted])
        own.append(Part(place, len(above), place, width, width, True, 1, (cut, cut)))
    else:
        for index, (level, cut) in enumerate(zip(passing, cuts, strict=True)):
            place, source, width = level.place, len(above) + index, level.width
            own.append(Part(place, source, place, width, width, True, 1, (cut, cut)))
    across = []
    for index, level in enumerate(passing):
        for source, seen in enumerate([*above, *passing[:index]]):
            keys = None if source < len(above) else seen.place
            if seen.size == 1:
                copies = _copies(level.tokens)
                most = level.tokens // copies
                ends = (np.arange(copies + 1) * most, np.arange(copies + 1) * seen.tokens)
            else:
                copies, multiple = 1, level.size // seen.size
                ends = (level.ends(multiple), seen.ends())
                ends[0][-1] = level.tokens  # padding tokens attend to the keys of the last segment
                most = level.width * multiple + level.most_spare
            across.append(Part(level.place, source, keys, most, seen.width, False, copies, ends))
    return own, across


def _copies(queries: int) -> int:
    """The number of copies of the keys to distribute ``queries`` tokens over."""
    copies = 1
    while copies < MOST_COPIES and queries % (2 * copies) == 0 and queries // (2 * copies) >= QUERIES_OF_A_COPY:
        copies *= 2
    return copies


def has_kernels(query: Tensor, value: Tensor) -> bool:
    """Whether flash kernels support these queries ``[M, H, Dh]`` and values ``[M, Hkv, Dh]`` on their device."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[-1]
    return width == value.shape[-1] and width % 8 == 0 and width <= 256 and _flash_runs_on(query.device)


@functools.cache
def _flash_runs_on(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, layer: int, scale: float
) -> Tensor:
    """Compute `packed_attention` part by part.

    Args:
        query: ``[M, H, Dh]``.
        key: ``[M, Hkv, Dh]``.
        value: ``[M, Hkv, Dh]``.
        layout: The tokens that each token attends to.
        layer: Index of the layer, for keys and values before all tokens.
        scale: Factor on the scores.

    Returns:
        ``[M, H, Dh]``.
    """
    before = [tensor[0] for pair in layout.shared(layer, key) for tensor in pair]
    merge = _compiled_merge() if layout.fused else _merge
    output: Tensor = _Cascade.apply(*layout.parts, merge, scale, query, key, value, *before)  # type: ignore[no-untyped-call]
    return output


class _Cascade(torch.autograd.Function):
    """All parts of the attention of a layer."""

    @staticmethod
    def forward(
        ctx: Any,
        own: list[Part],
        across: list[Part],
        merge: Merge,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *before: Tensor,
    ) -> Tensor:
        found = [_attend(part, query, key[part.queries], value[part.queries], scale) for part in own]
        output, log_sum = found[0]
        if len(found) > 1:
            output, log_sum = torch.cat([one for one, _ in found]), torch.cat([one for _, one in found], 1)
        for part in across:
            other, log_other = _attend(part, query, *_seen(part, key, value, before), scale)
            merge(output[part.queries], log_sum[:, part.queries], other, log_other)
        ctx.own, ctx.across, ctx.scale = own, across, scale
        ctx.save_for_backward(query, key, value, output, log_sum, *before)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, *before = ctx.saved_tensors
        rest = (gradient.contiguous(), query), (output, log_sum, ctx.scale)
        found = [_attend_backward(part, *rest[0], key[part.queries], value[part.queries], *rest[1]) for part in ctx.own]
        packed = list(found[0]) if len(found) == 1 else [torch.cat(one) for one in zip(*found, strict=True)]
        in_front: list[Tensor | None] = [None] * len(before)
        for part in ctx.across:
            of_query, *of_seen = _attend_backward(part, *rest[0], *_seen(part, key, value, before), *rest[1])
            packed[0][part.queries] += of_query
            for index, new in enumerate(of_seen):
                if part.keys is not None:
                    packed[1 + index][part.keys] += new
                else:
                    known = in_front[2 * part.source + index]
                    in_front[2 * part.source + index] = new if known is None else known + new
        return (None, None, None, None, *packed, *in_front)


def _merge(output: Tensor, log_sum: Tensor, other: Tensor, log_other: Tensor) -> None:
    """Merge another part into outputs ``[N, H, Dh]`` and their float32 log-sum-exps ``[H, N]``, in place."""
    together = torch.logaddexp(log_sum, log_other)
    share = (log_sum - together).exp().T[:, :, None]
    output.copy_(torch.lerp(other.float(), output.float(), share))
    log_sum.copy_(together)


@functools.cache
def _compiled_merge() -> Merge:
    return torch.compile(_merge, dynamic=True)


def _seen(part: Part, key: Tensor, value: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a part, repeated for each copy."""
    if part.keys is None:
        pair = before[2 * part.source], before[2 * part.source + 1]
    else:
        pair = key[part.keys], value[part.keys]
    if part.copies == 1:
        return pair
    first, second = (one.expand(part.copies, *one.shape).flatten(0, 1) for one in pair)
    return first, second


def _attend(part: Part, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the output ``[N, H, Dh]`` of a part and the float32 log-sum-exps of its scores ``[H, N]``."""
    query, ends = query[part.queries], (part.query_ends, part.key_ends)
    if query.device.type == "cuda":
        output, log_sum = torch.ops.aten._flash_attention_forward(
            query, key, value, *ends, part.most_queries, part.most_keys, 0.0, part.causal, False, scale=scale
        )[:2]
    else:
        rows = _Rows(part, query, key, value)
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *rows.tensors, 0.0, part.causal, attn_mask=rows.mask, scale=scale
        )
        blind = ~rows.keys.any(-1)[:, None, None, None]  # sequences without keys
        output = rows.unpadded(output.masked_fill(blind, 0.0), rows.queries)
        log_sum = rows.unpadded(log_sum[..., None].masked_fill(blind, float("inf")), rows.queries)[..., 0].T
    if part.copies == 1 and not part.causal:
        # For sequences without keys, the CUDA kernel returns +infinity; the logarithm of the empty sum is -infinity.
        log_sum = log_sum.masked_fill(torch.isposinf(log_sum), float("-inf"))
    return output, log_sum


def _attend_backward(
    part: Part,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the queries ``[N, H, Dh]``, keys and values ``[N', Hkv, Dh]`` of a part.

    Args:
        part: The part.
        gradient: Gradient of the merged output, ``[M, H, Dh]``.
        query: ``[M, H, Dh]``.
        key: Keys of the part, ``[N' * copies, Hkv, Dh]``.
        value: Values of the part, of the same shape.
        output: The merged output, ``[M, H, Dh]``.
        log_sum: Log-sum-exps of all scores of each query, ``[H, M]``.
        scale: Factor on the scores.
    """
    own = part.queries
    gradient, query, output, log_sum = gradient[own], query[own], output[own], log_sum[:, own]
    if query.device.type == "cuda":
        unused = torch.empty(0, device=query.device)
        state = torch.empty(2, dtype=torch.uint64, device=query.device)  # RNG state of dropout, which is off
        found = torch.ops.aten._flash_attention_backward(
            gradient,
            query,
            key,
            value,
            output,
            log_sum.contiguous(),
            part.query_ends,
            part.key_ends,
            part.most_queries,
            part.most_keys,
            0.0,
            part.causal,
            state,
            unused,
            scale=scale,
        )
        of_query, of_key, of_value = found
    else:
        rows = _Rows(part, query, key, value)
        given = [rows.padded(one, rows.queries) for one in (gradient, output, log_sum.T[..., None])]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            given[0], *rows.tensors, given[1], given[2][..., 0], 0.0, part.causal, attn_mask=rows.mask, scale=scale
        )
        of_query = rows.unpadded(found[0], rows.queries)
        of_key, of_value = (rows.of_keys(one, key) for one in found[1:])
    if part.copies > 1:
        of_key, of_value = (one.unflatten(0, (part.copies, -1)).sum(0) for one in (of_key, of_value))
    return of_query, of_key, of_value


class _Rows:
    """The sequences of a part in padded form, for the CPU kernel, which does not support packed sequences."""

    def __init__(self, part: Part, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Pad queries ``[N, H, Dh]`` and keys and values ``[N', Hkv, Dh]`` to ``[n, H, T, Dh]``."""
        assert part.query_ends is not None
        assert part.key_ends is not None
        self.queries, self.keys = _inside(part.query_ends), _inside(part.key_ends)
        self.groups = query.shape[1] // key.shape[1]
        repeated = (one.repeat_interleave(self.groups, 1) for one in (key, value))
        self.tensors = (self.padded(query, self.queries), *(self.padded(one, self.keys) for one in repeated))
        self.mask: Tensor | None = None
        if not part.causal and not self.keys.all():
            unseen = torch.zeros(self.keys.shape, dtype=query.dtype, device=query.device).masked_fill_(
                ~self.keys, float("-inf")
            )
            self.mask = unseen[:, None, None].expand(-1, 1, self.queries.shape[1], -1)

    def padded(self, packed: Tensor, inside: Tensor) -> Tensor:
        """Pad ``[N, H, X]`` -> ``[n, H, T, X]``."""
        places = inside.flatten().nonzero()[:, 0]
        if len(places) == inside.numel():
            rows = packed[: len(places)]
        else:
            rows = packed.new_zeros(inside.numel(), *packed.shape[1:]).index_copy_(0, places, packed[: len(places)])
        return rows.view(*inside.shape, *rows.shape[1:]).transpose(1, 2)

    def unpadded(self, rows: Tensor, inside: Tensor) -> Tensor:
        """Unpad ``[n, H, T, X]`` -> ``[N, H, X]``."""
        flat: Tensor = rows.transpose(1, 2).flatten(0, 1)
        places = inside.flatten().nonzero()[:, 0]
        return flat if len(places) == len(flat) else flat.index_select(0, places)

    def of_keys(self, rows: Tensor, key: Tensor) -> Tensor:
        """Sum gradients ``[n, H, T, Dh]`` over repeated heads -> ``[N', Hkv, Dh]``, the shape of ``key``."""
        packed: Tensor = self.unpadded(rows, self.keys).unflatten(1, (-1, self.groups)).sum(2)
        return nn.functional.pad(packed, (0, 0, 0, 0, 0, len(key) - len(packed)))


def _inside(ends: Tensor) -> Tensor:
    """Mask ``[n, T]`` of the places that each sequence has, up to the length of the longest."""
    counts = ends.diff()
    return torch.arange(int(counts.max()), device=ends.device) < counts[:, None]
