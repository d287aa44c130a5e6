"""Export to NumPy files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prompts.export.formats import Export
from lightning_prompts.export.tensors import EMBEDDINGS, Tensors, named_tensors
from lightning_prompts.export.usage import cache_snippet, embedding_snippet
from lightning_prompts.prompts.from_peft import ABOUT


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
        load = f'import numpy as np\n\ndef array(name):\n    return torch.from_numpy(np.load(f"{name}/{{name}}.npy"))'
        if EMBEDDINGS in named_tensors(export):
            return embedding_snippet(export, load, f'array("{EMBEDDINGS}")')
        return cache_snippet(export, load, 'array(f"keys.{layer}"), array(f"values.{layer}")')
