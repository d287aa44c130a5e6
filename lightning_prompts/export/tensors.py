"""Common code of the tensor formats: names of tensors, and scoring with transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_prompts.export.formats import Export, Format, answer_nll
from lightning_prompts.export.texts import Step
from lightning_prompts.lm import KeyValues

EMBEDDINGS, KEYS, VALUES = "embeddings", "keys", "values"


def named_tensors(export: Export) -> dict[str, Tensor]:
    """Name the tensors: ``embeddings [P, D]``, or ``keys.L`` and ``values.L [P, Hkv, Dh]`` of each layer L."""
    content = export.content
    if isinstance(content, Tensor):
        return {EMBEDDINGS: content.contiguous()}
    assert isinstance(content, KeyValues)
    return {
        f"{name}.{layer}": part.contiguous()
        for layer, pair in enumerate(content.layers)
        for name, part in zip((KEYS, VALUES), pair, strict=True)
    }


def position(export: Export) -> str:
    """Explain where to insert the tensors."""
    if isinstance(export.content, Tensor):
        return "the vectors replace {prompt} among the embeddings of the text"
    return (
        f"the keys and values come before all tokens, at positions 0 to {export.length - 1}, with rotary embeddings "
        f"applied to the keys; the text starts at position {export.length}, with an empty {{prompt}}"
    )


class Tensors(Format):
    """Vectors, or keys and values, with their template."""

    kinds = ("vectors", "keys and values")
    library = "transformers"

    @abstractmethod
    def read(self, folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Read the tensors and the metadata from disk."""

    @torch.no_grad()
    def nll(self, export: Export, folder: Path) -> list[float]:
        """See `Format`; renders the text with the exported template."""
        tensors, about = self.read(folder)
        model = export.base.load()
        step = Step.from_record(about["prompts"][0])
        scores = []
        for example in export.examples:
            pieces = export.pieces(step.place(example, None))
            scores.append(self._score(model, tensors, pieces.before, pieces.after, pieces.answer))
        return scores

    @staticmethod
    def _score(
        model: PreTrainedModel, tensors: Mapping[str, Tensor], before: list[int], after: list[int], answer: list[int]
    ) -> float:
        if EMBEDDINGS in tensors:
            table = model.get_input_embeddings()
            start = table(torch.tensor(before, dtype=torch.long, device="cpu"))
            rest = table(torch.tensor(after + answer, device="cpu"))
            inputs = torch.cat([start, tensors[EMBEDDINGS], rest])[None]
            return answer_nll(model(inputs_embeds=inputs).logits[0], answer)
        cache = DynamicCache()
        for layer in range(len(tensors) // 2):
            key, value = tensors[f"{KEYS}.{layer}"], tensors[f"{VALUES}.{layer}"]
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        ids = torch.tensor([before + after + answer], device="cpu")
        return answer_nll(model(input_ids=ids, past_key_values=cache).logits[0], answer)
