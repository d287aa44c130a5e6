"""The order of training examples, which a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch, Example


class InOrder(DistributedSampler[int]):
    """All examples one after another, in every process.

    A step's batch is the same with one process and with several, which share its work among themselves. It is a
    DistributedSampler of a single replica, since Lightning puts one of its own in the place of all others: that one
    deals the examples out so that batches are other ones, and repeats some to make their number even.

    Args:
        size: How many examples.
    """

    def __init__(self, size: int) -> None:
        """Start at epoch 0."""
        super().__init__(range(size), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]


class EpochSampler(InOrder):
    """A permutation that depends on the seed and the epoch alone, so that a resumed run sees the same order.

    Args:
        size: How many examples.
        seed: The run's seed.
    """

    def __init__(self, size: int, seed: int) -> None:
        """Start at epoch 0; Lightning sets it at the start of each."""
        super().__init__(size)
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        return iter(torch.randperm(self.size, generator=generator, device="cpu").tolist())

    def __len__(self) -> int:
        """How many examples."""
        return self.size


class BalancedSampler(EpochSampler):
    """Every batch has the same number of examples of each class, give or take one.

    A class's examples come in an order of their own, and come again when all have been seen: a rare class's often, a
    frequent one's not each epoch. An epoch has as many examples as there are. Its order depends on the seed and the
    epoch alone.

    Args:
        examples: The training examples.
        batch_size: Examples per batch, which the loader cuts from the order one after another.
        seed: The run's seed.

    Raises:
        UserError: An example has no class.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        """Sort the examples by class."""
        super().__init__(len(examples), seed)
        self.batch_size = batch_size
        members: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            if example.label is None:
                raise UserError(f"{example.source or 'an example'} has no label, so that data.balanced cannot be true")
            members.setdefault(example.label, []).append(index)
        self.members = [members[label] for label in sorted(members)]

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        waiting: list[list[int]] = [[] for _ in self.members]
        for start in range(0, self.size, self.batch_size):
            size = min(self.batch_size, self.size - start)
            batch: list[int] = []
            for rank, label in enumerate(_shuffled(range(len(self.members)), generator)):
                share, rest = divmod(size, len(self.members))
                for _ in range(share + (rank < rest)):
                    if not waiting[label]:  # those that this batch has already come last
                        again = _shuffled(self.members[label], generator)
                        waiting[label] = sorted(again, key=lambda index: index not in batch)
                    batch.append(waiting[label].pop())
            yield from _shuffled(batch, generator)


class ResumableLoader(DataLoader[Example]):
    """A DataLoader whose place within the epoch goes into checkpoints (Lightning calls the two state methods)."""

    _yielded = 0
    _resume = (0, 0)  # an epoch, and how many of its batches not to hand out again

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The epoch's batches, from the place that was restored."""
        epoch, skip = self._resume
        self._yielded = 0
        for batch in super().__iter__():
            self._yielded += 1
            if self._yielded > skip or self._epoch != epoch:
                yield batch

    @property
    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "yielded": 0 if self._yielded >= len(self) else self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip so many batches when that epoch is begun."""
        self._resume = (state["epoch"], state["yielded"])


def _shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    return [items[index] for index in torch.randperm(len(items), generator=generator, device="cpu").tolist()]
