"""Layers one above the other: the forward pass, and what each layer thinks of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.answers import is_correct
from lightning_prompts.dln.layer import PlacedLayer
from lightning_prompts.dln.reader import Reader
from lightning_prompts.types import Example


@dataclass(frozen=True)
class Answer:
    """What the network answers.

    Attributes:
        text: The class's name, or the generated text.
        right: Whether it is the reference's.
    """

    text: str
    right: bool


class LanguageNetwork:
    """``N`` layers; the first reads the input, the top one writes the answer.

    Args:
        layers: In order.
        readers: The LM of each; the same object where layers share one.
        max_new_tokens: How long an answer in free text may get.
    """

    def __init__(self, layers: Sequence[PlacedLayer], readers: Sequence[Reader], max_new_tokens: int) -> None:
        """Nothing is run yet."""
        self.layers, self.readers = list(layers), list(readers)
        self.max_new_tokens = max_new_tokens

    @property
    def top(self) -> PlacedLayer:
        """The layer that answers."""
        return self.layers[-1]

    def think(self, examples: Sequence[Example], prompts: Sequence[str]) -> list[list[str]]:
        """The hidden texts of all layers but the top one, ``[N - 1][B]``, at temperature 0."""
        hidden: list[list[str]] = []
        below = [""] * len(examples)
        for layer, reader, prompt in zip(self.layers[:-1], self.readers, prompts, strict=False):
            placed = [layer.place(example, text) for example, text in zip(examples, below, strict=True)]
            below = reader.write(placed, prompt, layer.settings.max_new_tokens)
            hidden.append(below)
        return hidden

    def place_top(self, examples: Sequence[Example], hidden: Sequence[Sequence[str]]) -> list[Example]:
        """What the top layer reads."""
        below = hidden[-1] if hidden else [""] * len(examples)
        return [self.top.place(example, text) for example, text in zip(examples, below, strict=True)]

    def answer(
        self, examples: Sequence[Example], hidden: Sequence[Sequence[str]], prompts: Sequence[str]
    ) -> list[Answer]:
        """The answers: the likeliest class, or a text generated at temperature 0 where there are no classes."""
        placed = self.place_top(examples, hidden)
        if all(example.labels for example in examples):
            chosen = self.readers[-1].class_log_probs(placed, [prompts[-1]])[0].argmax(-1).tolist()
            return [Answer(e.labels[label][0], label == e.label) for e, label in zip(examples, chosen, strict=True)]
        texts = self.readers[-1].write(placed, prompts[-1], self.max_new_tokens)
        return [Answer(text, bool(is_correct(e, text))) for e, text in zip(examples, texts, strict=True)]

    def answer_log_probs(
        self, placed: Sequence[Example], prompts: Sequence[str], block: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """How likely the reference answers are to the top layer: of the class, or per token of free text.

        Args:
            placed: ``B`` examples as the top layer reads them.
            prompts: ``C`` candidates for its prompt.
            block: Every so many examples are about the same input.

        Returns:
            ``[C, B]``, and the log-probabilities of all classes ``[C, B, Y]`` where there are classes.
        """
        reader = self.readers[-1]
        if not all(example.labels for example in placed):
            return reader.log_probs(placed, prompts, [[str(example.answer)] for example in placed], block)[..., 0], None
        classes = reader.class_log_probs(placed, prompts, block)
        wanted = torch.tensor([example.label for example in placed])
        return classes.gather(-1, wanted.expand(len(prompts), -1)[..., None])[..., 0], classes

    def hidden_log_probs(
        self,
        index: int,
        placed: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        block: int = 1,
    ) -> Tensor:
        """Mean token log-probabilities of texts ``[B][K]`` that hidden layer ``index`` might write, ``[C, B, K]``."""
        spaced = [[f"{self._lead(example)}{text}" if text else "" for text in several]
                  for example, several in zip(placed, texts, strict=True)]  # fmt: skip
        return self.readers[index].log_probs(placed, prompts, spaced, block)

    @staticmethod
    def _lead(example: Example) -> str:
        """A written text follows a word; a turn of a chat starts with it."""
        return "" if example.chat else " "

    @property
    def calls(self) -> int:
        """Texts that the LMs have scored or written."""
        return sum(reader.calls for reader in {id(reader): reader for reader in self.readers}.values())
