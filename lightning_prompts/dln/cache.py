"""What the LMs have already been asked: scores and greedy texts, by the text that they follow."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from typing import Any

import torch

from lightning_prompts.types import Example

ENTRIES = 50_000  # of scores; texts are larger, and a tenth as many are kept


class TextCache:
    """Remembers scores and generated texts, the latest ones; goes into checkpoints.

    Keys are 64 bits of a hash of everything that a result depends on: the LM by its identity, so that a checkpoint's
    cache says nothing about another one, the text with its prompt, what follows.
    """

    def __init__(self, entries: int = ENTRIES) -> None:
        """Start empty."""
        self.entries = entries
        self.scores: OrderedDict[int, tuple[float, ...]] = OrderedDict()
        self.texts: OrderedDict[int, str] = OrderedDict()

    @staticmethod
    def key(lm: str, example: Example, prompt: str, what: object) -> int:
        """The key of what a placed example with a prompt is followed by."""
        parts = (lm, example.before, example.after, example.chat, example.system, prompt, what)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    def trim(self) -> None:
        """Forget what is oldest, once the asking is over."""
        while len(self.scores) > self.entries:
            self.scores.popitem(last=False)
        while len(self.texts) > self.entries // 10:
            self.texts.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and strings."""
        values = list(self.scores.values())
        return {
            "score_keys": torch.tensor(list(self.scores), dtype=torch.long, device="cpu"),
            "score_counts": torch.tensor([len(value) for value in values], dtype=torch.int32, device="cpu"),
            "score_values": torch.tensor([*itertools.chain(*values)], dtype=torch.double, device="cpu"),
            "text_keys": torch.tensor(list(self.texts), dtype=torch.long, device="cpu"),
            "texts": list(self.texts.values()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take it back."""
        parts = state["score_values"].split(state["score_counts"].tolist())
        self.scores = OrderedDict(
            (key, tuple(part.tolist())) for key, part in zip(state["score_keys"].tolist(), parts, strict=True)
        )
        self.texts = OrderedDict(zip(state["text_keys"].tolist(), state["texts"], strict=True))
