"""Next-token distributions of a teacher, whole or as the likeliest tokens and the rest, and divergences from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distributions:
    r"""Distributions over the next token at ``N`` positions, over the vocabulary or in ``k + 1`` bins.

    With ``top_k``, the ``k`` likeliest tokens of each position have a bin each, and all other tokens share the last
    one. The divergence of the bins is a lower bound of the divergence ``KL(p || q)`` of the vocabulary, and the
    difference is exactly ``p(rest) KL(p(. | rest) || q(. | rest))``, by the chain rule of the divergence.

    Attributes:
        log_probs: ``[N, V]``, or ``[N, k + 1]`` with the rest last; float32, in nats.
        tokens: Token ids of the bins, ``[N, k]``; ``None`` for the whole vocabulary.
    """

    log_probs: Tensor
    tokens: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, top_k: int | None = None) -> Distributions:
        """Normalise logits ``[N, V]``; keep the ``top_k`` likeliest tokens (less than ``V``), or all with ``None``."""
        log_probs = torch.log_softmax(logits, -1)
        if top_k is None:
            return cls(log_probs)
        tokens = log_probs.topk(top_k, -1).indices
        return cls(_in_bins(log_probs, tokens), tokens)

    @classmethod
    def join(cls, parts: list[Distributions]) -> Distributions:
        """Concatenate distributions with the same number of bins."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(torch.cat([part.log_probs for part in parts]), torch.cat(tokens) if tokens else None)

    def split(self, sizes: list[int]) -> list[Distributions]:
        """Split the positions into parts of given sizes."""
        parts = self.log_probs.split(sizes)
        tokens = [None] * len(sizes) if self.tokens is None else self.tokens.split(sizes)
        return [Distributions(part, own) for part, own in zip(parts, tokens, strict=True)]

    def divergence(self, logits: Tensor, reverse: bool = False) -> Tensor:
        """Compute the Kullback-Leibler divergence of each position, ``[N]`` in nats, differentiable in the logits.

        Args:
            logits: Logits of the other distributions ``q``, ``[N, V]`` float32.
            reverse: Whether to compute ``KL(q || p)`` instead of ``KL(p || q)``, where ``p`` are these distributions.
        """
        own, other = self.log_probs, torch.log_softmax(logits, -1)
        if self.tokens is not None:
            other = _in_bins(other, self.tokens)
        first, second = (other, own) if reverse else (own, other)
        return (first.exp() * (first - second)).sum(-1)


def _in_bins(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities ``[N, k + 1]`` of tokens ``[N, k]`` and of all others together."""
    rest = log_probs.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, tokens), rest], -1)
