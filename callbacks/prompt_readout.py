"""Read a trained prompt as tokens, and score these tokens as a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prompts.callbacks.files import RowLog, log_table
from lightning_prompts.files import write_atomic
from lightning_prompts.runs.names import PROMPT_TEXT, READOUT

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptReadout(RowLog):
    """Records the nearest vocabulary tokens of the prompt and its distance from the start, after each validation.

    Writes ``prompt.jsonl`` with one row per validation: the step, the nearest tokens, their cosine similarities, the
    norms of the vectors, the mean Euclidean distance from the initial vectors, and the validation NLL with the nearest
    tokens as prompt. This NLL is usually bad, which shows that the nearest tokens of a soft prompt do not explain it.
    For prompts of tokens, ``prompt.txt`` contains the exact text of the best prompt so far, that of ``best.ckpt``. For
    keys and values, only the distance is recorded. Loggers get the text, or the tokens with similarities and norms.

    Args:
        examples: Number of validation examples for the NLL of the nearest tokens.
    """

    def __init__(self, examples: int = 100) -> None:
        """Start without rows."""
        super().__init__(READOUT)
        self.examples = examples

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Add a row for the current prompt."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        row: dict[str, Any] = {"step": trainer.global_step}
        with torch.no_grad():
            prompt, initial = pl_module.current_prompt(), pl_module.initial_prompt()
            if isinstance(prompt, Tensor) and len(prompt):
                row.update(self._words(trainer, pl_module, prompt.float()))
        if initial is not None:
            distance = (_flat(prompt) - _flat(initial)).norm(dim=-1).mean()
            row["distance"] = round(float(distance), 4)
            pl_module.log("prompt/distance", distance)
        self.add(trainer, [row])

    def on_validation_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Write the text, unless ``best.ckpt`` contains an earlier prompt. The score is known now."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._write(trainer, pl_module, _worse(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Write the text of a training without validation."""
        if not self.rows:
            self._write(trainer, pl_module, worse=False)

    def _write(self, trainer: L.Trainer, pl_module: PromptMethod, worse: bool) -> None:
        text = pl_module.prompt_text()  # a collective operation of all processes
        if text is not None and trainer.is_global_zero and not worse:
            write_atomic(Path(trainer.default_root_dir) / PROMPT_TEXT, text)
        if text is not None:
            log_table(trainer, "prompt", [{"prompt": text}], ["prompt"])
        elif self.rows and "tokens" in self.rows[-1]:
            row = self.rows[-1]
            columns = ("place", "nearest token", "cosine similarity", "norm")
            places = zip(range(len(row["tokens"])), row["tokens"], row["cosine"], row["norm"], strict=True)
            log_table(trainer, "prompt", [dict(zip(columns, place, strict=True)) for place in places], columns)

    def _words(self, trainer: L.Trainer, pl_module: PromptMethod, vectors: Tensor) -> dict[str, Any]:
        ids, similarity = pl_module.lm.nearest_tokens(vectors)
        row: dict[str, Any] = {"tokens": [pl_module.lm.text([token]) for token in ids.tolist()]}
        if pl_module.prompt_text() is not None:
            return row
        data = trainer.datamodule  # type: ignore[attr-defined]
        examples, size = data.examples("val")[: self.examples], data.eval_batch_size
        words = pl_module.lm.embed(ids)
        nll = torch.cat(
            [pl_module.lm.score(examples[start : start + size], words).nll for start in range(0, len(examples), size)]
        ).mean()
        pl_module.log("prompt/nll_as_words", nll)
        row["cosine"] = [round(value, 4) for value in similarity.tolist()]
        row["norm"] = [round(value, 4) for value in vectors.norm(dim=-1).tolist()]
        row["nll_as_words"] = round(float(nll), 4)
        return row


def _worse(trainer: L.Trainer) -> bool:
    """Whether an earlier validation was at least as good; checkpoints are saved after all other callbacks."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        score, best = trainer.callback_metrics.get(callback.monitor), callback.best_model_score
        if score is not None and best is not None:
            return bool(score >= best if callback.mode == "min" else score <= best)
    return False


def _flat(prompt: Any) -> Tensor:
    """Return a prompt as ``[P, ...]``, with the keys and values of all layers concatenated."""
    flat: Tensor = prompt if isinstance(prompt, Tensor) else prompt.flatten()
    return flat
