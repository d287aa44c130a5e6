"""Sharing the work of a method between the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_prompts.errors import UserError
from lightning_prompts.methods.loading import Loading
from lightning_prompts.processes import DataParallelRank
from lightning_prompts.randomness import run_seed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Distributed(Loading):
    """Splits work over the data-parallel processes of a run."""

    @property
    def data_parallel_rank(self) -> DataParallelRank:
        """Rank of this process among those that share the examples of a step."""
        places = None if self._trainer is None else self.trainer.distributed_sampler_kwargs
        if places is None or places["num_replicas"] == 1:
            return DataParallelRank()
        mesh = getattr(self.trainer.strategy, "device_mesh", None)
        group = None if mesh is None else mesh["data_parallel"].get_group()
        return DataParallelRank(places["rank"], places["num_replicas"], group, self.language_model.barrier)

    def map_across_ranks(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        """Split work without gradients over the processes; see `DataParallelRank.map_across_ranks`."""
        return self.data_parallel_rank.map_across_ranks(items, work)

    def _prepare_ranks(self) -> None:
        """Check that all processes have the same seed, and keep DDP from synchronising frozen weights and buffers.

        Raises:
            UserError: The processes have different seeds.
        """
        rank = self.data_parallel_rank
        if rank.count == 1:
            return
        if len(set(rank.all_gather([run_seed()]))) > 1:
            raise UserError(
                "the processes have different seeds; call lightning.seed_everything(0) before the Trainer is made"
            )
        # Frozen weights never change, and all processes compute the same buffers.
        frozen = [name for name, value in self.named_parameters(remove_duplicate=False) if not value.requires_grad]
        buffers = [name for name, _ in self.named_buffers(remove_duplicate=False)]
        self._ddp_params_and_buffers_to_ignore = frozen + buffers
