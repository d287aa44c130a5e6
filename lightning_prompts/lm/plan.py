"""Plans a pass on the host: which tokens run, where logits are needed, and which tokens they predict."""

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

    What a training step does not need, which tokens are scored, is worked out when it is asked for.

    Attributes:
        levels: See `build_prefix_tree`; ``-1 - p`` stands for position ``p`` of the prompt.
        rows: Index of the level that has one segment for each context.
        heads: Where logits are needed: a level, and places among its tokens; ``N`` places in all.
        texts: Token ids of the continuations of each context.
        feeds: Of each context, the tokens to run behind it; see `distinct_feeds`.
        first: Index of the logits behind each context, ``[contexts]``.
        starts: Index of the logits behind the first token of its feeds, ``[contexts]``.
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
        """Plan to score continuations, with each context run once.

        Args:
            contexts: Token ids, at least one each.
            continuations: For each context, token ids of its continuations, at least one token each.
            groups: Sizes of groups of neighbouring contexts that share more than all contexts do, each a divisor of
                the one before. What a group shares runs once.
            shared_prompt: See `shared_prefix`.
        """
        assert all(map(len, itertools.chain.from_iterable(continuations))), "a continuation has a token at least"
        feeds = [distinct_feeds(several) for several in continuations]
        counts = np.array([sum(map(len, fed)) for fed in feeds])
        before = counts.cumsum() - counts  # fed tokens of the contexts ahead
        ahead = np.arange(len(contexts))
        single = max(map(len, feeds)) <= 1  # then a continuation is the end of its row
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
        """Plan to score the answer of each row, and its end; see `of`."""
        contexts = [row.context for row in rows]
        return cls.of(contexts, [[row.answer + row.end] for row in rows], groups, shared_prompt)

    @property
    def tokens_to_run(self) -> int:
        """Tokens of all segments."""
        return sum(map(sum, self.counts))

    @property
    def counts(self) -> list[list[int]]:
        """Tokens of the segments of each level."""
        return [[len(segment) for segment in level] for level in self.levels]

    @property
    def logits(self) -> int:
        """``N``, at how many places there are logits."""
        return sum(len(places) for _, places in self.heads)

    @property
    def continuations(self) -> int:
        """How many there are."""
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
        """For each token to score, the index ``[n]`` of the logits that predict it."""
        return self._targets[0]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens to score, ``[n]``, of one continuation after another."""
        return self._targets[1]

    @property
    def owners(self) -> NDArray[np.int64]:
        """The continuation that each of them is part of, ``[n]``."""
        return self._targets[2]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities ``[continuations]`` in nats, from logits ``[N, V]`` in float32."""
        places, tokens, owners = to_device_together(self._targets, logits.device)
        values = torch.log_softmax(logits, -1)[places, tokens]
        return values.new_zeros(self.continuations).index_add(0, owners, values)


def side_by_side(feeds: Sequence[list[list[int]]]) -> list[list[int]]:
    """The feeds behind each of ``N`` contexts, as many segments for each: empty ones behind those with fewer."""
    most = max(map(len, feeds))
    return [feed for several in feeds for feed in (several + [[]] * (most - len(several)))]


def distinct_feeds(continuations: Sequence[Tokens]) -> list[list[int]]:
    """The tokens to run to predict continuations: all but the last of each, without what another one begins with."""
    if len(continuations) == 1:  # an answer may be long, and a set of all its beginnings large
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
    """The longest run of tokens that all contexts start with.

    At least one token is left to each context, since its last hidden state predicts the answer's first token.

    Args:
        contexts: Token ids, ``-1 - p`` for position ``p`` of the prompt.
        shared_prompt: Whether the prompt's positions hold the same vectors in every row.
    """
    # What the first and the last in alphabetical order share, all share.
    first, other = min(contexts), max(contexts)
    limit = min(map(len, contexts)) - 1
    for index in range(limit):
        if (first[index] < 0 and not shared_prompt) or first[index] != other[index]:
            return first[:index]
    return first[:limit]


def build_prefix_tree(
    contexts: Sequence[list[int]], feeds: Sequence[list[int]], groups: Sequence[int], shared_prompt: bool
) -> list[list[list[int]]]:
    """Cut rows into levels of segments, so that tokens that rows share run once.

    Args:
        contexts: Of ``B`` rows, those of a group next to each other.
        feeds: The tokens of each row to run, its context first.
        groups: Rows in a group at each level, each a divisor of the one before; the first is mostly ``B``.
        shared_prompt: See `shared_prefix`.

    Returns:
        The segments of each shared level, and last the rest of each row.
    """
    levels = []
    depth, size = [0], len(contexts)
    for group in groups:
        starts = range(0, len(contexts), group)
        prefixes = [shared_prefix(contexts[start : start + group], shared_prompt) for start in starts]
        levels.append([prefix[depth[start // size] :] for prefix, start in zip(prefixes, starts, strict=True)])
        depth, size = [len(prefix) for prefix in prefixes], group
    return [*levels, [feed[depth[index // size] :] for index, feed in enumerate(feeds)]]
