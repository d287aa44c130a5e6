"""Communication between the processes of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch

# Error messages of gloo and NCCL for a lost or unresponsive process.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|remote worker", re.IGNORECASE)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DataParallelRank:
    """One of the data-parallel processes that split the work on a batch.

    Every process has the whole batch, which is text, and works on its part. A step therefore has the same examples for
    any number of processes, and only results are communicated.

    Attributes:
        rank: Index of this process, from 0.
        count: Number of processes.
        group: The ``torch.distributed`` group of the processes; ``None`` for all processes.
        ready: Called before each collective operation.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    ready: Callable[[], None] = lambda: None

    def part(self, total: int) -> range:
        """Return the consecutive range of ``total`` items for this process; parts differ by at most one item."""
        share, rest = divmod(total, self.count)
        start = self.rank * share + min(self.rank, rest)
        return range(start, start + share + (self.rank < rest))

    def part_of(self, batch: Batch) -> Batch:
        """Return the part of a training batch for this process, with its weight in the mean over all parts.

        With fewer examples than processes, some processes get an example with weight 0, because all must run a step.
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
        """Gather the items of all processes in order of rank, on every process. Tensors must be on the CPU."""
        if self.count == 1:
            return list(items)
        self.ready()
        parts: list[list[Item]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(items), group=self.group)
        return [item for part in parts for item in part]

    def all_reduce(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
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
        """Apply a function to items, split over all processes, and return all results on every process.

        Args:
            items: Items, equal on all processes.
            work: Maps one or more items to one result each; tensors in results must be on the CPU.

        Returns:
            One result per item, in order.
        """
        if self.count == 1:
            return list(work(items)) if items else []
        own = self.part(len(items))
        return self.all_gather(work(items[own.start : own.stop]) if own else [])


class MapAcrossRanks(Protocol):
    """The signature of `DataParallelRank.map_across_ranks`."""

    def __call__(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """See `DataParallelRank.map_across_ranks`."""


def process_lost(error: BaseException) -> UserError | None:
    """Return a `UserError` for an error that means that another process was lost; ``None`` for other errors."""
    if not isinstance(error, RuntimeError) or not (dist.is_available() and dist.is_initialized()):
        return None
    if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
        return None
    return UserError(
        f"another process of this run has died or does not respond ({' '.join(str(error).split())[:100]}...), so this "
        "process ends too; see the error of the other process above. Resume with --ckpt_path last"
    )
