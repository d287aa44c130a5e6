"""A Lightning strategy for LMs that are larger than one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L  # noqa: N812 - Lightning's own convention
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer


class LMParallel(ModelParallelStrategy):
    """Spreads the frozen LM over devices; what is trained is small, and whole on each of them.

    The LM is split in `PromptMethod.configure_model`, by heads (tensor parallel) and by weights (FSDP2). Checkpoints
    are those of any other run, since the LM is in none: a prompt that eight devices have trained is tested on one.

    Args:
        data_parallel_size: Devices that have examples of their own, among which each weight is split; ``auto`` for the
            number of nodes.
        tensor_parallel_size: Devices that share the heads of every layer, and the examples; ``auto`` for those of a
            node. Product of both: all devices.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
    ) -> None:
        """Nothing is started yet."""
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint=False)

    def setup(self, trainer: L.Trainer) -> None:
        """See `Strategy`. Evaluation is without gradient and not in inference mode, whose tensors no training may use.

        A layer that was put together in evaluation is the next step's as well.
        """
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        ):  # fmt: skip
            loop.inference_mode = False
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Make the gradients of what is trained the mean over all processes, as DDP does."""
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    # --- checkpoints: as if the LM were not there --------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """What is restored is whole, so it may be at any time."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As for any other strategy."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See `Strategy`."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """See `Strategy`."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """See `Strategy`."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """See `Strategy`."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None  # noqa: ANN401
    ) -> None:  # fmt: skip
        """See `Strategy`."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ANN401
        """See `Strategy`."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
