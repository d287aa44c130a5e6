"""A grid of candidates x examples, cut into forward passes that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.memory import out_of_memory
from lightning_prompts.lm.plan import Plan
from lightning_prompts.processes import MapAcrossRanks, Replica

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Passes:
    """Runs work a memory's worth at a time.

    Args:
        lm: The frozen language model.
        memory_mb: Activations and logits of one pass take about so many megabytes. 256 suits the caches of a CPU, where
            more is slower; a GPU wants more. Where memory runs out all the same, passes are halved until they fit; the
            result is the same.
        map_across_ranks: How work is split over processes; by default this one does all of it.
    """

    def __init__(
        self,
        lm: FrozenLM,
        memory_mb: float = 256.0,
        map_across_ranks: MapAcrossRanks = Replica().map_across_ranks,  # noqa: B008
    ) -> None:
        """Nothing is run yet."""
        self.lm = lm
        self.map_across_ranks = map_across_ranks
        self.memory_mb = memory_mb
        self.limit: int | None = None  # rows per pass that fitted after memory ran out

    def fitting(self, tokens: int, logits: int) -> int:
        """Items per pass within the budget.

        Args:
            tokens: What one item runs.
            logits: Positions of one item at which there are logits, which take a vocabulary's width in float32 each.
        """
        config = self.lm.model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or 4 * self.lm.width)
        each = 4 * (tokens * (3 * inner + 8 * self.lm.width) + 3 * logits * self.lm.vocabulary)
        return max(1, int(self.memory_mb * 2**20 / each))

    def run(self, items: Sequence[Item], size: int, rows: int, work: Callable[[list[Item]], Result]) -> list[Result]:
        """The results of passes over ``size`` items, or fewer where memory runs out.

        Args:
            items: What is to be done, in order.
            size: Items of one pass.
            rows: Rows of one item.
            work: Does a pass.
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
    """Put token ids into the slots, ``[C][N]`` rows."""
    cuts = [row.around_slot() for row in rows]
    return [
        [Row(head + ids + tail, row.answer, row.end) for row, (head, tail) in zip(rows, cuts, strict=True)]
        for ids in candidates
    ]


def transposed(grid: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """``[C][N]`` -> ``[N][C]``."""
    return [list(column) for column in zip(*grid, strict=True)]


def tokens_to_run(groups: Sequence[Sequence[Row]], block: int = 1) -> int:
    """Tokens of one pass over groups of as many rows each, what they and every ``block`` rows share counted once."""
    rows = [row for group in groups for row in group]
    return Plan.of_answers(rows, [len(groups[0]), block], shared_prompt=True).tokens_to_run
