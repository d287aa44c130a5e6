"""The information of hidden texts about the answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mutual_information(log_probs: Tensor) -> Tensor:
    """Estimate the mutual information of text and class from the class probabilities after each of several texts.

    It is the entropy of the mean probabilities minus the mean of their entropies. It is 0 if every text leads to the
    same probabilities, and the logarithm of the number of classes if texts decide the class and all classes are equally
    frequent. It measures the classes that the LM predicts, right or wrong.

    Args:
        log_probs: Log-probabilities of ``Y`` classes after ``K`` texts, ``[K, Y]``; negative infinity for a class that
            does not exist.

    Returns:
        A scalar, in nats.

    >>> decided = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()  # each text leads to another class
    >>> mutual_information(decided)
    tensor(0.6931)
    """
    mean = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    return _entropy(mean) - _entropy(log_probs).mean()


def _entropy(log_probs: Tensor) -> Tensor:
    """Compute the entropy, ``[..., Y]`` -> ``[...]``, in nats."""
    return -torch.where(torch.isinf(log_probs), 0.0, log_probs.exp() * log_probs).sum(-1)
