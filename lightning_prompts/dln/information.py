"""What hidden texts say about the answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mutual_information(log_probs: Tensor) -> Tensor:
    """How much a text says about the class, estimated from the class probabilities that follow from each of some texts.

    The entropy of their mean less the mean of their entropies: 0 where every text leads to the same probabilities, the
    logarithm of the number of classes where texts decide it and all classes are as frequent. It is about the classes
    that the LM gives, not about the right ones.

    Args:
        log_probs: Of ``Y`` classes after ``K`` texts, ``[K, Y]``; negative infinity for a class that is none.

    Returns:
        A scalar, in nats.

    >>> decided = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()  # each text leads to another class
    >>> mutual_information(decided)
    tensor(0.6931)
    """
    mean = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    return _entropy(mean) - _entropy(log_probs).mean()


def _entropy(log_probs: Tensor) -> Tensor:
    """``[..., Y]`` -> ``[...]``."""
    return -torch.where(torch.isinf(log_probs), 0.0, log_probs.exp() * log_probs).sum(-1)
