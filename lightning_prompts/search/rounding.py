"""From a relaxed prompt to tokens that work together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm.encoding import Row
from lightning_prompts.objectives import Likelihood
from lightning_prompts.search.candidates import survives
from lightning_prompts.search.scoring import CandidateScorer, race


@dataclass(frozen=True)
class Rounding:
    """Coordinate descent over the likeliest tokens, from the arg-max.

    The arg-max of each position alone often makes a bad prompt: the positions were trained as mixtures that complete
    each other. So each position in turn takes the best of its ``top_k`` tokens, the others fixed.

    Attributes:
        every: Training steps between two roundings.
        top_k: Tokens tried at each position.
        examples: Training examples that they are tried on.
        sweeps: At most so many times over all positions.
    """

    every: int = 75
    top_k: int = 24
    examples: int = 64
    sweeps: int = 3

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("every", "top_k", "examples", "sweeps"):
            if getattr(self, name) < 1:
                raise UserError(f"rounding.{name} must be at least 1, got {getattr(self, name)}")


def coordinate_descent(
    scorer: CandidateScorer, rows: Sequence[Row], scores: Tensor, objective: Likelihood, rounding: Rounding
) -> Tensor:
    """Tokens ``[P]`` that no single change to another of the likeliest ones would improve, or the best so far.

    Prompts that are other tokens once they are written as text are left out, as long as there are others.

    Args:
        scorer: Does the work.
        rows: Rows with a prompt slot.
        scores: How much each position wants each token, ``[P, V]``.
        objective: From scores of answers to losses.
        rounding: The settings.
    """
    top = scores.topk(min(rounding.top_k, scores.shape[-1]), dim=-1).indices
    ids = top[:, 0].clone()
    for _ in range(rounding.sweeps):
        before = ids.clone()
        for position in range(len(ids)):
            candidates = ids.repeat(len(top[position]), 1)
            candidates[:, position] = top[position]
            candidates = torch.unique(torch.cat([ids[None], candidates]), dim=0)
            kept = survives(scorer.lm, candidates)
            candidates = candidates[kept] if kept.any() else candidates
            ids = candidates[race(scorer, rows, candidates, objective, None).argmin()]
        if torch.equal(ids, before):
            break
    return ids
