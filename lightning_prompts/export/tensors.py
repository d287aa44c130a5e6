"""Export tensors: one safetensors file, or one NumPy file for each tensor."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_prompts.export.formats import Export, Format, answer_nll
from lightning_prompts.export.texts import Step
from lightning_prompts.export.usage import cache_snippet, embedding_snippet, literal
from lightning_prompts.lm import KeyValues
from lightning_prompts.prompts.from_peft import ABOUT

FILE = "prompt.safetensors"
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


class SafetensorsFile(Tensors):
    """Tensors and metadata in one file, which is read without running code."""

    name = "safetensors"
    title = "tensors in safetensors"

    def write(self, export: Export, folder: Path) -> None:
        """See `Format`; the values of the header are JSON, because a header contains only text."""
        header = {name: json.dumps(value, ensure_ascii=False) for name, value in export.about.items()}
        save_file(named_tensors(export), folder / FILE, header)

    def read(self, folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """See `Tensors`."""
        with safe_open(folder / FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, {name: json.loads(value) for name, value in file.metadata().items()}

    def usage(self, export: Export, name: str) -> str:
        """See `Format`."""
        load = f"from safetensors.torch import load_file\n\ntensors = load_file({literal(f'{name}/{FILE}')})"
        if EMBEDDINGS in named_tensors(export):
            return embedding_snippet(export, load, f'tensors["{EMBEDDINGS}"]')
        return cache_snippet(export, load, 'tensors[f"keys.{layer}"], tensors[f"values.{layer}"]')


class NumPyFiles(Tensors):
    """One file per tensor, with the metadata in ``prompt.json``."""

    name = "npy"
    title = "arrays in NumPy's format"

    def write(self, export: Export, folder: Path) -> None:
        """See `Format`."""
        for name, tensor in named_tensors(export).items():
            np.save(folder / f"{name}.npy", tensor.cpu().numpy(), allow_pickle=False)

    def read(self, folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """See `Tensors`."""
        tensors = {
            path.stem: torch.from_numpy(np.load(path, allow_pickle=False)) for path in sorted(folder.glob("*.npy"))
        }
        return tensors, json.loads((folder / ABOUT).read_text(encoding="utf-8"))

    def usage(self, export: Export, name: str) -> str:
        """See `Format`."""
        file = f'{literal(f"{name}/")} + name + ".npy"'
        load = f"import numpy as np\n\ndef array(name):\n    return torch.from_numpy(np.load({file}))"
        if EMBEDDINGS in named_tensors(export):
            return embedding_snippet(export, load, f'array("{EMBEDDINGS}")')
        return cache_snippet(export, load, 'array(f"keys.{layer}"), array(f"values.{layer}")')
