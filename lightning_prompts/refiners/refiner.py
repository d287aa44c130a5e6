"""Refiners: a learned prompt for the task plus a change of a network for each question."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError
from lightning_prompts.randomness import from_run_seed
from lightning_prompts.refiners.heads import Head, Tied
from lightning_prompts.refiners.networks import RefinerNetwork


class VectorRefiner(nn.Module):
    """Prompts of vectors: ``base + scale * RMS(E) * tanh(delta(question))``.

    The change is bounded relative to the scale of the embeddings, because an unbounded output leaves their range in the
    first steps, and the LM then fails.

    Args:
        base: Initial prompt, ``[P, D]``.
        size: RMS(E), the root mean square of the LM's embeddings.
        network: The network that reads the question.
        head: `Tied`, the only head with vectors.
        width: ``D`` of the hidden states.
        scale: Largest change of the prompt for a question, in units of ``size``.

    Raises:
        UserError: The head has no vectors.
    """

    def __init__(
        self, base: Tensor, size: float, network: RefinerNetwork, head: Head, width: int, scale: float
    ) -> None:
        """Start at ``base`` for every question."""
        super().__init__()
        if not isinstance(head, Tied):
            raise UserError(
                f"estimator Soft needs head: Tied, because {type(head).__name__} has scores of tokens but no vectors; "
                "use it with StraightThrough or GumbelSoftmax"
            )
        self.register_buffer("initial", base.clone())
        self.base = nn.Parameter(base.clone())
        self.reach = scale * size
        with from_run_seed():
            self.network = network.build(width, len(base))
            self.head = head.build(network.features, len(base), base.shape[1], 0)
        self.to(base.device)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Compute prompts ``[B, P, D]`` from float32 hidden states ``[B, T, D]`` and their mask ``[B, T]``."""
        delta = self.head.vectors(self.network(states, mask))  # type: ignore[operator]
        return self.base + self.reach * torch.tanh(delta)


class ScoreRefiner(nn.Module):
    """Scores over tokens: ``base + delta(question)``. The tied head uses the normalised rows of E as directions.

    Args:
        base: Initial scores ``[P, V]``.
        matrix: Embeddings of the scored tokens, ``[V, D]`` float32.
        network: The network that reads the question; ``None`` for one prompt for the task.
        head: The head that computes scores from features.
        width: ``D`` of the hidden states.
    """

    directions: Tensor

    def __init__(self, base: Tensor, matrix: Tensor, network: RefinerNetwork | None, head: Head, width: int) -> None:
        """Start at ``base`` for every question."""
        super().__init__()
        self.base = nn.Parameter(base.clone())
        self.register_buffer("directions", torch.empty_like(matrix), persistent=False)
        self.set_matrix(matrix)
        length, vocabulary = base.shape
        self.network = self.head = None
        if network is not None:
            with from_run_seed():
                self.network = network.build(width, length)
                self.head = head.build(network.features, length, matrix.shape[1], vocabulary)
        self.to(base.device)

    def set_matrix(self, matrix: Tensor) -> None:
        """Set the embeddings of the scored tokens, ``[V, D]``."""
        self.directions.copy_(nn.functional.normalize(matrix, dim=-1))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Compute scores ``[B, P, V]`` from float32 hidden states ``[B, T, D]`` and their mask ``[B, T]``."""
        if self.network is None or self.head is None:
            return self.base.expand(len(states), -1, -1)
        return self.base + self.head(self.network(states, mask), self.directions)  # type: ignore[no-any-return]


def part_sizes(refiner: nn.Module) -> dict[str, int]:
    """Count the parameters of the base, the network and the head."""
    sizes: dict[str, int] = {}
    for name, parameter in refiner.named_parameters():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    return sizes
