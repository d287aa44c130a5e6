"""A Lightning strategy for LMs that are larger than one device."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor

from lightning_prompts.errors import UserError

Size = Literal["auto"] | int


def mesh_sizes(data: Size, tensor: Size, nodes: int, devices: int) -> tuple[int, int]:
    """Resolve the numbers of data-parallel and tensor-parallel devices.

    Args:
        data: ``data_parallel_size``.
        tensor: ``tensor_parallel_size``.
        nodes: Number of nodes.
        devices: Number of devices per node.

    Raises:
        UserError: The product of both sizes is not the number of devices.

    >>> mesh_sizes("auto", "auto", 2, 8), mesh_sizes(2, "auto", 1, 2), mesh_sizes("auto", 4, 2, 8)
    ((2, 8), (2, 1), (4, 4))
    """
    total = nodes * devices
    if data == tensor == "auto":
        return nodes, devices
    known = [size for size in (data, tensor) if isinstance(size, int)]
    if min(known) < 1 or total % known[0] or (len(known) == 2 and known[0] * known[1] != total):
        raise UserError(
            f"LMParallel: data_parallel_size ({data}) times tensor_parallel_size ({tensor}) must be the number of "
            f"processes, {total}; set one of them to auto"
        )
    rest = total // known[0]
    return (data, rest if tensor == "auto" else tensor) if isinstance(data, int) else (rest, known[0])


class LMParallel(ModelParallelStrategy):
    """Shards the frozen LM over devices. The trained parameters are small and replicated on each device.

    `PromptMethod.configure_model` splits the LM by heads (tensor parallelism) and by weights (FSDP2). Checkpoints do
    not contain the LM, so they are independent of the strategy: a prompt that was trained on eight devices can be
    tested on one.

    Args:
        data_parallel_size: Number of devices with different examples, over which each weight is sharded. ``auto``
            computes it from the other size.
        tensor_parallel_size: Number of devices that split the heads of every layer and work on the same examples.
            ``auto`` computes it from the other size. The product of both sizes is the number of devices. If both are
            ``auto``, the devices of a node split the heads.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
    ) -> None:
        """Keep the sizes."""
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """See `Strategy`.

        Raises:
            UserError: The sizes do not match the number of processes.
        """
        sizes = mesh_sizes(self._data_parallel_size, self._tensor_parallel_size, self.num_nodes, self.num_processes)
        self._data_parallel_size, self._tensor_parallel_size = sizes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """See `Strategy`.

        Evaluation uses no_grad instead of inference mode, because training may reuse layers that were gathered during
        evaluation, and tensors of inference mode cannot be used in training.
        """
        loops = (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        )
        for loop in loops:
            loop.inference_mode = False
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of the trained parameters over all processes, as DDP does."""
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    # Checkpoints do not contain the LM, and nothing in them is sharded.
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
