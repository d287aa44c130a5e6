"""Run a frozen model over packed segments."""

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
from lightning_prompts.lm.attention import ATTENTION_NAME, following
from lightning_prompts.lm.config import Attention, Switch
from lightning_prompts.lm.failures import first_not_finite, out_of_memory
from lightning_prompts.lm.fusion import compile_layers, uncompile_layers
from lightning_prompts.lm.graphs import Graphs
from lightning_prompts.lm.key_values import KeyValues, Prompt
from lightning_prompts.lm.language_model import Usage
from lightning_prompts.lm.layout import KVCache, PackedLayout, bucket
from lightning_prompts.lm.sharding import Shards, shard
from lightning_prompts.lm.transfer import to_device, to_device_together

log = logging.getLogger(__name__)

COMPILE_AFTER = 500  # passes with a gradient; compilation takes ten seconds and saves a few milliseconds per pass


class PackedLM(nn.Module):
    """A frozen causal LM that runs packed segments with shared prefixes; see `PackedLayout`.

    It has no trainable parameters, always stays in eval mode, and adds nothing to checkpoints.

    Args:
        model: A causal LM of transformers with the attention of this project.
        name: Name of the model in messages.
        attention: See `LMConfig`.
        graphs: See `LMConfig`.
        compile: See `LMConfig`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        attention: Attention = "auto",
        graphs: bool = True,
        compile: Switch = "auto",
    ) -> None:
        """Wrap a loaded model."""
        super().__init__()
        self.name = name
        self.model = model
        self.attention = attention
        self._graphs = Graphs(self._logits) if graphs else None
        self._compile = compile
        self._fused = False  # whether layers are compiled
        self._followed = 0  # number of passes with a gradient
        self.usage = Usage()  # of this process
        self._head_rows: Tensor | None = None
        self._static: bool | None = None
        self._overflow_told = False
        self.stays = False  # whether the weights stay where they are, see `lightning_prompts.lm.reuse.stay`
        self.shards: Shards | None = None  # set if the weights are sharded over processes
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
        """Device of the model."""
        return self._embedding_weight().device

    def train(self, mode: bool = True) -> PackedLM:
        """Stay in eval mode, because dropout in a frozen model only adds noise."""
        del mode
        super().train(False)
        for module in self.model.modules():
            # transformers checkpoints gradients only in training mode. The flag of the layer does not enable dropout,
            # because the modules inside the layer stay in eval mode.
            if getattr(module, "gradient_checkpointing", False) and isinstance(module, GradientCheckpointingLayer):
                module.training = True
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLM:
        """Move or cast the weights, and free the CUDA graphs that read them at their old address."""
        self.release()
        self._static = None
        if self._fused:  # compiled for the old device and dtype
            self._fused = False
            uncompile_layers(self.model)
        if not self.stays:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return no weights, so that checkpoints stay small; the config of the run names the model."""
        return kwargs.get("destination") or (args[0] if args else {})

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids, ``[...]`` -> ``[..., D]``, including the scale of the model's embedding layer."""
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def spread_over(self, mesh: DeviceMesh) -> None:
        """Shard the weights over processes, all of which must call this; see `lightning_prompts.lm.sharding`.

        Args:
            mesh: Mesh with the dimensions ``data_parallel`` and ``tensor_parallel``.

        Raises:
            UserError: The model does not support this mesh.
        """
        shard(self.model, mesh, self.name)
        self.shards = Shards(mesh, self._idle)

    def barrier(self) -> None:
        """Wait until no other process needs this one for a pass. Call this before any other collective operation."""
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.wait()

    def _idle(self) -> None:
        """Run an uncounted pass, because other processes need this one for theirs."""
        start = torch.zeros(1, dtype=torch.long, device=self.device)
        usage = self.usage + Usage()
        self.run(self.embed(start), PackedLayout([[1]], self.device), start)
        self.usage = usage

    # --- running the model ------------------------------------------------------------------------------------------

    def _keep_head_rows(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Select the requested positions before the LM head, ``[1, M, D]`` -> ``[N, D]``.

        The head is the widest layer, so selecting its outputs would waste memory. Calling the head separately would
        skip the scale and the cap that some architectures apply to its outputs.
        """
        del head
        if self._head_rows is None:
            return None
        return (inputs[0].flatten(0, -2).index_select(0, self._head_rows), *inputs[1:])

    def logits(self, embeddings: Tensor, layout: PackedLayout, places: Sequence[int] | Tensor) -> Tensor:
        """Compute float32 logits ``[N, V]`` at ``N`` places of packed embeddings ``[M, D]``."""
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
        """Copy places to the device, padded to few distinct counts; return them and their number without padding."""
        if isinstance(places, Tensor):
            return places, len(places)
        spare = bucket(len(places)) - len(places) if self.static else 0
        return to_device([*places, *[0] * spare], self.device), len(places)

    def _logits(self, embeddings: Tensor, layout: PackedLayout, head_rows: Tensor) -> Tensor:
        try:
            logits: Tensor = self._forward(embeddings, layout, head_rows).logits
        except Exception as error:
            if not self._fused or out_of_memory(error) or torch.cuda.is_current_stream_capturing():
                raise
            log.warning("decoder layers cannot be compiled (%s) and run without compilation", in_one_line(error))
            self.unfuse()  # for example without a C compiler
            logits = self._forward(embeddings, layout, head_rows).logits
        return logits

    def fuse(self) -> None:
        """Compile the decoder layers for later passes, if possible, and free the CUDA graphs of uncompiled layers."""
        self._fused = self.static and compile_layers(self.model)
        if self._fused:
            self.release()
        else:
            self._compile = False

    def unfuse(self) -> None:
        """Run the decoder layers without compilation in later passes."""
        self._compile, self._fused = False, False
        uncompile_layers(self.model)
        self.release()

    @contextmanager
    def by_module(self) -> Iterator[None]:
        """Run modules without CUDA graphs and compilation, so that hooks see their outputs."""
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
        """Number of shapes that were captured as CUDA graphs; ``None`` if graphs are off or failed."""
        if self._graphs is None or not self.static or self._graphs.off is not None:
            return None
        return self._graphs.captured

    def release(self) -> None:
        """Free CUDA graphs and their memory. Later passes capture them again."""
        if self._graphs is not None:
            self._graphs.forget()

    def _overflowed(self, embeddings: Tensor, layout: PackedLayout, head_rows: Tensor) -> None:
        """Report the module where float16 overflowed.

        In training this is a warning, because the step can be skipped.

        Raises:
            UserError: The overflow happened outside of training.
        """
        if torch.is_grad_enabled() and self._overflow_told:
            return
        self._overflow_told = True
        training = torch.is_grad_enabled()
        with torch.no_grad(), self.by_module():  # writes the same values to the KV cache again
            found = first_not_finite(self.model, lambda: self.run(embeddings, layout, head_rows))
        message = (
            f"{self.name} has no finite numbers in float16 from {found or 'its head'} on, probably an overflow (float16"
            " ends at 65,504), which loss scaling cannot prevent; set model.lm.dtype to bfloat16 or float32"
        )
        if not training:
            raise UserError(message)
        log.warning(message)

    def run(self, embeddings: Tensor, layout: PackedLayout, head_rows: Tensor, states: bool = False) -> Any:  # noqa: ANN401
        """Run the model and return its output, with logits only at the places ``head_rows``."""
        gradient = False
        try:
            output = self._forward(embeddings, layout, head_rows, states)
            gradient = output.logits.requires_grad
        finally:
            self._count(layout, gradient)
        return output

    def _count(self, layout: PackedLayout, gradient: bool) -> None:
        """Count a pass and its tokens without padding."""
        self.usage.passes += 1
        if gradient:
            self._followed += 1
            self.usage.tokens_with_gradient += layout.used
        else:
            self.usage.tokens_without_gradient += layout.used

    def _forward(self, embeddings: Tensor, layout: PackedLayout, head_rows: Tensor, states: bool = False) -> Any:  # noqa: ANN401
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.before_pass()
        self._head_rows = head_rows
        try:
            with following(layout):
                output = self.model(
                    inputs_embeds=embeddings[None],
                    position_ids=layout.positions,
                    # The layout defines the visibility. A 4-D mask stops transformers from building its own.
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
        """Whether passes are padded to few distinct shapes, so that CUDA graphs can replay them."""
        if self._static is None:
            current = self.device.type == "cuda" and self.device.index in (None, torch.cuda.current_device())
            self._static = self._graphs is not None and current and self._can_replay()
        return self._static

    def _worth_fusing(self) -> bool:
        """Whether to compile the layers now; never with ``auto`` if the run must be deterministic."""
        if self._fused or not self._compile:
            return False
        long = self._followed >= COMPILE_AFTER and not torch.are_deterministic_algorithms_enabled()
        return self._compile is True or long

    def _can_replay(self) -> bool:
        """Whether all batches of a shape run the same kernels, and only prompts have gradients."""
        own = any(weight.requires_grad for weight in self.model.parameters())  # trained weights, for example of LoRA
        by_batch = getattr(self.model, "is_loaded_in_8bit", False)  # kernels depend on the outliers of the batch
        return not own and not by_batch and self.shards is None

    def _embed_packed(self, ids: list[int], rows: list[int], prompt: Prompt) -> Tensor:
        """Embed packed ids as ``[M, D]``, with vectors of the prompt at its positions.

        Args:
            ids: Token ids, with ``-1 - p`` for position ``p`` of the prompt.
            rows: Index of the row of each id ``[M]``, for one prompt per row.
            prompt: ``[P, D]`` or ``[B, P, D]``, or keys and values, which have no positions in ``ids``.
        """
        index = np.array(ids)
        places = np.flatnonzero(index < 0)
        if not len(places):
            return self.embed(to_device(index, self.device))
        assert isinstance(prompt, Tensor)
        parts = [index.clip(min=0), places, -1 - index[places], np.array(rows)[places]]
        known, spots, positions, owners = to_device_together(parts, self.device)
        text = self.embed(known)
        flat = prompt.flatten(0, -2)  # usually all vectors in order, so that no lookup is needed
        if not np.array_equal(index[places], -1 - np.resize(np.arange(prompt.shape[-2]), len(flat))):
            flat = prompt[positions] if prompt.dim() == 2 else prompt[owners, positions]
        return text.index_copy(0, spots, flat.to(text.dtype))

    def pack(
        self,
        levels: list[list[list[int]]],
        prompt: Prompt,
        cache: KVCache | None = None,
        rows: int = -1,
        static: bool = True,
    ) -> tuple[Tensor, PackedLayout]:
        """Pack the segments of a prefix tree into embeddings ``[M, D]`` and their layout; see `build_prefix_tree`.

        Args:
            levels: The segments of each level.
            prompt: See `FrozenLM.score`.
            cache: Stores keys and values; see `PackedLayout`.
            rows: Index of the level with one segment per row.
            static: Whether padding tokens may be added at the end of each level.
        """
        past = prompt if isinstance(prompt, KeyValues) else None
        if past is not None and self.shards is not None:
            past = self.shards.own_heads(past)
        counts = [[len(part) for part in level] for level in levels]
        bucketed = static and cache is None and self.static
        layout = PackedLayout(
            counts, self.device, past, cache, bucketed=bucketed, attention=self.attention, fused=self._fused
        )
        # With one prompt per row, prompt tokens are only in the level of the rows; the owner of other tokens is unused.
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
    """Remove the keys of the LM, which no checkpoint contains, from the missing keys, so that loading can be strict."""
    own = set(nn.Module.state_dict(module))
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(key.endswith(f".{name}") or key == name for name in own)
    ]
