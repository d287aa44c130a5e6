"""Batched generation with a KV cache that stores shared prefixes once."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.failures import out_of_memory
from lightning_prompts.lm.key_values import Prompt, same_for_all
from lightning_prompts.lm.language_model import Usage
from lightning_prompts.lm.layout import KVCache, PackedLayout
from lightning_prompts.lm.packed import PackedLM
from lightning_prompts.lm.plan import build_prefix_tree
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.transfer import Download

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """Stopping criteria of generation.

    Attributes:
        limits: Maximum number of tokens of each row, ``[B]``; no tokens if it is not positive.
        stops: Regular expression of each row or ``None``, ``[B]``; a row stops when its text matches.
        tokens: Tokens that end a row and are not part of it.
        text: Decodes token ids; the second argument decides whether to include special tokens.
    """

    limits: Sequence[int]
    stops: Sequence[str | None]
    tokens: Set[int]
    text: Callable[[list[int], bool], str]

    def part(self, rows: slice) -> Ending:
        """Return the criteria of a slice of the rows."""
        return Ending(self.limits[rows], self.stops[rows], self.tokens, self.text)

    def reached(self, row: int, ids: list[int]) -> bool:
        """Whether a row has reached its end."""
        return len(ids) == self.limits[row] or self._stopped(ids, self.stops[row])

    def _stopped(self, ids: list[int], stop: str | None) -> bool:
        if stop is None:
            return False
        text = self.text(ids, False).lstrip()
        match = re.search(stop, text)
        # \Z and $ match the end of any text, so an empty match there is no stop. A text may end within a character.
        return match is not None and bool(match[0] or text[match.end() :].strip()) and not text.endswith("\ufffd")


def generate_tokens(
    lm: PackedLM, rows: Sequence[Row], prompt: Prompt, ending: Ending, sampling: Sampling | None
) -> list[list[int]]:
    """Generate token ids after the context of each row, without the end token.

    If memory runs out, the rows are generated in halves, with the same result.

    Args:
        lm: The model.
        rows: ``B`` rows.
        prompt: See `FrozenLM.score`.
        ending: Stopping criteria.
        sampling: How to sample; ``None`` for greedy decoding.
    """
    try:
        return _generate(lm, rows, prompt, ending, sampling)
    except RuntimeError as error:
        if not out_of_memory(error) or len(rows) == 1:
            raise
    half = (len(rows) + 1) // 2
    if sampling is not None and sampling.group is not None and len(rows) > sampling.group:
        half = -(-half // sampling.group) * sampling.group
    log.warning("out of memory: generating %d texts at a time instead of %d", half, len(rows))
    generated: list[list[int]] = []
    for part in (slice(0, half), slice(half, len(rows))):
        own = prompt if same_for_all(prompt) else prompt[part]  # type: ignore[index]
        draws = None if sampling is None else sampling.part(part)
        generated += generate_tokens(lm, rows[part], own, ending.part(part), draws)
    return generated


def reads_late(device: torch.device) -> bool:
    """Whether to read tokens while the next pass runs, so that a GPU does not wait for the host."""
    return device.type == "cuda"


def _generate(
    lm: PackedLM, rows: Sequence[Row], prompt: Prompt, ending: Ending, sampling: Sampling | None
) -> list[list[int]]:
    generated: list[list[int]] = [[] for _ in rows]
    done = [limit <= 0 for limit in ending.limits]
    steps = max(ending.limits)
    if steps <= 0:
        return generated
    groups = [len(rows), *([] if sampling is None or sampling.group is None else [sampling.group])]
    contexts = [row.context for row in rows]
    levels = build_prefix_tree(contexts, contexts, groups, same_for_all(prompt))
    lengths = [len(own) for own in levels[-1]]
    cache = KVCache(max(lengths) + steps)
    embeddings, layout = lm.pack(levels, prompt, cache)
    late = reads_late(lm.device)
    unread: list[Download] = []
    for step in range(steps):
        before = lm.usage + Usage()
        logits = lm.logits(embeddings, layout, layout.last)
        chosen = logits.argmax(-1) if sampling is None else sampling.choose(logits, step)
        # A row at its limit still runs and overwrites its last place, so it never outgrows its cache. The host plans
        # the next pass while the device computes this one.
        columns = [length + min(step, limit - 1) for length, limit in zip(lengths, ending.limits, strict=True)]
        layout = PackedLayout([[1] * len(rows)], lm.device, cache=cache, columns=columns, attention=lm.attention)
        unread.append(Download(chosen))
        while len(unread) > (late and step + 1 < steps) and not all(done):
            for b, token in enumerate(unread.pop(0).tolist()):
                if done[b] or token in ending.tokens:
                    done[b] = True
                    continue
                generated[b].append(token)
                done[b] = ending.reached(b, generated[b])
        if all(done):
            if unread:
                lm.usage = before  # all rows ended before the last pass, so do not count it
            break
        embeddings = lm.embed(chosen)
    lm.usage.calls += len(rows)
    return generated
