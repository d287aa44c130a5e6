"""The interface of export formats, and the contents of an export."""

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
    """Token ids of an example around the prompt slot.

    Attributes:
        before: Tokens before the slot, including those that start a sequence (BOS).
        after: Tokens between the slot and the answer.
        answer: Tokens of the answer.
    """

    before: list[int]
    after: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Export:
    """An export, and the examples to check it.

    Attributes:
        run: The restored run.
        kind: Kind of the exported result.
        content: The exported result.
        base: The base model.
        examples: The examples that the check scores.
        about: The contents of ``prompt.json``.
    """

    run: RestoredRun
    kind: Kind
    content: Content
    base: BaseModel
    examples: Sequence[Example]
    about: Mapping[str, Any]

    def pieces(self, example: Example) -> Pieces:
        """Encode an example as the run does; for weight updates, the text in the prompt slot is part of ``after``."""
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
        """Compute the NLL of each example with the run, in nats per answer token."""
        method = self.run.method
        prepared = method.prepare(self.examples)
        return [float(nll) for nll in method.lm.score(prepared, method.prompt_for(self.examples)).nll]


class Format(ABC):
    """A format of exported folders."""

    name: ClassVar[str]
    title: ClassVar[str]  # for the model card
    library: ClassVar[str]  # library name on the hub
    kinds: ClassVar[tuple[Kind, ...]]

    def check_kind(self, method: str, kind: Kind) -> None:
        """Check that the format supports a kind of result.

        Raises:
            UserError: The format does not; the message lists formats that do.
        """
        if kind not in self.kinds:
            raise UserError(
                f"--format {self.name} does not support the {kind} of {method}; use --format {CARRIERS[kind]}"
            )

    def check(self, export: Export) -> None:
        """Raise a `UserError` if the format does not support a restored run."""
        del export

    @abstractmethod
    def write(self, export: Export, folder: Path) -> None:
        """Write the files, without ``prompt.json`` and the model card."""

    @abstractmethod
    def nll(self, export: Export, folder: Path) -> list[float]:
        """Compute the NLL of each example with the files read back from disk, in nats per answer token."""

    @abstractmethod
    def usage(self, export: Export, name: str) -> str:
        """Explain in Markdown how to use the folder ``name``."""


def answer_nll(logits: Tensor, answer: Sequence[int]) -> float:
    """Compute the mean negative log-likelihood of an answer at the end of a text, in nats per token.

    Args:
        logits: Logits ``[T, V]`` of the text including the answer.
        answer: Token ids of the answer.
    """
    predicted = logits[-len(answer) - 1 : -1].float()
    return float(functional.cross_entropy(predicted, torch.tensor(answer, device="cpu")))
