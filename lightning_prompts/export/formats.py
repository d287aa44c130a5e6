"""What all export formats share: what they carry, and how the check scores through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prompts.errors import UserError
from lightning_prompts.export.base import BaseModel
from lightning_prompts.export.contents import Content, Kind, Updates
from lightning_prompts.export.run import RestoredRun
from lightning_prompts.lm import prompt_length, slot_length
from lightning_prompts.types import Example

CARRIERS: dict[Kind, str] = {
    "vectors": "peft, safetensors, npy or vllm",
    "keys and values": "peft, safetensors or npy",
    "weight updates": "peft",
    "text": "text",
}


@dataclass(frozen=True)
class Pieces:
    """An example as token ids, around the prompt slot.

    Attributes:
        before: In front of the slot, with what starts a sequence (BOS).
        after: Between the slot and the answer.
        answer: The answer's.
    """

    before: list[int]
    after: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Export:
    """What is exported, and what it is checked on.

    Attributes:
        run: The restored run.
        kind: What is exported.
        content: It.
        base: The model that it goes with.
        examples: The examples that the check scores.
        about: What ``prompt.json`` says.
    """

    run: RestoredRun
    kind: Kind
    content: Content
    base: BaseModel
    examples: Sequence[Example]
    about: Mapping[str, Any]

    def pieces(self, example: Example) -> Pieces:
        """An example's token ids as the run reads them; text in the slot of weight updates is part of ``after``."""
        encoder = self.run.method.lm.encoder
        if isinstance(self.content, Updates):
            ids = encoder.tokens(self.content.text)
            row = encoder.row(example, len(ids))
            return Pieces([], [ids[-1 - token] if token < 0 else token for token in row.context], row.answer)
        assert not isinstance(self.content, list)
        row = encoder.row(example, slot_length(self.content))
        if not slot_length(self.content):
            return Pieces([], row.context, row.answer)
        return Pieces(*row.around_slot(), row.answer)

    @property
    def length(self) -> int:
        """``P``."""
        assert not isinstance(self.content, list | Updates)
        return prompt_length(self.content)

    @torch.no_grad()
    def our_nll(self) -> list[float]:
        """Nats per answer token of each example, by the run itself."""
        method = self.run.method
        prepared = method.prepare(self.examples)
        return [float(nll) for nll in method.lm.score(prepared, method.prompt_for(self.examples)).nll]


class Format(ABC):
    """A kind of folder that other programs read."""

    name: ClassVar[str]
    title: ClassVar[str]  # for the model card
    library: ClassVar[str]  # the hub's word for what reads it
    kinds: ClassVar[tuple[Kind, ...]]

    def check_kind(self, method: str, kind: Kind) -> None:
        """Refuse what this format cannot carry.

        Raises:
            UserError: It says which format can.
        """
        if kind not in self.kinds:
            raise UserError(
                f"{method} has {kind} to export, which --format {self.name} cannot carry; --format {CARRIERS[kind]} can"
            )

    def check(self, export: Export) -> None:
        """Refuse what this format cannot carry of a restored run."""
        del export

    @abstractmethod
    def write(self, export: Export, folder: Path) -> None:
        """Write the files, without ``prompt.json`` and the model card."""

    @abstractmethod
    def nll(self, export: Export, folder: Path) -> list[float]:
        """Nats per answer token of each example, through the files as they are read back, one example at a time."""

    @abstractmethod
    def usage(self, export: Export, name: str) -> str:
        """How to use the folder, called ``name``, in Markdown."""


def answer_nll(logits: Tensor, answer: Sequence[int]) -> float:
    """Mean negative log-likelihood of an answer that ends a text.

    Args:
        logits: ``[T, V]`` of a text with the answer at its end.
        answer: The answer's token ids.
    """
    predicted = logits[-len(answer) - 1 : -1].float()
    return float(functional.cross_entropy(predicted, torch.tensor(answer, device="cpu")))
