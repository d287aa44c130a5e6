"""Runs a frozen model over packed segments: what precedes a token is a layout's business, not the batch's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_prompts.errors import UserError, in_one_line
from lightning_prompts.lm.attention import ATTENTION_NAME, KVCache, Layout, bucket, following
from lightning_prompts.lm.config import Attention, Switch
from lightning_prompts.lm.finite import first_not_finite
from lightning_prompts.lm.fusion import compile_layers, uncompile_layers
from lightning_prompts.lm.graphs import Graphs
from lightning_prompts.lm.key_values import KeyValues, Prompt
from lightning_prompts.lm.memory import out_of_memory
from lightning_prompts.lm.sharding import Shards, shard
from lightning_prompts.lm.transfer import to_device, to_device_together
from lightning_prompts.lm.usage import Usage

log = logging.getLogger(__name__)

COMPILE_AFTER = 500  # passes with a gradient: compiling takes ten seconds, and saves a few milliseconds in each


class PackedLM(nn.Module):
    """A causal LM that never changes, run over segments that share what they have in common; see `Layout`.

    It has no trainable parameter, stays in eval mode whatever the trainer does, and contributes nothing to checkpoints.

    Args:
        model: A transformers causal LM that runs with this project's attention.
        name: What to call it in messages.
        attention: See `LMConfig`.
        graphs: See `LMConfig`.
        compile: See `LMConfig`.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, attention: Attention = "auto", graphs: bool = True,
        compile: Switch = "auto",
    ) -> None:  # fmt: skip
        """Wrap a loaded model."""
        super().__init__()
        self.name = name
        self.model = model
        self.attention = attention
        self._graphs = Graphs(self._logits) if graphs else None
        self._compile = compile
        self._fused = False  # layers are compiled
        self._followed = 0  # passes with a gradient
        self.usage = Usage()  # by this process
        self._head_rows: Tensor | None = None
        self._static: bool | None = None
        self._overflow_told = False
        self.shards: Shards | None = None  # where the weights are spread over processes
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"model {name!r} has no language-model head")
        self._head_hook = head.register_forward_pre_hook(self._keep_head_rows)
        self.register_load_state_dict_post_hook(_nothing_missing)  # type: ignore[no-untyped-call]
        self.train(False)

    def _embedding_weight(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._embedding_weight().device

    def train(self, mode: bool = True) -> PackedLM:
        """Stay in eval mode: dropout in a frozen model would only add noise."""
        del mode
        super().train(False)
        for module in self.model.modules():
            # transformers checkpoints gradients in training mode only. The flag of the layer alone turns no dropout on:
            # what is inside of the layer stays in eval mode.
            if getattr(module, "gradient_checkpointing", False) and isinstance(module, GradientCheckpointingLayer):
                module.training = True
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLM:
        """Move or cast the weights, away from where CUDA graphs read them."""
        self.release()
        self._static = None
        if self._fused:  # compiled for where they were
            self._fused = False
            uncompile_layers(self.model)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401 - nn.Module's own signature
        """Nothing: the weights are named by the run's config, so a checkpoint stays small."""
        return kwargs.get("destination") or (args[0] if args else {})

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, ``[...]`` -> ``[..., D]``, as the model's own embedding layer scales them."""
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def spread_over(self, mesh: DeviceMesh) -> None:
        """Spread the weights over processes, all of which call this; see `lightning_prompts.lm.sharding`.

        Args:
            mesh: With dimensions ``data_parallel`` and ``tensor_parallel``.

        Raises:
            UserError: The model cannot be split like that.
        """
        shard(self.model, mesh, self.name)
        self.shards = Shards(mesh, self._idle)

    def barrier(self) -> None:
        """Wait until no other process needs this one for a pass; before anything else that processes do together."""
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.wait()

    def _idle(self) -> None:
        """A pass for the others' sake, which is not counted."""
        start = torch.zeros(1, dtype=torch.long, device=self.device)
        usage = self.usage + Usage()
        self.run(self.embed(start), Layout([[1]], self.device), start)
        self.usage = usage

    # --- running the model ------------------------------------------------------------------------------------------

    def _keep_head_rows(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hand the LM head only the positions asked for, ``[1, M, D]`` -> ``[N, D]``.

        A hook and not a slice of the logits, because the vocabulary makes the head the widest layer; a hook and not a
        head call of our own, because architectures scale and cap their logits after it.
        """
        del head
        if self._head_rows is None:
            return None
        return (inputs[0].flatten(0, -2).index_select(0, self._head_rows), *inputs[1:])

    def logits(self, embeddings: Tensor, layout: Layout, places: Sequence[int] | Tensor) -> Tensor:
        """Logits ``[N, V]`` in float32 at ``N`` places of packed embeddings ``[M, D]``."""
        graphs = self._graphs if self.static else None
        if graphs is not None and not graphs.busy and self._worth_fusing():
            self.fuse()
        head_rows, count = self._places(places)
        gradient = False
        try:
            if graphs is None:
                logits = self._logits(embeddings, layout, head_rows).float()
            else:
                logits = graphs.run(embeddings, layout, head_rows)
            logits, gradient = logits[:count], logits.requires_grad
        finally:
            self._count(layout, gradient)
        if self.model.dtype == torch.float16 and not bool(torch.isfinite(logits).all()):
            self._overflowed(embeddings.detach(), layout, head_rows)
        return logits

    def _places(self, places: Sequence[int] | Tensor) -> tuple[Tensor, int]:
        """Places on the device, and how many there are without padding."""
        if isinstance(places, Tensor):
            return places, len(places)
        spare = bucket(len(places)) - len(places) if self.static else 0
        return to_device([*places, *[0] * spare], self.device), len(places)

    def _logits(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> Tensor:
        try:
            logits: Tensor = self._forward(embeddings, layout, head_rows).logits
        except Exception as error:
            if not self._fused or out_of_memory(error) or torch.cuda.is_current_stream_capturing():
                raise
            log.warning("decoder layers cannot be compiled (%s), and run as they are", in_one_line(error))
            self.unfuse()  # there may be no C compiler
            logits = self._forward(embeddings, layout, head_rows).logits
        return logits

    def fuse(self) -> None:
        """Compile the decoder layers for the passes to come, where that is possible; CUDA graphs are made anew."""
        self._fused = self.static and compile_layers(self.model)
        if self._fused:
            self.release()
        else:
            self._compile = False

    def unfuse(self) -> None:
        """Run the decoder layers as they are from now on."""
        self._compile, self._fused = False, False
        uncompile_layers(self.model)
        self.release()

    @contextmanager
    def by_module(self) -> Iterator[None]:
        """Run each module by itself, so that hooks see what it puts out: without graphs, and not compiled."""
        graphs, fused = self._graphs, self._fused
        self._graphs, self._fused = None, False
        if fused:
            uncompile_layers(self.model)
        try:
            yield
        finally:
            self._graphs, self._fused = graphs, fused
            if fused:
                compile_layers(self.model)

    @property
    def captured(self) -> int | None:
        """How many shapes were captured as CUDA graphs; ``None`` where that failed, or is not done."""
        if self._graphs is None or not self.static or self._graphs.off is not None:
            return None
        return self._graphs.captured

    def release(self) -> None:
        """Drop CUDA graphs and the memory that they hold; shapes that come again are captured again."""
        if self._graphs is not None:
            self._graphs.forget()

    def _overflowed(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> None:
        """Say where float16 has overflowed: as a warning in training, where steps can be skipped, else as an error."""
        if torch.is_grad_enabled() and self._overflow_told:
            return
        self._overflow_told = True
        training = torch.is_grad_enabled()
        with torch.no_grad(), self.by_module():  # what is kept for later passes is only written again
            found = first_not_finite(self.model, lambda: self.run(embeddings, layout, head_rows))
        message = (
            f"{self.name} has no finite numbers in float16 from {found or 'its head'} on, probably an overflow: beyond "
            "65,504 there is only infinity, and loss scaling cannot help against that; set model.lm.dtype to bfloat16 "
            "or float32"
        )
        if not training:
            raise UserError(message)
        log.warning(message)

    def run(self, embeddings: Tensor, layout: Layout, head_rows: Tensor, states: bool = False) -> Any:  # noqa: ANN401
        """The model's own output, with logits at ``head_rows`` alone."""
        gradient = False
        try:
            output = self._forward(embeddings, layout, head_rows, states)
            gradient = output.logits.requires_grad
        finally:
            self._count(layout, gradient)
        return output

    def _count(self, layout: Layout, gradient: bool) -> None:
        """Count a pass, without its padding."""
        self.usage.passes += 1
        if gradient:
            self._followed += 1
            self.usage.tokens_with_gradient += layout.used
        else:
            self.usage.tokens_without_gradient += layout.used

    def _forward(self, embeddings: Tensor, layout: Layout, head_rows: Tensor, states: bool = False) -> Any:  # noqa: ANN401
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.before_pass()
        self._head_rows = head_rows
        try:
            with following(layout):
                output = self.model(
                    inputs_embeds=embeddings[None],
                    position_ids=layout.positions,
                    # Visibility is the layout's; a 4-D mask keeps transformers from building one of its own.
                    attention_mask=embeddings.new_zeros(1, 1, 1, 1),
                    use_cache=False,
                    output_hidden_states=states,
                    layout=layout,
                )
        finally:
            self._head_rows = None
        if not layout.followed:
            raise RuntimeError(f"{self.name} does not run with the attention implementation {ATTENTION_NAME!r}")
        return output

    @property
    def static(self) -> bool:
        """Whether passes come in few shapes, which CUDA graphs replay."""
        if self._static is None:
            current = self.device.type == "cuda" and self.device.index in (None, torch.cuda.current_device())
            self._static = self._graphs is not None and current and self._can_replay()
        return self._static

    def _worth_fusing(self) -> bool:
        """Whether layers are to be compiled now; with ``auto`` not where steps must be the same to the end."""
        if self._fused or not self._compile:
            return False
        long = self._followed >= COMPILE_AFTER and not torch.are_deterministic_algorithms_enabled()
        return self._compile is True or long

    def _can_replay(self) -> bool:
        """Whether the same kernels do for every batch, and all gradients are those of a prompt."""
        own = any(weight.requires_grad for weight in self.model.parameters())  # trained weights, as LoRA's
        by_batch = getattr(self.model, "is_loaded_in_8bit", False)  # outliers of the batch choose columns
        return not own and not by_batch and self.shards is None

    def _embed_packed(self, ids: list[int], rows: list[int], prompt: Prompt) -> Tensor:
        """Embeddings ``[M, D]`` of packed ids, with the prompt's vectors at its (negative) positions.

        Args:
            ids: Token ids, ``-1 - p`` for prompt position ``p``.
            rows: The row of each id ``[M]``, for a prompt per row.
            prompt: ``[P, D]`` or ``[B, P, D]``, or keys and values, which have no positions.
        """
        index = np.array(ids)
        places = np.flatnonzero(index < 0)
        if not len(places):
            return self.embed(to_device(index, self.device))
        assert isinstance(prompt, Tensor)
        parts = [index.clip(min=0), places, -1 - index[places], np.array(rows)[places]]
        known, spots, positions, owners = to_device_together(parts, self.device)
        text = self.embed(known)
        flat = prompt.flatten(0, -2)  # the whole prompt in order as a rule, and then there is nothing to look up
        if not np.array_equal(index[places], -1 - np.resize(np.arange(prompt.shape[-2]), len(flat))):
            flat = prompt[positions] if prompt.dim() == 2 else prompt[owners, positions]
        return text.index_copy(0, spots, flat.to(text.dtype))

    def pack(
        self, levels: list[list[list[int]]], prompt: Prompt, cache: KVCache | None = None, rows: int = -1,
        static: bool = True,
    ) -> tuple[Tensor, Layout]:  # fmt: skip
        """Pack levels of segments into ``[M, D]``; see `build_prefix_tree`.

        Args:
            levels: The segments of each level.
            prompt: See `FrozenLM.score`.
            cache: Where keys and values are kept; see `Layout`.
            rows: The level that has a segment for each row.
            static: Whether padding tokens may be added, which stand behind those of each level.
        """
        past = prompt if isinstance(prompt, KeyValues) else None
        if past is not None and self.shards is not None:
            past = self.shards.own_heads(past)
        counts = [[len(part) for part in level] for level in levels]
        bucketed = static and cache is None and self.static
        layout = Layout(
            counts, self.device, past, cache, bucketed=bucketed, attention=self.attention, fused=self._fused
        )
        # Of a prompt per row nothing is shared, so the owner of other levels' tokens does not matter.
        own = levels[rows]
        ids: list[int] = []
        owner: list[int] = []
        for level, placed in zip(levels, layout.brought, strict=True):
            ids += [token for part in level for token in part]
            owner += [b if level is own else 0 for b, part in enumerate(level) for _ in part]
            spare = 0 if placed is None else placed.spare
            ids += [0] * spare
            owner += [0] * spare
        return self._embed_packed(ids, owner, prompt), layout


def _nothing_missing(module: nn.Module, incompatible: Any) -> None:  # noqa: ANN401 - torch's private named tuple
    """Loading a checkpoint is strict on every key but the LM's own, which no checkpoint has."""
    own = set(nn.Module.state_dict(module))
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(key.endswith(f".{name}") or key == name for name in own)
    ]
