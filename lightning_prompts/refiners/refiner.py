"""A Refiner: a learned prompt for the task, and what a network changes in it for each question."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prompts.errors import UserError
from lightning_prompts.randomness import from_run_seed
from lightning_prompts.refiners.heads import Head, Tied
from lightning_prompts.refiners.networks import RefinerNetwork


class VectorRefiner(nn.Module):
    """Prompts of vectors: ``base + scale * RMS(E) * tanh(delta(question))``.

    Bounded by the embeddings' own size, because a raw output leaves their range at the first steps and the LM with it.

    Args:
        base: Where the prompt starts, ``[P, D]``.
        size: RMS(E), the root mean square of the LM's embeddings.
        network: What reads the question.
        head: `Tied`; the others know no vectors.
        width: ``D`` of the hidden states.
        scale: How far a question may move the prompt, in units of ``size``.

    Raises:
        UserError: The head has no vectors.
    """

    def __init__(
        self, base: Tensor, size: float, network: RefinerNetwork, head: Head, width: int, scale: float
    ) -> None:
        """Start at ``base``, whatever the question."""
        super().__init__()
        if not isinstance(head, Tied):
            raise UserError(
                f"estimator Soft needs head: Tied, as {type(head).__name__} gives scores of tokens and no vectors; "
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
        """Prompts ``[B, P, D]`` from hidden states ``[B, T, D]`` float32 and their mask ``[B, T]``."""
        delta = self.head.vectors(self.network(states, mask))  # type: ignore[operator]
        return self.base + self.reach * torch.tanh(delta)


class ScoreRefiner(nn.Module):
    """Scores over tokens: ``base + delta(question)``, where E gives the tied head its directions, all of length one.

    Args:
        base: Initial scores ``[P, V]``.
        matrix: The embeddings of the tokens that are scored, ``[V, D]`` float32.
        network: What reads the question; ``None`` for one prompt for the task.
        head: How its features become scores.
        width: ``D`` of the hidden states.
    """

    directions: Tensor

    def __init__(self, base: Tensor, matrix: Tensor, network: RefinerNetwork | None, head: Head, width: int) -> None:
        """Start at ``base``, whatever the question."""
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
        """The embeddings of the tokens that are scored, ``[V, D]``."""
        self.directions.copy_(nn.functional.normalize(matrix, dim=-1))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[B, P, V]`` from hidden states ``[B, T, D]`` float32 and their mask ``[B, T]``."""
        if self.network is None or self.head is None:
            return self.base.expand(len(states), -1, -1)
        return self.base + self.head(self.network(states, mask), self.directions)  # type: ignore[no-any-return]


def part_sizes(refiner: nn.Module) -> dict[str, int]:
    """How many parameters the base, the network and the head have."""
    sizes: dict[str, int] = {}
    for name, parameter in refiner.named_parameters():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    return sizes
