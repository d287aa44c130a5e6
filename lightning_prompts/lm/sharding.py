"""A frozen LM that is larger than one device: its weights spread over several processes.

Two ways, together or alone. *Tensor parallel*: every process has some heads of each layer and some columns of its
feed-forward part, and all work on the same texts. The packed attention needs no change, since it takes the number of
heads from its input; keys and values that are trained (prefix tuning) are cut by head, their gradients put together.
*Fully sharded* (FSDP2): every process has a piece of each weight, puts a layer together when it is needed, and works on
texts of its own. What embeds tokens stays whole in every process, as prompts are made of it.
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

# What transformers calls a layer's way to be split. Norms of single heads stay as they are: nothing in them is trained.
_STYLES: dict[str, Callable[[], ParallelStyle] | None] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": None,
    "replicate": None,
}


class Lockstep:
    """Keeps processes together that need each other for every pass.

    Before a pass without gradient each says that it has one to run; a process that has none left, and waits for the
    others, runs an idle one beside them until nobody has. Passes with a gradient are as many in all processes, so
    before them all wait for each other.

    Args:
        group: The ``torch.distributed`` group of the processes.
        device: Where they talk.
        idle: Runs an idle pass.
    """

    def __init__(self, group: dist.ProcessGroup, device: str, idle: Callable[[], None]) -> None:
        """All are together."""
        self.group, self.device, self.idle = group, device, idle
        self._idling = False

    def before_pass(self) -> None:
        """Called ahead of each pass."""
        if self._idling:
            return
        if torch.is_grad_enabled():
            self.wait()
        else:
            self._busy(True)

    def wait(self) -> None:
        """Until no process has anything to run."""
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
    """How a model is spread, and what that asks of those who use it.

    Args:
        mesh: With dimensions ``data_parallel`` and ``tensor_parallel``.
        idle: Runs an idle pass of the model.
    """

    def __init__(self, mesh: DeviceMesh, idle: Callable[[], None]) -> None:
        """See `shard`."""
        self.heads = mesh["tensor_parallel"] if mesh["tensor_parallel"].size() > 1 else None
        data = mesh["data_parallel"]
        self.lockstep = Lockstep(data.get_group(), mesh.device_type, idle) if data.size() > 1 else None

    def own_heads(self, past: KeyValues) -> KeyValues:
        """The keys and values of this process's heads, differentiable: every process gets the whole gradient."""
        if self.heads is None:
            return past
        mesh = self.heads

        def cut(whole: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(whole, mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()

        return KeyValues([(cut(key), cut(value)) for key, value in past.layers])

    def all_heads(self, own: KeyValues) -> KeyValues:
        """The inverse of `own_heads`, without gradient."""
        if self.heads is None:
            return own
        mesh = self.heads

        def put_together(part: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(part, mesh, [Shard(1)]).full_tensor()

        return KeyValues([(put_together(key), put_together(value)) for key, value in own.layers])


def shard(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    """Spread the weights of a frozen model over a mesh.

    Args:
        model: Loaded, whole, in every process.
        mesh: With dimensions ``data_parallel`` and ``tensor_parallel``.
        name: What to call the model in messages.

    Raises:
        UserError: It cannot be split like that.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"{name} is quantised, and quantised weights cannot be split; set model.lm.quantization to none"
        )
    if mesh["tensor_parallel"].size() > 1:
        _split_heads(model, mesh["tensor_parallel"], name)
    if mesh["data_parallel"].size() > 1:
        if model.dtype == torch.float16:
            raise UserError(
                "float16 is not searched for overflows where weights are sharded; use model.lm.dtype bfloat16"
            )
        _split_weights(model, mesh["data_parallel"])


def heads_plan(model: PreTrainedModel, size: int, name: str) -> dict[str, str]:
    """How the architecture splits its layers by heads; weights are not looked at.

    Args:
        model: The model, on the meta device at least.
        size: Processes that share the heads.
        name: What to call the model in messages.

    Raises:
        UserError: It cannot be split over so many.
    """
    config = model.config.get_text_config()
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if not plan or unknown:
        why = f"layers split by {', '.join(unknown)}" if unknown else "no plan for it in transformers"
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
                f"{name} has {count} {what}, which {size} processes cannot share evenly; set "
                "trainer.strategy.tensor_parallel_size to a divisor"
            )
    return plan


def _split_heads(model: PreTrainedModel, mesh: DeviceMesh, name: str) -> None:
    """Tensor parallel, by the architecture's own plan."""
    plan = heads_plan(model, mesh.size(), name)
    styles = {pattern: made() for pattern, style in plan.items() if (made := _STYLES[style]) is not None}
    parallelize_module(model.base_model, mesh, styles)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is not embeddings.weight:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))


def _split_weights(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Fully sharded, layer by layer."""
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    whole: set[Any] = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
    # The whole model, too, so that the next layer is on its way while one computes. Not its ``base_model``, by whose
    # class transformers finds what to put out: this changes the class.
    fully_shard(model, mesh=mesh, ignored_params=whole)
