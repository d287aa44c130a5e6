"""From trainable scores over the vocabulary to vectors that a gradient can pass, and to tokens.

Everything is computed in float32, whatever the LM's precision. E is the embedding matrix ``[V, D]``.
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
    """The noise of one process's examples: that of the whole batch is drawn, so that no other draws the same.

    Attributes:
        generator: Of the whole batch's noise, the same in all processes.
        start: How many examples of the batch stand before this process's.
        total: How many the batch has.
    """

    generator: torch.Generator
    start: int
    total: int


Noise = torch.Generator | PartNoise | None
MASKED = -1e4  # a score that no temperature brings back; not -inf, whose gradient is not a number


class GradientEstimator(ABC):  # noqa: B024 - what estimators share is their role
    """How the learning signal gets from the LM's input to what is trained."""

    passes_gradient: ClassVar[bool] = True


@dataclass(frozen=True)
class Soft(GradientEstimator):
    """Plain backpropagation: the vectors that the LM reads are what is put out."""


class Relaxation(GradientEstimator):
    """What stands between a prompt's parameters and the LM while they are trained."""

    @abstractmethod
    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """Initial parameters.

        Args:
            ids: Tokens to start from, ``[P]``.
            matrix: E, ``[V, D]``.
            init_logit: How far the start favours them, in units of a score; 0 for not at all.
        """

    @abstractmethod
    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """Vectors ``[P, D]`` for a training step, with a gradient to ``parameters``.

        Args:
            parameters: As `start` makes them.
            matrix: E, ``[V, D]`` float32.
            allowed_ids: Which tokens a prompt may have, ``[V]`` bool.
            temperature: Of the distribution.
            generator: Of the noise, where there is some; ``None`` for torch's own.
        """

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """Vectors ``[P, D]`` for evaluation, without noise."""
        return self.train_vectors(parameters, matrix, allowed_ids, temperature)

    @abstractmethod
    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """How much each position wants each token, ``[P, V]``."""

    def tokens(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """The discrete prompt, ``[P]`` or ``[B, P]``: the token that each position wants most."""
        return self.scores(parameters, matrix, allowed_ids).argmax(-1)


class ScoreRelaxation(Relaxation):
    """Parameters are scores Z ``[P, V]``; or ``[B, P, V]``, a prompt for each question, which gives ``[B, P, D]``."""

    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """See `Relaxation`."""
        scores = torch.zeros(len(ids), len(matrix), device=matrix.device)
        return scores.scatter_(1, ids[:, None], init_logit)

    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Z."""
        return masked(parameters, allowed_ids)


@dataclass(frozen=True)
class Softmax(ScoreRelaxation):
    """``softmax(Z / tau) E``: the mean embedding under a distribution that sharpens as tau falls.

    >>> matrix, allowed_ids = torch.eye(3), torch.tensor([True, True, False])
    >>> Softmax().train_vectors(torch.zeros(1, 3), matrix, allowed_ids, temperature=1.0)
    tensor([[0.5000, 0.5000, 0.0000]])
    """

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return torch.softmax(masked(parameters, allowed_ids) / temperature, -1) @ matrix


@dataclass(frozen=True)
class GumbelSoftmax(ScoreRelaxation):
    """``softmax((Z + noise * g) / tau) E``, g Gumbel noise (Jang et al. 2017): a sample instead of the mean.

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
        return self.sample(parameters, allowed_ids, temperature, generator) @ matrix

    def sample(self, parameters: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None) -> Tensor:
        """Weights ``[P, V]`` of one draw."""
        scores = masked(parameters, allowed_ids)
        return torch.softmax((scores + self.noise * gumbel_like(scores, generator)) / temperature, -1)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """Without noise."""
        return Softmax().train_vectors(parameters, matrix, allowed_ids, temperature)


@dataclass(frozen=True)
class StraightThrough(ScoreRelaxation):
    """The arg-max forward, the softmax's gradient backward (Bengio et al. 2013); with noise, a hard Gumbel sample.

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
        soft = torch.softmax(scores / temperature, -1) @ matrix
        return _forward_backward(matrix[scores.argmax(-1)], soft)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """The softmax's, as nothing else about this estimator is relaxed."""
        return Softmax().train_vectors(parameters, matrix, allowed_ids, temperature)


@dataclass(frozen=True)
class Argmax(ScoreRelaxation):
    """The arg-max, through which no gradient passes: a control that learns nothing, and shows why.

    Its derivative is zero wherever it has one. The gradient of every parameter is exactly that, and not missing.
    """

    passes_gradient: ClassVar[bool] = False

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return matrix[self.tokens(parameters, matrix, allowed_ids)] + 0 * parameters.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Projected(Relaxation):
    """PEZ (Wen et al. 2023): vectors are trained, their nearest tokens are run, the gradient passes as it is.

    Parameters are vectors ``[P, D]``; the temperature has no meaning. Nearest is by cosine similarity.
    """

    def start(self, ids: Tensor, matrix: Tensor, init_logit: float) -> Tensor:
        """The embeddings of the tokens; ``init_logit`` has no meaning here."""
        return matrix[ids].clone()

    def train_vectors(
        self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float, generator: Noise = None
    ) -> Tensor:
        """See `Relaxation`."""
        return _forward_backward(matrix[self.tokens(parameters, matrix, allowed_ids)], parameters)

    def relaxed_vectors(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor, temperature: float) -> Tensor:
        """The vectors themselves."""
        return parameters

    def scores(self, parameters: Tensor, matrix: Tensor, allowed_ids: Tensor) -> Tensor:
        """Cosine similarities."""
        similarity = functional.normalize(parameters.detach(), dim=-1) @ functional.normalize(matrix, dim=-1).T
        return similarity.masked_fill(~allowed_ids, -2.0)


def masked(scores: Tensor, allowed_ids: Tensor) -> Tensor:
    """Scores ``[..., V]`` in float32, those of tokens that may not be used out of reach."""
    return scores.float().masked_fill(~allowed_ids, MASKED)


def gumbel_like(scores: Tensor, generator: Noise = None) -> Tensor:
    """Standard Gumbel noise of the same shape, always finite; drawn on the CPU, the same for every device.

    Args:
        scores: For the shape, the dtype and the device.
        generator: On the CPU.
    """
    part, drawn = slice(0, len(scores)), len(scores)
    if isinstance(generator, PartNoise):
        part, drawn = slice(generator.start, generator.start + len(scores)), generator.total
        generator = generator.generator
    noise = torch.empty(drawn, *scores.shape[1:], dtype=scores.dtype, device="cpu").exponential_(generator=generator)
    noise = -noise[part].clamp_(min=torch.finfo(scores.dtype).tiny).log_()
    return to_device(noise, scores.device)


def _forward_backward(forward: Tensor, backward: Tensor) -> Tensor:
    """One tensor's value with another's gradient."""
    return forward + (backward - backward.detach())
