"""Record the path of a prompt's vectors relative to the vocabulary, in compact form."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_prompts.callbacks.files import RowLog
from lightning_prompts.errors import UserError
from lightning_prompts.runs.names import PROMPT_PATH

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptPath(RowLog):
    """Writes random projections of the prompt's vectors and their nearest token embeddings after each validation.

    The report plots the path from ``prompt_path.jsonl``. A random projection preserves distances up to about ten per
    cent (Johnson & Lindenstrauss 1984), does not depend on the future path, and is the same for all runs of a model. A
    row contains the step, the positions in the prompt, ``vectors`` and ``token_vectors`` (base64 of little-endian
    float16, ``[places, size]``) and the nearest ``tokens``. The first row also contains a part of the ``vocabulary``. A
    row takes 1 kB. Prompts of keys and values have no path.

    Args:
        places: Maximum number of positions of the prompt, evenly spaced.
        size: Dimension of the projection.
        vocabulary: Number of randomly drawn embeddings of the vocabulary.
    """

    def __init__(self, places: int = 6, size: int = 32, vocabulary: int = 64) -> None:
        """Start without rows."""
        super().__init__(PROMPT_PATH)
        for name, value in (("places", places), ("size", size), ("vocabulary", vocabulary)):
            if value < 1:
                raise UserError(f"PromptPath: {name} must be at least 1, got {value}")
        self.places, self.size, self.vocabulary = places, size, vocabulary

    def state_dict(self) -> dict[str, Any]:
        """Return no state, so that checkpoints stay small; a resumed run reads its file."""
        return {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the rows up to this step; start a new path if the file is damaged."""
        path = Path(trainer.default_root_dir) / self.name
        if trainer.global_step and path.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
                self.rows = [row for row in rows if row["step"] <= trainer.global_step]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Record the prompt; the first time, also the initial prompt."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with torch.no_grad():
            prompt, initial = pl_module.current_prompt(), pl_module.initial_prompt()
            if not isinstance(prompt, Tensor) or not len(prompt):
                return
            rows = []
            if not self.rows and isinstance(initial, Tensor):
                rows.append(self._row(pl_module, 0, initial))
            rows.append(self._row(pl_module, trainer.global_step, prompt))
            if not self.rows:
                matrix = pl_module.lm.embedding_matrix()
                order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0), device="cpu")
                rows[0]["vocabulary"] = self._packed(matrix[order[: self.vocabulary].to(matrix.device)])
        self.add(trainer, rows)

    def _row(self, pl_module: PromptMethod, step: int, vectors: Tensor) -> dict[str, Any]:
        count = min(self.places, len(vectors))
        places = torch.linspace(0, len(vectors) - 1, count, device="cpu").round().long()
        chosen = vectors.detach().float()[places.to(vectors.device)]
        ids, _ = pl_module.lm.nearest_tokens(chosen)
        return {
            "step": step,
            "size": self.size,
            "places": places.tolist(),
            "vectors": self._packed(chosen),
            "tokens": [pl_module.lm.text([token]) for token in ids.tolist()],
            "token_vectors": self._packed(pl_module.lm.embed(ids)),
        }

    def _packed(self, vectors: Tensor) -> str:
        """Project vectors ``[N, D]``, and encode them as text."""
        vectors = vectors.detach().float().cpu()
        generator = torch.Generator().manual_seed(0)  # the same projection for all rows, runs and methods
        projection = torch.randn(vectors.shape[1], self.size, generator=generator, device="cpu") / self.size**0.5
        numbers = (vectors @ projection).to(torch.float16).numpy().astype("<f2")
        return base64.b64encode(numbers.tobytes()).decode("ascii")
