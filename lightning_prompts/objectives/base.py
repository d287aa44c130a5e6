"""The interface of objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row


class Objective(ABC):
    """Computes a loss from the LM's predictions of the reference answers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the objective in the description of a method."""

    @property
    def with_end(self) -> bool:
        """Whether to score the text after the answers."""
        return False

    def check(self, lm: FrozenLM) -> None:
        """Raise a `UserError` if the objective does not support this LM."""
        del lm

    @abstractmethod
    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """Compute the scalar loss.

        Args:
            lm: The frozen language model.
            rows: ``B`` rows.
            logits: Logits of the answer and end tokens, ``[N, V]`` float32; see `FrozenLM.answer_logits`.
            scores: Scores from these logits, ``[B]``.
        """
