"""A stack of layers: the forward pass, and log-probabilities of texts under each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.answers import is_correct
from lightning_prompts.dln.cached_lm import CachedLM
from lightning_prompts.dln.layer import PlacedLayer
from lightning_prompts.lm.labels import split_by_labels
from lightning_prompts.types import Example


@dataclass(frozen=True)
class Answer:
    """An answer of the network.

    Attributes:
        text: Name of the class, or the generated text.
        right: Whether the answer agrees with the reference.
    """

    text: str
    right: bool


class LanguageNetwork:
    """``N`` layers; the first reads the input, the top one writes the answer.

    Args:
        layers: The layers, in order.
        lms: The LM of each layer; layers may share one object.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    def __init__(self, layers: Sequence[PlacedLayer], lms: Sequence[CachedLM], max_new_tokens: int) -> None:
        """Keep the layers."""
        self.layers, self.lms = list(layers), list(lms)
        self.max_new_tokens = max_new_tokens

    @property
    def top(self) -> PlacedLayer:
        """The layer that answers."""
        return self.layers[-1]

    def sample_hidden(self, examples: Sequence[Example], prompts: Sequence[str]) -> list[list[str]]:
        """Generate the hidden texts of all layers but the top one, ``[N - 1][B]``, at temperature 0."""
        hidden: list[list[str]] = []
        below = [""] * len(examples)
        for layer, lm, prompt in zip(self.layers[:-1], self.lms, prompts, strict=False):
            placed = [layer.place(example, text) for example, text in zip(examples, below, strict=True)]
            below = lm.write(placed, prompt, layer.settings.max_new_tokens)
            hidden.append(below)
        return hidden

    def place_top(self, examples: Sequence[Example], hidden: Sequence[Sequence[str]]) -> list[Example]:
        """Place examples in the top layer, which reads the texts of the layer below."""
        below = hidden[-1] if hidden else [""] * len(examples)
        return [self.top.place(example, text) for example, text in zip(examples, below, strict=True)]

    def answer(
        self, examples: Sequence[Example], hidden: Sequence[Sequence[str]], prompts: Sequence[str]
    ) -> list[Answer]:
        """Return the answers to ``B`` examples, with hidden texts ``[N - 1][B]`` and the prompt of each layer."""
        return self.answers(self.place_top(examples, hidden), prompts[-1:])[0]

    def answers(self, placed: Sequence[Example], prompts: Sequence[str]) -> list[list[Answer]]:
        """Return the answers of the top layer: the likeliest class, or without classes a text at temperature 0.

        Args:
            placed: ``B`` examples as the top layer reads them.
            prompts: ``C`` candidates for the layer's prompt.

        Returns:
            ``[C][B]`` answers.
        """
        labelled, free = split_by_labels(placed)
        found: list[dict[int, Answer]] = [{} for _ in prompts]
        if labelled:
            chosen = self.lms[-1].class_log_probs([placed[b] for b in labelled], prompts).argmax(-1).tolist()
            for mine, labels in zip(found, chosen, strict=True):
                for b, label in zip(labelled, labels, strict=True):
                    mine[b] = Answer(placed[b].labels[label][0], label == placed[b].label)
        if free:
            for mine, prompt in zip(found, prompts, strict=True):
                texts = self.lms[-1].write([placed[b] for b in free], prompt, self.max_new_tokens)
                for b, text in zip(free, texts, strict=True):
                    mine[b] = Answer(text, bool(is_correct(placed[b], text)))
        return [[mine[b] for b in range(len(placed))] for mine in found]

    def answer_log_probs(
        self, placed: Sequence[Example], prompts: Sequence[str], block: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the top layer's log-probabilities of the reference answers: of a class, or per token of free text.

        Args:
            placed: ``B`` examples as the top layer reads them.
            prompts: ``C`` candidates for the layer's prompt.
            block: Number of neighbouring examples with the same input.

        Returns:
            ``[C, B]``, and the log-probabilities of all classes ``[C, B, Y]`` if all examples have classes.
        """
        lm = self.lms[-1]
        labelled, free = split_by_labels(placed)  # all examples of a block are of one kind, so blocks stay whole
        result = torch.empty(len(prompts), len(placed), dtype=torch.double, device="cpu")
        classes = None
        if labelled:
            classes = lm.class_log_probs([placed[b] for b in labelled], prompts, block)
            wanted = torch.tensor([placed[b].label for b in labelled], device="cpu")
            result[:, labelled] = classes.gather(-1, wanted.expand(len(prompts), -1)[..., None])[..., 0]
        if free:
            texts = [[str(placed[b].answer)] for b in free]
            result[:, free] = lm.log_probs([placed[b] for b in free], prompts, texts, block)[..., 0]
        return result, None if free else classes

    def hidden_log_probs(
        self,
        index: int,
        placed: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        block: int = 1,
    ) -> Tensor:
        """Compute mean log-probabilities per token ``[C, B, K]`` of texts ``[B][K]`` under hidden layer ``index``."""
        spaced = [
            [f"{self._space(example)}{text}" if text else "" for text in several]
            for example, several in zip(placed, texts, strict=True)
        ]
        return self.lms[index].log_probs(placed, prompts, spaced, block)

    @staticmethod
    def _space(example: Example) -> str:
        """Return the space before a text, which follows a word; in a chat, the text starts a turn without it."""
        return "" if example.chat else " "
