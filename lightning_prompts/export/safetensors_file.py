"""Export to one safetensors file, with all metadata in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_prompts.export.formats import Export
from lightning_prompts.export.tensors import EMBEDDINGS, Tensors, named_tensors
from lightning_prompts.export.usage import cache_snippet, embedding_snippet

FILE = "prompt.safetensors"


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
        load = f'from safetensors.torch import load_file\n\ntensors = load_file("{name}/{FILE}")'
        if EMBEDDINGS in named_tensors(export):
            return embedding_snippet(export, load, f'tensors["{EMBEDDINGS}"]')
        return cache_snippet(export, load, 'tensors[f"keys.{layer}"], tensors[f"values.{layer}"]')
