"""What a trained prompt looks like in words, and whether the words do its work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

from callbacks.files import RowLog

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod


class PromptReadout(RowLog):
    """After each validation: the vocabulary tokens nearest to the prompt, and how far it has moved.

    Writes ``prompt.jsonl``, one row per validation: step, tokens, cosine similarity of each, mean Euclidean distance
    from the initial vectors, and the validation NLL of the nearest tokens used as words in the prompt's place. That
    last one is usually bad, which is the point: a soft prompt's nearest words do not say what it does.

    Args:
        examples: How many validation examples the words are scored on.
    """

    def __init__(self, examples: int = 100) -> None:
        """Start without rows."""
        super().__init__("prompt.jsonl")
        self.examples = examples

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: PromptMethod) -> None:  # type: ignore[override]
        """Read the prompt out."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with torch.no_grad():
            vectors = pl_module.prompt_vectors().float()
            ids, similarity = pl_module.lm.nearest_tokens(vectors)
            examples = trainer.datamodule.examples("val")[: self.examples]  # type: ignore[attr-defined]
            words = pl_module.lm.embed(ids)
            nll = torch.cat(
                [pl_module.lm.score(examples[start : start + 64], words).nll for start in range(0, len(examples), 64)]
            ).mean()
        row: dict[str, Any] = {
            "step": trainer.global_step,
            "tokens": [pl_module.lm.text([token]) for token in ids.tolist()],
            "cosine": [round(value, 4) for value in similarity.tolist()],
            "nll_as_words": round(float(nll), 4),
        }
        pl_module.log("prompt/nll_as_words", nll)
        if (initial := pl_module.initial_vectors()) is not None:
            distance = (vectors - initial).norm(dim=-1).mean()
            row["distance"] = round(float(distance), 4)
            pl_module.log("prompt/distance", distance)
        self.add(trainer, [row])
