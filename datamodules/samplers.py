"""Samplers, and a loader whose position goes into checkpoints, so that a resumed run continues in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch, Example


class InOrder(DistributedSampler[int]):
    """All examples in order, in every process.

    Every process gets the whole batch and takes its share of it, so that batches do not depend on the number of
    processes. The class is a DistributedSampler with one replica because Lightning replaces every other sampler by its
    own, which splits the examples into other batches and repeats some of them.

    Args:
        size: Number of examples.
    """

    def __init__(self, size: int) -> None:
        """Start at epoch 0."""
        super().__init__(range(size), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]


class EpochSampler(InOrder):
    """A permutation that depends only on the seed and the epoch, so that a resumed run sees the same order.

    Args:
        size: Number of examples.
        seed: The run's seed.
    """

    def __init__(self, size: int, seed: int) -> None:
        """Start at epoch 0; Lightning sets the epoch."""
        super().__init__(size)
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of one epoch."""
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        return iter(torch.randperm(self.size, generator=generator, device="cpu").tolist())

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.size


class BalancedSampler(EpochSampler):
    """Batches with the same number of examples of each class, plus or minus one.

    Each class has its own order and starts again when all of its examples have been seen. Within an epoch, examples of
    a rare class therefore repeat, and some of a frequent class are left out. The length of an epoch is the number of
    examples. The order depends only on the seed and the epoch.

    Args:
        examples: The training examples.
        batch_size: Examples per batch; the loader cuts the order into batches of this size.
        seed: The run's seed.

    Raises:
        UserError: An example has no label.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        """Group the examples by class."""
        super().__init__(len(examples), seed)
        self.batch_size = batch_size
        classes: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            if example.label is None:
                raise UserError(f"{example.source or 'an example'} has no label, so that data.balanced cannot be true")
            classes.setdefault(example.label, []).append(index)
        self.classes = [classes[label] for label in sorted(classes)]

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of one epoch."""
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        waiting: list[list[int]] = [[] for _ in self.classes]
        for start in range(0, self.size, self.batch_size):
            size = min(self.batch_size, self.size - start)
            batch: list[int] = []
            for rank, label in enumerate(_shuffled(range(len(self.classes)), generator)):
                share, rest = divmod(size, len(self.classes))
                for _ in range(share + (rank < rest)):
                    if not waiting[label]:  # take examples that are already in this batch last
                        again = _shuffled(self.classes[label], generator)
                        waiting[label] = sorted(again, key=lambda index: index not in batch)
                    batch.append(waiting[label].pop())
            yield from _shuffled(batch, generator)


class ResumableLoader(DataLoader[Example]):
    """A DataLoader that saves its position within the epoch (Lightning calls the two state methods).

    Args:
        dataset: The examples.
        settings: The other arguments of a DataLoader.
    """

    _yielded = 0
    _resume = (0, 0)  # an epoch, and how many of its batches to skip

    def __init__(self, dataset: Sequence[Example], **settings: Any) -> None:
        """Replace the sampler that Lightning gives for ``overfit_batches``, which does not know its epoch."""
        if isinstance(settings.get("sampler"), SequentialSampler):
            settings["sampler"] = InOrder(len(dataset))
        super().__init__(cast("Dataset[Example]", dataset), **settings)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches of the epoch from the restored position on."""
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
        """Return the epoch, and how many of its batches were yielded."""
        return {"epoch": self._epoch, "yielded": 0 if self._yielded >= len(self) else self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were yielded before, once that epoch starts."""
        self._resume = (state["epoch"], state["yielded"])


def _shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    return [items[index] for index in torch.randperm(len(items), generator=generator, device="cpu").tolist()]
