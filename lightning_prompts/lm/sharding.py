"""Shard a frozen LM that is larger than one device over several processes.

Two modes can be combined. *Tensor parallelism*: every process has some heads of each layer and some columns of its
feed-forward part, and all processes work on the same texts. The packed attention needs no change, because it takes the
number of heads from its input. Trained keys and values (prefix tuning) are split by head, and their gradients are
gathered. *Fully sharded data parallelism* (FSDP2): every process has a shard of each weight, gathers a layer when it
runs, and works on its own texts. The embeddings are not sharded, because prompts are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_prompts.errors import UserError
from lightning_prompts.lm.key_values import KeyValues

# Names of parallel styles in transformers. Norms of single heads are replicated, because they are not trained.
_STYLES: dict[str, Callable[[], ParallelStyle] | None] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": None,
    "replicate": None,
}


class Lockstep:
    """Synchronises the passes of processes that need each other for every pass.

    Before a pass without a gradient, each process announces it. A process that has finished and waits for the others
    runs idle passes until no process has a pass left. The number of passes with a gradient is equal in all processes,
    so before such a pass all processes wait for each other.

    Args:
        group: The ``torch.distributed`` group of the processes.
        device: Device type of the messages between processes.
        idle: Runs an idle pass.
    """

    def __init__(self, group: dist.ProcessGroup, device: str, idle: Callable[[], None]) -> None:
        """Start without an idle pass."""
        self.group, self.device, self.idle = group, device, idle
        self._idling = False

    def before_pass(self) -> None:
        """Synchronise before a pass; call this before each pass."""
        if self._idling:
            return
        if torch.is_grad_enabled():
            self.wait()
        else:
            self._busy(True)

    def wait(self) -> None:
        """Run idle passes until no process has a pass left."""
        while self._busy(False):
            self._idling = True
            try:
                with torch.no_grad():
                    self.idle()
            finally:
                self._idling = False

    def _busy(self, mine: bool) -> bool:
        flag = torch.tensor(int(mine), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


class Shards:
    """The sharding of a model over a mesh.

    Args:
        mesh: Mesh with the dimensions ``data_parallel`` and ``tensor_parallel``.
        idle: Runs an idle pass of the model.
    """

    def __init__(self, mesh: DeviceMesh, idle: Callable[[], None]) -> None:
        """Keep the parts of the mesh; `shard` does the sharding."""
        self.heads = mesh["tensor_parallel"] if mesh["tensor_parallel"].size() > 1 else None
        data = mesh["data_parallel"]
        self.lockstep = Lockstep(data.get_group(), mesh.device_type, idle) if data.size() > 1 else None

    def own_heads(self, past: KeyValues) -> KeyValues:
        """Select the keys and values of this process's heads; every process gets the full gradient."""
        if self.heads is None:
            return past
        mesh = self.heads

        def cut(whole: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(whole, mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()

        return KeyValues([(cut(key), cut(value)) for key, value in past.layers])

    def all_heads(self, own: KeyValues) -> KeyValues:
        """Gather the keys and values of all heads, without gradient: the inverse of `own_heads`."""
        if self.heads is None:
            return own
        mesh = self.heads

        def put_together(part: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(part, mesh, [Shard(1)]).full_tensor()

        return KeyValues([(put_together(key), put_together(value)) for key, value in own.layers])


def shard(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    """Shard the weights of a frozen model over a mesh, in place.

    Args:
        model: The model with all weights, in every process.
        mesh: Mesh with the dimensions ``data_parallel`` and ``tensor_parallel``.
        name: Name of the model in messages.

    Raises:
        UserError: The model does not support this mesh.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"{name} is quantised, and quantised weights cannot be split; set model.lm.quantization to none"
        )
    if mesh["tensor_parallel"].size() > 1:
        _split_heads(model, mesh["tensor_parallel"], name)
    if mesh["data_parallel"].size() > 1:
        if model.dtype == torch.float16:
            raise UserError("overflows of float16 cannot be located in sharded weights; set model.lm.dtype to bfloat16")
        _split_weights(model, mesh["data_parallel"])


def heads_plan(model: PreTrainedModel, size: int, name: str) -> dict[str, str]:
    """Return the tensor-parallel plan of an architecture, without reading weights.

    Args:
        model: The model, which may be on the meta device.
        size: Number of processes that split the heads.
        name: Name of the model in messages.

    Raises:
        UserError: The model cannot be split over this number of processes.
    """
    config = model.config.get_text_config()
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if not plan or unknown:
        why = f"layers split by {', '.join(unknown)}" if unknown else "no tensor-parallel plan in transformers"
        raise UserError(
            f"{name} ({config.model_type}) has {why}, so it cannot be split by heads; set "
            "trainer.strategy.tensor_parallel_size to 1 and data_parallel_size to the number of devices"
        )
    heads = int(config.num_attention_heads)
    counts = {
        "attention heads": heads,
        "key/value heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "columns of the feed-forward part": int(config.intermediate_size),
    }
    for what, count in counts.items():
        if count % size:
            raise UserError(
                f"{name} has {count} {what}, which cannot be split evenly over {size} processes; set "
                "trainer.strategy.tensor_parallel_size to a divisor"
            )
    return plan


def _split_heads(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    """Apply tensor parallelism with the plan of the architecture."""
    plan = heads_plan(model, mesh.size(), name)
    styles = {pattern: made() for pattern, style in plan.items() if (made := _STYLES[style]) is not None}
    parallelize_module(model.base_model, mesh, styles)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is not embeddings.weight:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))


def _split_weights(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Apply fully sharded data parallelism to each layer."""
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    whole: set[Any] = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
    # Also shard the whole model, so that the next layer is prefetched while a layer computes. Do not shard its
    # ``base_model``: FSDP changes the class, by which transformers selects the outputs.
    fully_shard(model, mesh=mesh, ignored_params=whole)
