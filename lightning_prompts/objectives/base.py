"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row


class Objective(ABC):
    """From what the LM says about the reference answers to a loss."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The third word of a method's triple."""

    @property
    def with_end(self) -> bool:
        """Whether what follows the answers is to be scored."""
        return False

    def check(self, lm: FrozenLM) -> None:
        """Raise a `UserError` if this LM cannot be trained for it."""
        del lm

    @abstractmethod
    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """The loss, a scalar.

        Args:
            lm: The frozen language model.
            rows: ``B`` rows.
            logits: ``[N, V]`` float32, which predict their answer and end tokens; see `FrozenLM.answer_logits`.
            scores: The same as scores, ``[B]``.
        """
