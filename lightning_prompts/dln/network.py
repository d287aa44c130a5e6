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


def _by_kind(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """The places of examples with classes, and of those whose answer is free text."""
    labelled = [b for b, example in enumerate(examples) if example.labels]
    return labelled, [b for b, example in enumerate(examples) if not example.labels]


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
        labelled, free = _by_kind(examples)
        answers: dict[int, Answer] = {}
        if labelled:
            log_probs = self.readers[-1].class_log_probs([placed[b] for b in labelled], [prompts[-1]])[0]
            for b, label in zip(labelled, log_probs.argmax(-1).tolist(), strict=True):
                answers[b] = Answer(examples[b].labels[label][0], label == examples[b].label)
        if free:
            texts = self.readers[-1].write([placed[b] for b in free], prompts[-1], self.max_new_tokens)
            for b, text in zip(free, texts, strict=True):
                answers[b] = Answer(text, bool(is_correct(examples[b], text)))
        return [answers[b] for b in range(len(examples))]

    def answer_log_probs(
        self, placed: Sequence[Example], prompts: Sequence[str], block: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """How likely the reference answers are to the top layer: of the class, or per token of free text.

        Args:
            placed: ``B`` examples as the top layer reads them.
            prompts: ``C`` candidates for its prompt.
            block: Every so many examples are about the same input.

        Returns:
            ``[C, B]``, and the log-probabilities of all classes ``[C, B, Y]`` where all examples have classes.
        """
        reader = self.readers[-1]
        labelled, free = _by_kind(placed)  # a block is of one kind, so blocks stay whole
        result = torch.empty(len(prompts), len(placed), dtype=torch.double, device="cpu")
        classes = None
        if labelled:
            classes = reader.class_log_probs([placed[b] for b in labelled], prompts, block)
            wanted = torch.tensor([placed[b].label for b in labelled], device="cpu")
            result[:, labelled] = classes.gather(-1, wanted.expand(len(prompts), -1)[..., None])[..., 0]
        if free:
            texts = [[str(placed[b].answer)] for b in free]
            result[:, free] = reader.log_probs([placed[b] for b in free], prompts, texts, block)[..., 0]
        return result, None if free else classes

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
