"""Where a prompt's vectors go among those of the vocabulary, in little space."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor

from lightning_prompts.callbacks.files import RowLog
from lightning_prompts.errors import UserError
from lightning_prompts.runs.names import PROMPT_PATH

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptPath(RowLog):
    """After each validation: the prompt's vectors and their nearest vocabulary vectors, projected at random.

    Writes ``prompt_path.jsonl`` for the report's picture of the path. A random projection to a few numbers keeps
    distances up to some ten per cent (Johnson & Lindenstrauss 1984), needs to know nothing of where the path will
    lead, and is the same for all runs on a model. A row has the step, the places in the prompt, ``vectors`` and
    ``token_vectors`` (base64 of little-endian float16, ``[places, size]``) and the nearest ``tokens``; the first one
    has some of the ``vocabulary``, too. A row takes 1 kB; keys and values have no path.

    Args:
        places: How many vectors of the prompt at most, evenly spaced.
        size: How many numbers stand for a vector.
        vocabulary: How many vectors of the vocabulary, drawn at random.
    """

    def __init__(self, places: int = 6, size: int = 32, vocabulary: int = 64) -> None:
        """Start without rows."""
        super().__init__(PROMPT_PATH)
        for name, value in (("places", places), ("size", size), ("vocabulary", vocabulary)):
            if value < 1:
                raise UserError(f"PromptPath: {name} must be at least 1, got {value}")
        self.places, self.size, self.vocabulary = places, size, vocabulary

    def state_dict(self) -> dict[str, Any]:
        """Nothing: checkpoints stay small, and a resumed run reads its file."""
        return {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the rows up to here; a path that cannot be read begins here."""
        path = Path(trainer.default_root_dir) / self.name
        if trainer.global_step and path.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
                self.rows = [row for row in rows if row["step"] <= trainer.global_step]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Note where the prompt is, and the first time, where it came from."""
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
        """``[N, D]`` projected, as text."""
        vectors = vectors.detach().float().cpu()
        generator = torch.Generator().manual_seed(0)  # the same projection for every row, run and method
        projection = torch.randn(vectors.shape[1], self.size, generator=generator, device="cpu") / self.size**0.5
        numbers = (vectors @ projection).to(torch.float16).numpy().astype("<f2")
        return base64.b64encode(numbers.tobytes()).decode("ascii")
