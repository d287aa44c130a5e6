"""Several processes that work on one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch

# What gloo and NCCL say when the other end is gone or does not answer.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|remote worker", re.IGNORECASE)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DataParallelRank:
    """One of several processes that share the work on a batch; alone, it does all of it.

    All processes know the whole batch, which is text, and split the work. So a step sees the same examples, however
    many processes there are, and only results are sent.

    Attributes:
        rank: Which process, from 0.
        count: Number of processes.
        group: Their ``torch.distributed`` group; ``None`` for all processes.
        ready: Called before this process talks to the others.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    ready: Callable[[], None] = lambda: None

    def part(self, total: int) -> range:
        """The places of its own share of ``total`` items, all neighbours; shares differ by one item at most."""
        share, rest = divmod(total, self.count)
        start = self.rank * share + min(self.rank, rest)
        return range(start, start + share + (self.rank < rest))

    def part_of(self, batch: Batch) -> Batch:
        """Its own examples of a training batch, with their weight in the mean over all.

        If there are fewer examples than processes, some get one of weight 0: every process must run a step.
        """
        if self.count == 1:
            return batch
        own = self.part(len(batch))
        weight = len(own) * self.count / len(batch)
        own = own or range(1)
        part = Batch(batch.examples[own.start : own.stop], batch.split, batch.members)
        part.weight, part.start, part.total = weight, own.start, len(batch)
        return part

    def all_gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in order, for every process. Tensors among them must be on the CPU."""
        if self.count == 1:
            return list(items)
        self.ready()
        parts: list[list[Item]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(items), group=self.group)
        return [item for part in parts for item in part]

    def all_reduce(self, *values: float) -> list[float]:
        """Each value, summed over all processes."""
        if self.count == 1:
            return list(values)
        self.ready()
        device = "cpu" if "gloo" in dist.get_backend(self.group) else "cuda"
        totals = torch.tensor(values, dtype=torch.double, device=device)
        dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def map_across_ranks(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        """Share some work, and return the results of all items in order to every process.

        Args:
            items: The items, the same in every process.
            work: Turns one or more items into as many results; tensors must be on the CPU.
        """
        if self.count == 1:
            return list(work(items)) if items else []
        own = self.part(len(items))
        return self.all_gather(work(items[own.start : own.stop]) if own else [])


class MapAcrossRanks(Protocol):
    """The type of `DataParallelRank.map_across_ranks`, for objects that share their work."""

    def __call__(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """See `DataParallelRank.map_across_ranks`."""


def process_lost(error: BaseException) -> UserError | None:
    """What to tell about an error that means that another process of the run is gone; ``None`` for others."""
    if not isinstance(error, RuntimeError) or not (dist.is_available() and dist.is_initialized()):
        return None
    if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
        return None
    return UserError(
        f"another process of this run has died or does not answer ({' '.join(str(error).split())[:100]}...), so this "
        "one ends too; what that one has said is further up. Go on with --ckpt_path last"
    )
