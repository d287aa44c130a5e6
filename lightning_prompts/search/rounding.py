"""From a relaxed prompt to tokens that work together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import check_at_least
from lightning_prompts.lm.encoding import Row
from lightning_prompts.objectives import Likelihood
from lightning_prompts.search.candidates import round_trips
from lightning_prompts.search.scoring import CandidateScorer, race


@dataclass(frozen=True)
class Rounding:
    """Settings of coordinate descent over the likeliest tokens, starting from the arg-max.

    The arg-max of each position alone often makes a bad prompt: the positions were trained together, as mixtures. So
    each position in turn takes the best of its ``top_k`` tokens while the others are fixed.

    Attributes:
        every: Training steps between two roundings.
        top_k: Number of tokens to try at each position.
        examples: Number of training examples to try them on.
        sweeps: Limit of passes over all positions.
    """

    every: int = 75
    top_k: int = 24
    examples: int = 64
    sweeps: int = 3

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("every", "top_k", "examples", "sweeps"):
            check_at_least(f"rounding.{name}", getattr(self, name))


def coordinate_descent(
    scorer: CandidateScorer, rows: Sequence[Row], scores: Tensor, objective: Likelihood, rounding: Rounding
) -> Tensor:
    """Find tokens ``[P]`` that no single change to another likely token improves, or the best within the sweeps.

    Prompts whose text has other tokens are left out, unless all are such prompts.

    Args:
        scorer: Scores the candidates.
        rows: Rows with a prompt slot.
        scores: Score of each token at each position, ``[P, V]``.
        objective: Turns scores of answers into losses.
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
            kept = round_trips(scorer.lm, candidates)
            candidates = candidates[kept] if kept.any() else candidates
            ids = candidates[race(scorer, rows, candidates, objective, None).argmin()]
        if torch.equal(ids, before):
            break
    return ids
