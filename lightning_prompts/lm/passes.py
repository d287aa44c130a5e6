"""Split a grid of candidates x examples into forward passes that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.memory import out_of_memory
from lightning_prompts.lm.plan import Plan

if TYPE_CHECKING:
    from lightning_prompts.lm.frozen import FrozenLM

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Passes:
    """Splits work into forward passes that fit into memory.

    Args:
        lm: The frozen language model.
        memory_mb: Megabytes that activations and logits of one pass take, about. 256 suits the caches of a CPU, where
            more is slower; a GPU wants more. If memory runs out all the same, passes are halved until they fit, with
            the same result.
    """

    def __init__(self, lm: FrozenLM, memory_mb: float = 256.0) -> None:
        """Keep the settings."""
        self.lm = lm
        self.memory_mb = memory_mb
        self.limit: int | None = None  # rows of a pass that fitted after memory ran out

    def fitting(self, tokens: int, logits: int) -> int:
        """How many items fit into one pass, at least one.

        Args:
            tokens: Tokens that one item runs.
            logits: Positions of one item with logits, each of the vocabulary's size in float32.
        """
        config = self.lm.model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or 4 * self.lm.width)
        each = 4 * (tokens * (3 * inner + 8 * self.lm.width) + 3 * logits * self.lm.vocabulary)
        return max(1, int(self.memory_mb * 2**20 / each))

    def run(self, items: Sequence[Item], size: int, rows: int, work: Callable[[list[Item]], Result]) -> list[Result]:
        """Run passes over ``size`` items each, or fewer once memory runs out, and return their results.

        Args:
            items: The items, in order.
            size: Items of one pass.
            rows: Rows of one item.
            work: Runs a pass.
        """
        size = max(1, min(len(items), size, len(items) if self.limit is None else self.limit // rows))
        results: list[Result] = []
        done = 0
        while done < len(items):
            try:
                result = work(list(items[done : done + size]))
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size //= 2
                self.limit = size * rows
                log.warning("out of memory: scoring %d candidates at a time from now on", size)
                continue
            results.append(result)
            done += size
        return results


def fill(rows: Sequence[Row], candidates: Sequence[list[int]]) -> list[list[Row]]:
    """Fill the prompt slots with token ids, ``[C][N]`` rows."""
    cuts = [row.around_slot() for row in rows]
    return [
        [Row(head + ids + tail, row.answer, row.end) for row, (head, tail) in zip(rows, cuts, strict=True)]
        for ids in candidates
    ]


def transposed(grid: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """``[C][N]`` -> ``[N][C]``."""
    return [list(column) for column in zip(*grid, strict=True)]


def tokens_to_run(groups: Sequence[Sequence[Row]], block: int = 1) -> int:
    """Count the tokens of one pass over groups of rows; what groups and every ``block`` rows share counts once."""
    rows = [row for group in groups for row in group]
    return Plan.of_answers(rows, [len(groups[0]), block], shared_prompt=True).tokens_to_run
