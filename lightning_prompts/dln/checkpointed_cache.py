"""An in-memory cache of LM scores and greedy texts, which checkpoints save."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from typing import Any

import torch

from lightning_prompts.types import Example

ENTRIES = 50_000


class CheckpointedCache:
    """Caches the latest scores and generated texts; checkpoints save them.

    A key is a 64-bit hash of everything that a result depends on: the LM's identity, the text with its prompt, and the
    continuation. The identity keeps other LMs from using the results in a checkpoint.

    Args:
        entries: Maximum number of scores; the limit for texts, which are larger, is a tenth of it.
    """

    def __init__(self, entries: int = ENTRIES) -> None:
        """Start empty."""
        self.entries = entries
        self.scores: OrderedDict[int, tuple[float, ...]] = OrderedDict()
        self.texts: OrderedDict[int, str] = OrderedDict()

    @staticmethod
    def key(lm: str, example: Example, prompt: str, what: object) -> int:
        """Compute the key of the continuation ``what`` of a placed example with a prompt."""
        parts = (lm, example.before, example.after, example.chat, example.system, prompt, what)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    def trim(self) -> None:
        """Forget the oldest entries beyond the limit."""
        while len(self.scores) > self.entries:
            self.scores.popitem(last=False)
        while len(self.texts) > self.entries // 10:
            self.texts.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """Return the content as tensors and strings, for a checkpoint."""
        values = list(self.scores.values())
        return {
            "score_keys": torch.tensor(list(self.scores), dtype=torch.long, device="cpu"),
            "score_counts": torch.tensor([len(value) for value in values], dtype=torch.int32, device="cpu"),
            "score_values": torch.tensor([*itertools.chain(*values)], dtype=torch.double, device="cpu"),
            "text_keys": torch.tensor(list(self.texts), dtype=torch.long, device="cpu"),
            "texts": list(self.texts.values()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the content from a checkpoint."""
        parts = state["score_values"].split(state["score_counts"].tolist())
        self.scores = OrderedDict(
            (key, tuple(part.tolist())) for key, part in zip(state["score_keys"].tolist(), parts, strict=True)
        )
        self.texts = OrderedDict(zip(state["text_keys"].tolist(), state["texts"], strict=True))
