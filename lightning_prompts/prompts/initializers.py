"""Initialisers of soft prompts and prefixes.

Initialisation and learning rate dominate the quality of prompt tuning. Each initialiser is a class with typed settings:
``--model.init FromText --model.init.text " antonyms"``. To add an initialiser, subclass `Initializer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, KeyValues
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.randomness import run_seed


class Initializer(ABC):
    """Makes the initial vectors of a soft prompt, or the initial keys and values of a prefix."""

    @abstractmethod
    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """Make the initial prompt.

        Args:
            lm: The frozen language model.
            length: ``P``.

        Returns:
            ``[P, D]`` float32.
        """

    def key_values(self, lm: FrozenLM, length: int) -> KeyValues:
        """Make the initial prefix: the LM's keys and values of the initial vectors.

        Args:
            lm: The frozen language model.
            length: ``P``.
        """
        return lm.key_values(self(lm, length))


@dataclass(frozen=True)
class VocabNormal(Initializer):
    """Normal noise with the mean and the standard deviation of E in each dimension."""

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`."""
        matrix = lm.embedding_matrix().float()
        noise = torch.randn(length, lm.width, generator=_generator(), device="cpu").to(matrix.device)
        return matrix.mean(0) + noise * matrix.std(0)


@dataclass(frozen=True)
class RandomTokens(Initializer):
    """Random rows of E (Lester et al. 2021, section 3.2, "sampled vocabulary")."""

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`."""
        generator = _generator()
        named = set(lm.tokenizer.all_special_ids)
        drawable = [token for token in range(min(len(lm.tokenizer), lm.vocabulary)) if token not in named]
        allowed_ids = allowed_tokens(lm).tolist()

        def draw(count: int) -> list[int]:
            indices = torch.randint(len(drawable), (count,), generator=generator, device="cpu")
            return [drawable[index] for index in indices.tolist()]

        chosen = draw(length)
        while wrong := [place for place, token in enumerate(chosen) if not allowed_ids[token]]:
            chosen[wrong[0]] = draw(1)[0]  # redraw one by one, so that the other tokens keep their value for the seed
        return lm.embed(to_device(chosen, lm.device)).detach().float()


@dataclass(frozen=True)
class FromText(Initializer):
    """The embeddings of a phrase, repeated or truncated to the length of the prompt.

    Attributes:
        text: The phrase, including its leading space.
    """

    text: str

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`."""
        ids = self.token_ids(lm)
        return lm.embed(ids.repeat(-(-length // len(ids)))[:length]).detach().float()

    def token_ids(self, lm: FrozenLM) -> Tensor:
        """Tokenise the phrase into ids ``[P]``."""
        return text_ids(lm, self.text)


@dataclass(frozen=True)
class Hybrid(Initializer):
    """The embeddings of a phrase, followed by `VocabNormal` vectors.

    Attributes:
        text: The phrase, including its leading space.
    """

    text: str

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`."""
        start = lm.embed(text_ids(lm, self.text)[:length]).detach().float()
        return torch.cat([start, VocabNormal()(lm, length)[len(start) :]])


@dataclass(frozen=True)
class Zeros(Initializer):
    """All zeros."""

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`."""
        return torch.zeros(length, lm.width, device=lm.device)


def text_ids(lm: FrozenLM, text: str) -> Tensor:
    """Tokenise a phrase inside a text into ids ``[P]``.

    Raises:
        UserError: The phrase has no tokens.
    """
    ids = lm.token_ids(text)
    if not len(ids):
        raise UserError("the initial text is empty; give it at least one word, for example ' antonyms'")
    return ids


def _generator() -> torch.Generator:
    """Make the generator of an initialiser."""
    return torch.Generator().manual_seed(run_seed())
