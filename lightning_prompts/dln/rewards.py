"""Rewards of candidate prompts on a batch, and the choice of the best one."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_log_probs(log_probs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Compute a candidate's part of the ELBO: the mean of ``sum_jk v_j w_k log p(target_k | input_j, candidate)``.

    Args:
        log_probs: Log-probabilities of the targets, ``[C, B, J, K]``.
        inputs: Weights ``v`` of the texts that the layer reads, ``[B, J]``.
        targets: Weights ``w`` of the texts that the layer should write, ``[B, K]``.

    Returns:
        ``[C]`` in nats.
    """
    return torch.einsum("cbjk,bj,bk->cb", log_probs, inputs, targets).mean(-1)


def divergence(log_probs: Tensor, inputs: Tensor) -> Tensor:
    """Compute how far each candidate moves the class probabilities: the batch mean of KL(current || candidate).

    Args:
        log_probs: Log-probabilities of the classes, ``[C, B, J, Y]``, the current prompt first; negative infinity
            beyond the last class.
        inputs: Weights of the texts that the layer reads, ``[B, J]``.

    Returns:
        ``[C]`` in nats.
    """
    current = log_probs[:1]
    terms = torch.where(torch.isinf(current), 0.0, current.exp() * (current - log_probs))
    return torch.einsum("cbj,bj->cb", terms.sum(-1), inputs).mean(-1)


def best(rewards: Tensor) -> int:
    """Return the index of the largest reward ``[C]``; the current prompt, which is the first, wins ties.

    NaN never wins.
    """
    rewards = rewards.nan_to_num(nan=float("-inf"))
    return 0 if rewards[0] >= rewards.max() else int(rewards.argmax())
