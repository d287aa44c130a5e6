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
class Replica:
    """One of several that share the work on a batch; alone, it does all of it.

    All of them know the whole batch, which is text; what is split is the work. So a step sees the same examples,
    however many processes there are, and nothing has to be sent but results.

    Attributes:
        rank: Which one, from 0.
        count: Of how many.
        group: The ``torch.distributed`` group that they talk in; ``None`` for all processes.
        ready: Called before this one talks to the others.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    ready: Callable[[], None] = lambda: None

    def part(self, total: int) -> range:
        """Which of ``total`` items are its own: neighbours, as many as the others have, give or take one."""
        share, rest = divmod(total, self.count)
        start = self.rank * share + min(self.rank, rest)
        return range(start, start + share + (self.rank < rest))

    def part_of(self, batch: Batch) -> Batch:
        """Its own examples of a training batch, with their weight in the mean over all.

        Where there are fewer examples than processes, some get one that counts nothing: all must do a step.
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
        """The items of all, in order; everybody gets them. Tensors among them must be on the CPU."""
        if self.count == 1:
            return list(items)
        self.ready()
        parts: list[list[Item]] = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, list(items), group=self.group)
        return [item for part in parts for item in part]

    def all_reduce(self, *values: float) -> list[float]:
        """Each value, summed over all."""
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
        """The results of some work, one for each item in order; each does its share, and everybody gets all.

        Args:
            items: The same for all.
            work: From some items, one or more, to as many results, whose tensors are on the CPU.
        """
        if self.count == 1:
            return list(work(items)) if items else []
        own = self.part(len(items))
        return self.all_gather(work(items[own.start : own.stop]) if own else [])


class MapAcrossRanks(Protocol):
    """`Replica.map_across_ranks`, as something that has work to do may get it."""

    def __call__(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """See `Replica.map_across_ranks`."""


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
