"""Draws of hidden texts that explain an answer, from an approximate posterior (section 4.2 of the paper)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lightning_prompts.dln.cached_lm import CachedLM
from lightning_prompts.dln.layer import PlacedLayer
from lightning_prompts.dln.sharpening import Sharpening, SoftmaxSharpening
from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.types import Example


@dataclass(frozen=True)
class LatentSample:
    """The context of a latent sample: the inputs of a draw of a hidden text.

    Attributes:
        example: Example of the task.
        below: Text of the layer below.
        draft: The layer's own text in the forward pass.
        target: The text that should follow: the answer, or the best draw of the layer above.
        right: Whether the network's answer was right.
        next_prompt: Prompt of the layer above.
    """

    example: Example
    below: str
    draft: str
    target: str
    right: bool
    next_prompt: str


class PosteriorTemplate(ABC):
    """A way to ask for a hidden text."""

    @abstractmethod
    def place(self, layer: PlacedLayer, prompt: str, sample: LatentSample) -> tuple[Example, str]:
        """Return the example for the LM, with an open prompt slot, and the prompt that fills it."""


@dataclass(frozen=True)
class PriorTemplate(PosteriorTemplate):
    """The unchanged layer; it does not see the target."""

    def place(self, layer: PlacedLayer, prompt: str, sample: LatentSample) -> tuple[Example, str]:
        """See `PosteriorTemplate`."""
        return layer.place(sample.example, sample.below), prompt


@dataclass(frozen=True)
class GivenAnswer(PosteriorTemplate):
    """The layer with the target after the input, or after the text of the layer below if it does not read the input.

    Attributes:
        text: Text after the input, with ``{target}`` for the target.
    """

    text: str = "\n\nGiven that the answer is:\n{target}"

    def __post_init__(self) -> None:
        """Check the setting."""
        if "{target}" not in self.text:
            raise UserError(f"GivenAnswer.text must have {{target}} in it, got {self.text!r}")

    def place(self, layer: PlacedLayer, prompt: str, sample: LatentSample) -> tuple[Example, str]:
        """See `PosteriorTemplate`."""
        hint = self.text.replace("{target}", sample.target)
        return layer.place(sample.example, sample.below, hint), prompt


@dataclass(frozen=True)
class EditThought(PosteriorTemplate):
    """B_h: the LM sees the draft and the target. It refines drafts that led to right answers, and fixes the others.

    Attributes:
        refine: The message for drafts with a right answer.
        fix: The message for others.
    """

    refine: str = "Rewrite the thoughts more clearly, so that the answer follows from them."
    fix: str = "Correct the thoughts, so that the answer follows from them."

    def place(self, layer: PlacedLayer, prompt: str, sample: LatentSample) -> tuple[Example, str]:
        """See `PosteriorTemplate`."""
        text = (
            f"What is asked for:\n{sample.next_prompt}\n\nThe problem:\n{layer.question(sample.example)}\n\n"
            f"Thoughts about it:\n{sample.draft}\n\nThe answer should be:\n{sample.target}\n\n"
            f"{self.refine if sample.right else self.fix}\n\nThoughts:"
        )
        placed = layer.place(sample.example, sample.below)
        return replace(placed, before="", after=text), ""


@dataclass(frozen=True)
class Posterior:
    """How hidden texts are drawn and weighed.

    Attributes:
        samples: ``K``, number of draws for each example.
        temperature: Sampling temperature of the draws; 0 for greedy texts.
        templates: Templates that the draws use in turn; ``None`` for `GivenAnswer` alone.
        sharpening: How draws are weighed.
    """

    samples: int = 5
    temperature: float = 0.7
    templates: Sequence[PosteriorTemplate] | None = None
    sharpening: Sharpening = field(default_factory=SoftmaxSharpening)

    def __post_init__(self) -> None:
        """Check the settings."""
        check_at_least("posterior.samples (K)", self.samples)
        if self.templates is not None and not self.templates:
            raise UserError("posterior.templates is empty; give PriorTemplate, GivenAnswer or EditThought")
        check_finite("posterior.temperature", self.temperature)

    def draw(
        self,
        layer: PlacedLayer,
        lm: CachedLM,
        prompt: str,
        samples: Sequence[LatentSample],
        generator: torch.Generator,
    ) -> list[list[str]]:
        """Draw hidden texts ``[B][K]``; some may be empty."""
        seeds = torch.randint(2**62, (len(samples), self.samples), generator=generator, device="cpu").tolist()
        drawn = [[""] * self.samples for _ in samples]
        templates = [GivenAnswer()] if self.templates is None else self.templates
        for start, template in enumerate(templates):
            places = list(range(start, self.samples, len(templates)))
            if not places:
                continue
            asked = [template.place(layer, prompt, sample) for sample in samples]
            texts = lm.draw(
                [example for example, _ in asked for _ in places],
                asked[0][1],
                layer.settings.max_new_tokens,
                self.temperature,
                [seeds[b][k] for b in range(len(samples)) for k in places],
                len(places),
            )
            for index, text in enumerate(texts):
                drawn[index // len(places)][places[index % len(places)]] = text
        return drawn
