"""The layout of a packed batch: which tokens each token attends to.

The frozen model runs a batch as one packed sequence ``[1, M, D]`` without padding: the prefix of all rows once, then
the prefixes that groups of rows share (for example a candidate prompt that is scored on many examples), then the rest
of each row. All layers except attention work token by token and need no change. Attention follows a `PackedLayout`,
which defines the tokens that each token attends to. A prompt of 100 tokens therefore costs 100 tokens per step instead
of 100 per row, and its gradient is the sum over rows. Visibility depends on positions only, so padding, batch size and
order do not change results. Keys and values without tokens (prefix tuning) form one more level before the first.

PrefixGrouper (arXiv 2506.05433) shares prefixes in the same way for RL training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm.cascade import Part, has_kernels, parts_of
from lightning_prompts.lm.config import Attention
from lightning_prompts.lm.key_values import KeyValues
from lightning_prompts.lm.transfer import to_device, views

# Above this many scores per layer (16 MiB in float32, kept by every layer for the backward pass), use fused kernels,
# which keep no scores. Without a backward pass, scores are freed after each layer.
EXPLICIT_LIMIT = 1 << 22
EXPLICIT_LIMIT_NO_GRAD = 1 << 26

Pair = tuple[Tensor, Tensor]


class SegmentLevel:
    """One level of a prefix tree: segments of text, the same number for each segment of the level above.

    All index arrays are computed on the host; `PackedLayout` copies them to the device.

    Args:
        counts: Tokens of each segment, ``n`` of them.
        starts: Position of each segment's first token, ``[n]``.
        offset: Packed tokens before this level.
        bucketed: Round up the number of tokens and the longest segment, so that batches have few distinct shapes.
            Padding tokens follow the tokens of the level; no other token attends to them.
    """

    counts: Tensor
    starts: Tensor
    query_positions: Tensor
    pad_index: Tensor
    unpad_index: Tensor

    def __init__(self, counts: Sequence[int], starts: NDArray[np.int64], offset: int, bucketed: bool = False) -> None:
        """Compute the indices between packed and padded form once, for all layers."""
        self.size, self.width, self.used = len(counts), max(counts), sum(counts)
        self.tokens, self.most_spare = self.used, 0
        if bucketed and self.size > 1:
            self.width, self.tokens = bucket(self.width), bucket(self.used)
            self.most_spare = bucket_step(self.used) - 1
        self.spare = self.tokens - self.used  # padding tokens
        self.offset = offset
        self.even = min(counts) == self.width and not self.spare
        self.host_counts, self.host_starts = np.array(counts), starts
        column = np.arange(self.width)
        self.inside = column < self.host_counts[:, None]  # [n, T]
        self.positions = starts[:, None] + column  # [n, T]

    @property
    def place(self) -> slice:
        """The slice of the level's tokens in the packed sequence, including padding."""
        return slice(self.offset, self.offset + self.tokens)

    def ends(self, multiple: int = 1) -> NDArray[np.int64]:
        """Cumulative token counts of groups of ``multiple`` segments, starting with 0; ``[n / multiple + 1]``."""
        totals = self.host_counts.reshape(-1, multiple).sum(-1)
        return np.concatenate([np.zeros(1, dtype=np.int64), totals.cumsum()])

    def host_numbers(self) -> list[NDArray[np.int64]]:
        """Return the index arrays that the device needs, in the order of `take`."""
        places = np.flatnonzero(self.inside)
        outside = np.full(self.spare, self.size * self.width)  # one place after the end of the padded form
        put = np.concatenate([places, outside])
        return [self.host_counts, self.host_starts, self.positions, put, np.concatenate([places, 0 * outside])]

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Store the device copies of `host_numbers`."""
        self.counts, self.starts, self.query_positions, self.pad_index, self.unpad_index = tensors

    def pad(self, packed: Tensor) -> Tensor:
        """Pad the tokens of this level, ``[N, ...]`` -> ``[n, T, ...]``, with zeros after shorter segments."""
        if not self.even:
            places = self.size * self.width
            # The CUDA graph of a batch without padding tokens also runs batches with some, which need their place.
            padded = packed.new_zeros(places + (self.most_spare > 0), *packed.shape[1:])
            packed = padded.index_copy(0, self.pad_index, packed)[:places]
        return packed.reshape(self.size, self.width, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Invert `pad`, ``[n, T, ...]`` -> ``[N, ...]``; padding tokens get a copy of the first place."""
        flat = padded.flatten(0, 1)
        return flat if self.even else flat.index_select(0, self.unpad_index)


def bucket_step(count: int) -> int:
    """Step that `bucket` rounds up to: four buckets between powers of two, eight above 1,024."""
    return max(8, (1 << max(count - 1, 1).bit_length()) // (8 if count <= 1024 else 16))


def bucket(count: int) -> int:
    """Round a count up, so that few distinct counts occur."""
    step = bucket_step(count)
    return -(-count // step) * step


class KVCache:
    """Keys and values of earlier passes, per layer, for batched generation.

    Args:
        capacity: Tokens per row that belong to the row alone, including generated tokens.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty; the first write of a layer allocates its buffers."""
        self.capacity = capacity
        self.levels: list[SegmentLevel] = []  # the shared levels
        self.starts: NDArray[np.int64] | None = None  # position of each row's first own token
        self.shared: dict[int, list[Pair]] = {}
        self.rows: dict[int, Pair] = {}


class PackedLayout:
    """The tokens that each packed token attends to.

    Args:
        levels: Token counts of the segments of each level in this pass: shared levels first, rows last. The number of
            segments of a level is a multiple of that of the level above; segment ``i`` is a child of segment
            ``i // multiple``.
        device: Device of the model.
        past: Keys and values before all tokens, or ``None``.
        cache: Stores keys and values for later passes, or ``None``. Later passes have rows only.
        columns: Tokens of each row that earlier passes have stored in ``cache``; ``None`` in the first pass.
        bucketed: Pad to few distinct shapes; see `SegmentLevel`.
        attention: How to compute attention; see `LMConfig`.
        fused: Whether to compile the small operations between kernels.
    """

    last: Tensor
    row_columns: Tensor
    cache_index: Tensor
    positions: Tensor

    def __init__(
        self,
        levels: Sequence[list[int]],
        device: torch.device,
        past: KeyValues | None = None,
        cache: KVCache | None = None,
        columns: list[int] | None = None,
        bucketed: bool = False,
        attention: Attention = "auto",
        fused: bool = False,
    ) -> None:
        """Compute all positions once, for all layers, and copy them to the device in one transfer."""
        self.past, self.cache, self.device = past, cache, device
        self.later = columns is not None  # earlier passes have filled the cache
        self.above: list[SegmentLevel] = []  # levels whose keys come from the cache or from ``past``
        self.passing: list[SegmentLevel] = []  # levels with tokens in this pass
        self.brought: list[SegmentLevel | None] = []  # for each given level; ``None`` for one without tokens
        starts = np.zeros(1, dtype=np.int64)
        self.new: list[SegmentLevel] = []  # levels that are not on the device yet
        if cache is not None and cache.starts is not None:
            self.above = cache.levels
            starts = cache.starts + np.array(columns)
        elif past is not None:
            self.above = self.new = [SegmentLevel([past.length], starts, 0)]
            starts = starts + past.length
        offset = 0
        for counts in levels:
            if not any(counts):
                self.brought.append(None)
                continue
            starts = starts.repeat(len(counts) // len(starts))
            self.passing.append(SegmentLevel(counts, starts, offset, bucketed))
            self.brought.append(self.passing[-1])
            row_starts = starts
            starts = starts + np.array(counts)
            offset += self.passing[-1].tokens
        rows = self.passing[-1]
        self.tokens, self.used = offset, sum(level.used for level in self.passing)
        self.ends = (rows.offset + rows.ends()[1:]).tolist()  # end of each row in the packed sequence
        row_columns = np.zeros(rows.size, dtype=np.int64) if columns is None else np.array(columns)
        places = np.zeros(0, dtype=np.int64)
        if cache is not None:
            if cache.starts is None:
                cache.levels = [*self.above, *self.passing[:-1]]
                cache.starts = row_starts
            row, column = np.nonzero(rows.inside)
            places = (np.arange(rows.size) * cache.capacity + row_columns)[row] + column
        # A window of at least this length hides no key; rounded up, so that batches of similar lengths have one shape.
        longest = max(int(level.host_starts.max()) + level.width for level in self.passing)
        self.longest = -(-longest // 256) * 256
        self.new = [*self.new, *self.passing]
        positions = [
            np.concatenate([level.positions[level.inside], np.zeros(level.spare, dtype=np.int64)])
            for level in self.passing
        ]
        own = [np.concatenate(positions), np.array(self.ends) - 1, row_columns, places]
        numbers = [part for level in self.new for part in level.host_numbers()]
        self.attention: Attention = attention
        self.fused = fused
        possible = cache is None and attention != "explicit"
        together = device.type == "cuda"  # the CPU kernel would pad all segments to the longest one
        self._parts = parts_of(self.above, self.passing, together) if possible else None
        self._host = [*own, *numbers, *(cut for parts in self._parts or () for part in parts for cut in part.cuts)]
        self._take(to_device(np.concatenate([part.ravel() for part in self._host]), device))

    def __repr__(self) -> str:
        """Describe the levels of the pass in a readable form."""
        levels = [f"{level.size} x at most {level.width} tokens" for level in self.passing]
        front = [f"{level.width} ahead" for level in self.above]
        return f"PackedLayout({'; '.join(front + levels)}; {self.used} tokens and {self.tokens - self.used} of padding)"

    def _take(self, numbers: Tensor) -> None:
        """Store the device copy of all index arrays, which is one block of memory."""
        self.numbers, sent = numbers, views(numbers, self._host)
        # ``last`` holds the packed index of the last token of each row.
        packed_positions, self.last, self.row_columns, self.cache_index = sent[:4]
        self.positions = packed_positions[None]  # [1, M]
        own = 4
        for level in self.new:
            level.take(sent[own : own + 5])
            own += 5
        self._cuts = sent[own:]
        self._placed: tuple[list[Part], list[Part]] | None = None
        self.followed = False  # becomes true when a layer attends by this layout
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def cascades(self, query: Tensor, value: Tensor, window: int | None) -> bool:
        """Whether to use `cascade_attention` for a layer, which supports only windows that hide no key.

        Raises:
            UserError: The settings require a kernel that does not exist on this GPU.
        """
        if self._parts is None or (window is not None and window < self.longest):
            return False
        if has_kernels(query, value):
            return True
        if self.device.type == "cuda" and self.attention == "cascade":
            raise UserError(
                f"attention: cascade has no kernel for {str(query.dtype).removeprefix('torch.')} and heads of "
                f"{query.shape[-1]} and {value.shape[-1]} numbers on this GPU; set model.lm.attention to auto, or "
                "model.lm.dtype to bfloat16"
            )
        if query.shape[-1] != value.shape[-1]:  # unsupported by the CPU kernel
            return False
        if self.attention == "cascade":
            return True
        rows = self.passing[-1]
        above = sum(level.width for level in (*self.above, *self.passing[:-1]))
        return self.device.type == "cpu" and long_prefix(rows.size * query.shape[1], rows.width, above, score_limit())

    @property
    def parts(self) -> tuple[list[Part], list[Part]]:
        """Parts in which segments attend to themselves and to the levels above; made once, for all layers."""
        if self._placed is None:
            assert self._parts is not None
            cuts = iter(self._cuts)
            own, across = ([part.on(next(cuts), next(cuts)) for part in parts] for parts in self._parts)
            self._placed = own, across
        return self._placed

    @property
    def shape(self) -> tuple[object, ...]:
        """A key that is equal for layouts that run the same operations on tensors of the same shapes.

        The key does not identify the cache.
        """
        levels = tuple((level.size, level.width, level.tokens, level.even) for level in (*self.above, *self.passing))
        capacity = None if self.cache is None else self.cache.capacity
        return (levels, len(self.above), self.longest, self.attention, capacity)

    def on(self, numbers: Tensor) -> PackedLayout:
        """Return a copy of this layout that reads its index arrays from ``numbers``, the block of an equal shape."""
        twin = copy.copy(self)
        copies = {id(level): copy.copy(level) for level in self.new}
        for name in ("new", "above", "passing"):
            setattr(twin, name, [copies.get(id(level), level) for level in getattr(self, name)])
        twin._take(numbers)
        return twin

    def mask(self, level: int, window: int | None) -> Tensor:
        """Additive float32 mask ``[n, 1, T, keys]`` of a level in this pass over all levels above and itself."""
        if (level, window) not in self._masks:  # shared by all layers with this window
            own = self.passing[level]
            query = own.query_positions[:, :, None]
            visible = []
            for shared in [*self.above, *self.passing[:level]]:
                column = torch.arange(shared.width, device=self.device)
                key = shared.starts[:, None] + column
                seen = column < shared.counts[:, None]
                visible.append(self._visible(query, key, seen, window))
            width, begins = own.width, own.starts
            if self.cache is not None and own is self.passing[-1]:
                width, begins = self.cache.capacity, own.starts - self.row_columns
            key = begins[:, None] + torch.arange(width, device=self.device)
            visible.append(self._visible(query, key, torch.ones_like(key, dtype=torch.bool), window))
            seen = torch.cat(visible, -1)
            self._masks[level, window] = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, float("-inf"))[
                :, None
            ]
        return self._masks[level, window]

    def key_positions(self, level: int) -> Tensor:
        """Positions ``[n, keys]`` of the keys of `mask`."""
        own = self.passing[level]
        width, begins = own.width, own.starts
        if self.cache is not None and own is self.passing[-1]:
            width, begins = self.cache.capacity, own.starts - self.row_columns
        parts = [(shared.starts, shared.width) for shared in [*self.above, *self.passing[:level]]] + [(begins, width)]
        keys = [starts[:, None] + torch.arange(width, device=self.device) for starts, width in parts]
        return torch.cat([key.repeat_interleave(own.size // len(key), 0) for key in keys], -1)

    @staticmethod
    def _visible(query: Tensor, key: Tensor, seen: Tensor, window: int | None) -> Tensor:
        """Visibility ``[n, T, T']`` of keys at positions ``[n', T']`` for queries at positions ``[n, T, 1]``."""
        repeats = len(query) // len(key)
        key, seen = key.repeat_interleave(repeats, 0)[:, None], seen.repeat_interleave(repeats, 0)[:, None]
        visible = seen & (key <= query)
        return visible if window is None else visible & (key > query - window)

    def shared(self, layer: int, like: Tensor) -> list[Pair]:
        """Keys and values ``[n, T, Hkv, Dh]`` of the levels that have no tokens in this pass."""
        if not self.above:
            return []
        if self.cache is not None and layer in self.cache.shared:
            return self.cache.shared[layer]
        assert self.past is not None
        key, value = self.past.layers[layer]
        return [(key[None].to(like.dtype), value[None].to(like.dtype))]

    def own(self, level: SegmentLevel, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Keys and values ``[n, T, Hkv, Dh]`` of a level; for rows, including those of earlier passes."""
        if self.cache is None or level is not self.passing[-1]:
            return level.pad(key), level.pad(value)
        shape = (level.size * self.cache.capacity, *key.shape[1:])
        if layer not in self.cache.rows:
            self.cache.rows[layer] = (key.new_zeros(shape), value.new_zeros((*shape[:2], value.shape[-1])))
        keys, values = self.cache.rows[layer]
        keys.index_copy_(0, self.cache_index, key)
        values.index_copy_(0, self.cache_index, value)
        return keys.unflatten(0, (level.size, -1)), values.unflatten(0, (level.size, -1))


def score_limit() -> int:
    """The largest number of scores of a level to compute explicitly, with or without autograd."""
    return EXPLICIT_LIMIT if torch.is_grad_enabled() else EXPLICIT_LIMIT_NO_GRAD


def long_prefix(rows: int, width: int, above: int, limit: int) -> bool:
    """Whether the CPU uses cascade attention: there are too many scores to keep, and the prefix outweighs the rows.

    Args:
        rows: Rows times heads.
        width: Tokens of the longest row.
        above: Upper bound on the tokens of the shared prefix.
        limit: Largest number of scores to keep.
    """
    return above >= width and rows * width * (above + width) > limit
