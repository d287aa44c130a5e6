"""Candidate prompts by token gradients (AutoPrompt, Shin et al. 2020; GCG, Zou et al. 2023, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.transfer import to_device


def top_tokens(gradient: Tensor, allowed_ids: Tensor, k: int) -> Tensor:
    """The tokens with the largest expected decrease of the loss, to first order.

    Args:
        gradient: Gradient of the loss with respect to one-hot rows, ``[P, V]``.
        allowed_ids: Tokens that a prompt may have, ``[V]`` bool, at least ``k``.
        k: Number of tokens for each position.

    Returns:
        Token ids ``[P, k]``.
    """
    return (-gradient).masked_fill(~allowed_ids, float("-inf")).topk(k, dim=-1).indices


def draw_candidates(ids: Tensor, top: Tensor, count: int, n_replace: int, generator: torch.Generator) -> Tensor:
    """Draw prompts that differ from the current one in up to ``n_replace`` positions.

    Args:
        ids: The current prompt, ``[P]``.
        top: Tokens to choose from at each position, ``[P, k]``.
        count: Number of draws.
        n_replace: Limit of changed positions; each number up to it is equally likely.
        generator: Source of random numbers, on the CPU.

    Returns:
        ``[C, P]`` with ``C <= count``: all different, without the current prompt.
    """
    length, k = top.shape
    order = torch.rand(count, length, generator=generator, device="cpu").argsort(-1)  # positions in random order
    changed = torch.randint(1, min(n_replace, length) + 1, (count, 1), generator=generator, device="cpu")
    change = to_device(order < changed, ids.device)  # the rank of a position is a random permutation as well
    choice = to_device(torch.randint(k, (count, length), generator=generator, device="cpu"), ids.device)
    drawn = top.T.gather(0, choice)
    candidates = torch.where(change, drawn, ids)
    distinct: Tensor = torch.unique(candidates[(candidates != ids).any(-1)], dim=0)
    return distinct


def round_trips(lm: FrozenLM, candidates: Tensor) -> Tensor:
    """Whether the text of each prompt is tokenised to the same tokens again, ``[C, P]`` -> ``[C]`` bool.

    Otherwise the prompt cannot be used as text: the LM would read other tokens.
    """
    kept = [lm.encoder.round_trips(ids) for ids in candidates.tolist()]
    return to_device(torch.tensor(kept, dtype=torch.bool, device="cpu"), candidates.device)
