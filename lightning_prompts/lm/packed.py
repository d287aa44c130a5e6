"""Runs a frozen model over packed segments: what precedes a token is a layout's business, not the batch's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_prompts.errors import UserError
from lightning_prompts.lm.attention import ATTENTION_NAME, Layout, RowMemory, following
from lightning_prompts.lm.finite import first_not_finite
from lightning_prompts.lm.key_values import KeyValues, Prompt
from lightning_prompts.lm.sharding import Shards, shard
from lightning_prompts.lm.transfer import to_device, to_device_together
from lightning_prompts.lm.usage import Usage

log = logging.getLogger(__name__)


class PackedLM(nn.Module):
    """A causal LM that never changes, run over segments that share what they have in common; see `Layout`.

    It has no trainable parameter, stays in eval mode whatever the trainer does, and contributes nothing to checkpoints.

    Args:
        model: A transformers causal LM that runs with this project's attention.
        name: What to call it in messages.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        """Wrap a loaded model."""
        super().__init__()
        self.name = name
        self.model = model
        self.usage = Usage()  # by this process
        self._head_rows: Tensor | None = None
        self._overflow_told = False
        self.shards: Shards | None = None  # where the weights are spread over processes
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"model {name!r} has no language-model head")
        head.register_forward_pre_hook(self._keep_head_rows)
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

    def meet(self) -> None:
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

    def logits(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> Tensor:
        """Logits ``[N, V]`` in float32 at positions ``head_rows [N]`` of packed embeddings ``[M, D]``."""
        logits: Tensor = self.run(embeddings, layout, head_rows).logits.float()
        if self.model.dtype == torch.float16 and not bool(torch.isfinite(logits).all()):
            self._overflowed(embeddings.detach(), layout, head_rows)
        return logits

    def _overflowed(self, embeddings: Tensor, layout: Layout, head_rows: Tensor) -> None:
        """Say where float16 has overflowed: as a warning in training, where steps can be skipped, else as an error."""
        if torch.is_grad_enabled() and self._overflow_told:
            return
        self._overflow_told = True
        training = torch.is_grad_enabled()
        with torch.no_grad():  # what is kept for later passes is only written again
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
        if self.shards is not None and self.shards.lockstep is not None:
            self.shards.lockstep.before_pass()
        self._head_rows = head_rows
        self.usage.passes += 1
        gradient = False
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
            gradient = output.logits.requires_grad
        finally:
            self._head_rows = None
            if gradient:
                self.usage.tokens_with_gradient += len(embeddings)
            else:
                self.usage.tokens_without_gradient += len(embeddings)
        if not layout.followed:
            raise RuntimeError(f"{self.name} does not run with the attention implementation {ATTENTION_NAME!r}")
        return output

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
        soft = prompt[positions] if prompt.dim() == 2 else prompt[owners, positions]
        return text.index_copy(0, spots, soft.to(text.dtype))

    def pack(
        self, levels: list[list[list[int]]], prompt: Prompt, memory: RowMemory | None = None, rows: int = -1
    ) -> tuple[Tensor, Layout]:
        """Pack levels of segments into ``[M, D]``; see `share`. Level ``rows`` has a segment for each row."""
        past = prompt if isinstance(prompt, KeyValues) else None
        if past is not None and self.shards is not None:
            past = self.shards.own_heads(past)
        layout = Layout([[len(part) for part in level] for level in levels], self.device, past, memory)
        # Of a prompt per row nothing is shared, so the owner of other levels' tokens does not matter.
        own = levels[rows]
        owner = [b if level is own else 0 for level in levels for b, part in enumerate(level) for _ in part]
        ids = [token for level in levels for part in level for token in part]
        return self._embed_packed(ids, owner, prompt), layout


def _nothing_missing(module: nn.Module, incompatible: Any) -> None:  # noqa: ANN401 - torch's private named tuple
    """Loading a checkpoint is strict on every key but the LM's own, which no checkpoint has."""
    own = set(nn.Module.state_dict(module))
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(key.endswith(f".{name}") or key == name for name in own)
    ]
