"""Plan a pass on the host: the tokens to run, the places of the logits, and the tokens that they predict."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.transfer import to_device_together

Tokens = Sequence[int]


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward pass over contexts and the continuations to score after them.

    The scored tokens are computed on first use, because training steps do not need them.

    Attributes:
        levels: See `build_prefix_tree`; ``-1 - p`` stands for position ``p`` of the prompt.
        rows: Index of the level with one segment per context.
        heads: Places of the logits: indices of levels, each with places among the tokens of the level; ``N`` in total.
        texts: Token ids of the continuations of each context.
        feeds: Token sequences to run after each context; see `distinct_feeds`.
        first: Index of the logits after each context, ``[contexts]``.
        starts: Index of the logits after the first token of the feeds of each context, ``[contexts]``.
    """

    levels: list[list[list[int]]]
    rows: int
    heads: list[tuple[int, NDArray[np.int64]]]
    texts: Sequence[Sequence[Tokens]]
    feeds: list[list[list[int]]]
    first: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        contexts: Sequence[list[int]],
        continuations: Sequence[Sequence[Tokens]],
        groups: Sequence[int],
        shared_prompt: bool,
    ) -> Plan:
        """Plan to score continuations, running each context once.

        Args:
            contexts: Token ids, at least one each.
            continuations: For each context, the token ids of its continuations, at least one token each.
            groups: Sizes of nested groups of consecutive contexts with a longer common prefix, from large to small;
                each size divides the one before. A common prefix runs once per group.
            shared_prompt: See `shared_prefix`.
        """
        assert all(map(len, itertools.chain.from_iterable(continuations))), "a continuation needs at least one token"
        feeds = [distinct_feeds(several) for several in continuations]
        counts = np.array([sum(map(len, fed)) for fed in feeds])
        before = counts.cumsum() - counts  # fed tokens of the contexts before
        ahead = np.arange(len(contexts))
        single = max(map(len, feeds)) <= 1  # then the continuation is part of its row
        run = contexts
        if single:
            run = [context + fed[0] if fed else context for context, fed in zip(contexts, feeds, strict=True)]
        levels = build_prefix_tree(contexts, run, [len(contexts), *groups], shared_prompt)
        rows = len(levels) - 1
        ends = np.array([len(segment) for segment in levels[rows]]).cumsum()
        if single:
            first = ahead + before
            places = np.arange(len(contexts) + counts.sum()) + (ends - 1 - counts - first).repeat(1 + counts)
            return cls(levels, rows, [(rows, places)], continuations, feeds, first, first + 1)
        heads = [(rows, ends - 1), (rows + 1, np.arange(counts.sum()))]
        return cls([*levels, side_by_side(feeds)], rows, heads, continuations, feeds, ahead, len(contexts) + before)

    @classmethod
    def of_answers(cls, rows: Sequence[Row], groups: Sequence[int], shared_prompt: bool) -> Plan:
        """Plan to score the answer and the end of each row; see `of`."""
        contexts = [row.context for row in rows]
        return cls.of(contexts, [[row.answer + row.end] for row in rows], groups, shared_prompt)

    @property
    def tokens_to_run(self) -> int:
        """Number of tokens of all segments."""
        return sum(map(sum, self.counts))

    @property
    def counts(self) -> list[list[int]]:
        """Number of tokens of each segment, by level."""
        return [[len(segment) for segment in level] for level in self.levels]

    @property
    def logits(self) -> int:
        """``N``, the number of places with logits."""
        return sum(len(places) for _, places in self.heads)

    @property
    def continuations(self) -> int:
        """Number of continuations."""
        return sum(map(len, self.texts))

    @functools.cached_property
    def _targets(self) -> list[NDArray[np.int64]]:
        predicted_by: list[int] = []
        lengths: list[int] = []
        for several, fed, begin, start in zip(
            self.texts, self.feeds, self.first.tolist(), self.starts.tolist(), strict=True
        ):
            at = list(itertools.accumulate(map(len, fed), initial=start))
            for ids in several:
                rest = list(ids[:-1])
                mine = next((one for one, feed in zip(at, fed, strict=False) if feed[: len(rest)] == rest), start)
                predicted_by += [begin, *range(mine, mine + len(rest))]
                lengths.append(len(ids))
        tokens = [token for several in self.texts for ids in several for token in ids]
        return [np.array(predicted_by), np.array(tokens), np.arange(len(lengths)).repeat(lengths)]

    @property
    def predicted_by(self) -> NDArray[np.int64]:
        """Index of the logits that predict each scored token, ``[n]``."""
        return self._targets[0]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The scored tokens in the order of the continuations, ``[n]``."""
        return self._targets[1]

    @property
    def owners(self) -> NDArray[np.int64]:
        """Index of the continuation of each scored token, ``[n]``."""
        return self._targets[2]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Compute log-probabilities ``[continuations]`` in nats from float32 logits ``[N, V]``."""
        places, tokens, owners = to_device_together(self._targets, logits.device)
        values = torch.log_softmax(logits, -1)[places, tokens]
        return values.new_zeros(self.continuations).index_add(0, owners, values)


def side_by_side(feeds: Sequence[list[list[int]]]) -> list[list[int]]:
    """Concatenate the feeds of all contexts, with empty segments so that each context has the same number."""
    most = max(map(len, feeds))
    return [feed for several in feeds for feed in (several + [[]] * (most - len(several)))]


def distinct_feeds(continuations: Sequence[Tokens]) -> list[list[int]]:
    """Return the token sequences to run to predict continuations.

    A continuation needs all its tokens but the last. Sequences that are prefixes of others are left out.
    """
    if len(continuations) == 1:  # a shortcut: the set of all prefixes of a long answer is large
        only = list(continuations[0][:-1])
        return [only] if only else []
    kept: list[list[int]] = []
    begun: set[tuple[int, ...]] = set()
    for ids in sorted(continuations, key=len, reverse=True):
        feed = tuple(ids[:-1])
        if feed and feed not in begun:
            kept.append(list(feed))
            begun.update(feed[:length] for length in range(1, len(feed) + 1))
    return kept


def shared_prefix(contexts: Sequence[list[int]], shared_prompt: bool) -> list[int]:
    """Return the longest common prefix that leaves at least one token to each context.

    The hidden state of the last token of a context predicts the first token of its answer.

    Args:
        contexts: Token ids, with ``-1 - p`` for position ``p`` of the prompt.
        shared_prompt: Whether all rows have the same vectors at the positions of the prompt.
    """
    # The common prefix of all contexts is that of the first and the last in lexicographic order.
    first, other = min(contexts), max(contexts)
    limit = min(map(len, contexts)) - 1
    for index in range(limit):
        if (first[index] < 0 and not shared_prompt) or first[index] != other[index]:
            return first[:index]
    return first[:limit]


def build_prefix_tree(
    contexts: Sequence[list[int]], feeds: Sequence[list[int]], groups: Sequence[int], shared_prompt: bool
) -> list[list[list[int]]]:
    """Divide rows into levels of segments, so that shared tokens run once.

    Args:
        contexts: Contexts of ``B`` rows, with the rows of a group next to each other.
        feeds: The tokens of each row to run, starting with its context.
        groups: Rows per group at each level, usually starting with ``B``; each number divides the one before.
        shared_prompt: See `shared_prefix`.

    Returns:
        The segments of each shared level, then the rest of each row.
    """
    levels = []
    depth, size = [0], len(contexts)
    for group in groups:
        starts = range(0, len(contexts), group)
        prefixes = [shared_prefix(contexts[start : start + group], shared_prompt) for start in starts]
        levels.append([prefix[depth[start // size] :] for prefix, start in zip(prefixes, starts, strict=True)])
        depth, size = [len(prefix) for prefix in prefixes], group
    return [*levels, [feed[depth[index // size] :] for index, feed in enumerate(feeds)]]
