"""Gradient estimators that turn trainable scores over the vocabulary into differentiable vectors, and into tokens.

All computations use float32, independent of the precision of the LM and of mixed precision. E is the embedding matrix
``[V, D]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prompts.errors import check_finite
from lightning_prompts.lm.transfer import to_device


@dataclass(frozen=True)
class PartNoise:
    """The noise of the examples of one process.

    Each process draws the noise of the whole batch and uses its own part, so that no two processes use the same noise.

    Attributes:
        generator: Generator of the noise of the whole batch, the same in all processes.
        start: Index of the first example of this process in the batch.
        total: Number of examples of the batch.
    """

    generator: torch.Generator
    start: int
    total: int


Noise = torch.Generator | PartNoise | None
MASKED = -1e4  # probability 0 at every temperature; not -inf, whose gradient is NaN


class GradientEstimator(ABC):  # noqa: B024 - a common base class of all estimators
    """How gradients flow from the inputs of the LM to the trained parameters."""

    passes_gradient: ClassVar[bool] = True


@dataclass(frozen=True)
class Soft(GradientEstimator):
    """Plain backpropagation: the LM reads the trained or generated vectors directly."""


class Relaxation(GradientEstimator):
    """Maps the parameters of a prompt to vectors for the LM during training, and to tokens."""

    @abstractmethod
    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """Make the initial parameters.

        Args:
            ids: Initial tokens, ``[P]``.
            matrix: E, ``[V, D]``.
            init_logit: Initial score of these tokens; the others have score 0.
        """

    @abstractmethod
    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """Compute vectors ``[P, D]`` for a training step, differentiable in ``parameters``.

        Args:
            parameters: Parameters as made by `start`.
            matrix: E, ``[V, D]`` float32.
            allowed_ids: Mask of the tokens that a prompt may contain, ``[V]`` bool.
            temperature: Temperature of the distribution.
            generator: Generator of the noise, if any; ``None`` for torch's default generator.
        """

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """Compute vectors ``[P, D]`` for evaluation, without noise."""
        return self.train_vectors(parameters, matrix, allowed_ids, temperature)

    @abstractmethod
    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Compute the score of each token at each position, ``[P, V]``."""

    def tokens(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Return the discrete prompt, ``[P]`` or ``[B, P]``: the token with the highest score at each position."""
        return self.scores(parameters, matrix, allowed_ids).argmax(-1)


class ScoreRelaxation(Relaxation):
    """Parameters are scores Z ``[P, V]``, or ``[B, P, V]`` with one prompt per question, which gives ``[B, P, D]``."""

    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """See `Relaxation`."""
        scores = torch.zeros(len(ids), len(matrix), device=matrix.device)
        return scores.scatter_(1, ids[:, None], init_logit)

    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Return Z, with masked scores for tokens that are not allowed."""
        return masked(parameters, allowed_ids)


@dataclass(frozen=True)
class Softmax(ScoreRelaxation):
    """``softmax(Z / tau) E``: the expected embedding under a distribution that sharpens as tau falls.

    >>> matrix, allowed_ids = torch.eye(3), torch.tensor([True, True, False])
    >>> Softmax().train_vectors(torch.zeros(1, 3), matrix, allowed_ids, temperature=1.0)
    tensor([[0.5000, 0.5000, 0.0000]])
    """

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return float32_product(torch.softmax(masked(parameters, allowed_ids) / temperature, -1), matrix)


@dataclass(frozen=True)
class GumbelSoftmax(ScoreRelaxation):
    """``softmax((Z + noise * g) / tau) E`` with Gumbel noise g (Jang et al. 2017): a sample instead of the mean.

    Attributes:
        noise: Scale of the noise; 1 samples from ``softmax(Z)`` as tau goes to 0.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        """Check the scale."""
        check_finite("noise", self.noise)

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return float32_product(self.sample(parameters, allowed_ids, temperature, generator), matrix)

    def sample(self, parameters: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None) -> Tensor:
        """Sample weights ``[P, V]`` over the tokens."""
        scores = masked(parameters, allowed_ids)
        return torch.softmax((scores + self.noise * gumbel_like(scores, generator)) / temperature, -1)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """See `Relaxation`; the softmax without noise."""
        return Softmax().train_vectors(parameters, matrix, allowed_ids, temperature)


@dataclass(frozen=True)
class StraightThrough(ScoreRelaxation):
    """Argmax in the forward pass, gradient of the softmax in the backward pass (Bengio et al. 2013).

    With noise, the forward pass is a hard Gumbel-softmax sample.

    Attributes:
        noise: Scale of the Gumbel noise; 0 for none.
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the scale."""
        check_finite("noise", self.noise)

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        scores = masked(parameters, allowed_ids)
        if self.noise:
            scores = scores + self.noise * gumbel_like(scores, generator)
        soft = float32_product(torch.softmax(scores / temperature, -1), matrix)
        return _forward_backward(matrix[scores.argmax(-1)], soft)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """See `Relaxation`; the vectors of the softmax."""
        return Softmax().train_vectors(parameters, matrix, allowed_ids, temperature)


@dataclass(frozen=True)
class Argmax(ScoreRelaxation):
    """Argmax without an estimator: a control that does not learn, because the derivative of the argmax is zero.

    Every parameter has a gradient of exactly zero, instead of none.
    """

    passes_gradient: ClassVar[bool] = False

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return matrix[self.tokens(parameters, matrix, allowed_ids)] + 0 * parameters.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Projected(Relaxation):
    """PEZ (Wen et al. 2023): train vectors, run their nearest tokens, and pass the gradient straight through.

    Parameters are vectors ``[P, D]``. The nearest token has the highest cosine similarity. The temperature is unused.
    """

    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """Return the embeddings of the tokens; ``init_logit`` is unused."""
        return matrix[ids].clone()

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return _forward_backward(matrix[self.tokens(parameters, matrix, allowed_ids)], parameters)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """Return the vectors."""
        return parameters

    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Compute cosine similarities to the embeddings; -2 for tokens that are not allowed."""
        similarity = float32_product(
            functional.normalize(parameters.detach(), dim=-1), functional.normalize(matrix, dim=-1).T
        )
        return similarity.masked_fill(~allowed_ids, -2.0)


def masked(scores: Tensor, allowed_ids: Tensor) -> Tensor:
    """Convert scores ``[..., V]`` to float32 and mask the tokens that are not allowed."""
    return scores.float().masked_fill(~allowed_ids, MASKED)


def float32_product(weights: Tensor, matrix: Tensor) -> Tensor:
    """Multiply in float32 where mixed precision would not: training and the choice of tokens must agree."""
    with torch.autocast(weights.device.type, enabled=False):
        return weights @ matrix


def gumbel_like(scores: Tensor, generator: Noise = None) -> Tensor:
    """Draw finite standard Gumbel noise on the CPU, so that it is the same for every device.

    Args:
        scores: A tensor with the shape, the dtype and the device of the noise.
        generator: Generator on the CPU; ``None`` for torch's default generator.
    """
    part, drawn = slice(0, len(scores)), len(scores)
    if isinstance(generator, PartNoise):
        part, drawn = slice(generator.start, generator.start + len(scores)), generator.total
        generator = generator.generator
    noise = torch.empty(drawn, *scores.shape[1:], dtype=scores.dtype, device="cpu").exponential_(generator=generator)
    noise = -noise[part].clamp_(min=torch.finfo(scores.dtype).tiny).log_()
    return to_device(noise, scores.device)


def _forward_backward(forward: Tensor, backward: Tensor) -> Tensor:
    """Return the value of ``forward`` with the gradient of ``backward``."""
    return forward + (backward - backward.detach())
