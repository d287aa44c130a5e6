"""The exportable results of methods: vectors, keys and values, weight updates, or texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.export.texts import Step, steps_of
from lightning_prompts.lm import KeyValues
from lightning_prompts.methods import (
    FixedPrompt,
    LoraTuning,
    PrefixTuning,
    PromptDistillation,
    PromptMethod,
    ReinforceRefiner,
    ScratchTransformer,
)
from lightning_prompts.methods.discrete import DiscretePromptMethod
from lightning_prompts.methods.text_prompts import TextPromptMethod

Kind = Literal["vectors", "keys and values", "weight updates", "text"]


@dataclass(frozen=True)
class Updates:
    """Low-rank updates of the LM's weights.

    Attributes:
        tensors: The tensors by their names in PEFT.
        config: The configuration of PEFT.
        text: The text in the prompt slot.
    """

    tensors: Mapping[str, Tensor]
    config: Any
    text: str


Content: TypeAlias = Tensor | KeyValues | Updates | list[Step]


def kind_of(method: PromptMethod) -> Kind:
    """Return the kind of a method's result, before anything is loaded.

    Raises:
        UserError: The result is not a single prompt, or cannot be checked.
    """
    name = type(method).__name__
    lms = method.layer_lms if isinstance(method, TextPromptMethod) else [method.lm_config]
    remote = next((config for config in lms if config.server is not None), None)
    if remote is not None:
        raise UserError(
            f"{remote.name} is behind a server, so its texts cannot be checked; they are in prompt.txt of the run"
        )
    if isinstance(method, ScratchTransformer):
        raise UserError(f"{name} has no prompt to export, because it trains its own model")
    one_for_all = isinstance(method, ReinforceRefiner) and method.network is None
    if type(method).prompt_for is not PromptMethod.prompt_for and not one_for_all:
        raise UserError(
            f"{name} generates a prompt for each question, so there is no single prompt to export; use predict to "
            "answer questions, and see predictions.jsonl for the prompts"
        )
    if isinstance(method, LoraTuning):
        return "weight updates"
    if isinstance(method, PrefixTuning) or (isinstance(method, PromptDistillation) and method.student == "prefix"):
        return "keys and values"
    if isinstance(method, DiscretePromptMethod | FixedPrompt | TextPromptMethod) or one_for_all:
        return "text"
    return "text" if type(method).prompt_text is not PromptMethod.prompt_text else "vectors"


@torch.no_grad()
def content_of(method: PromptMethod, kind: Kind) -> Content:
    """Return the result of a restored method, with its reparametrisation merged."""
    if kind == "text":
        return steps_of(method)
    if isinstance(method, LoraTuning):
        return _updates(method)
    prompt = method.current_prompt()
    if isinstance(prompt, KeyValues):
        return KeyValues([(key.float().clone(), value.float().clone()) for key, value in prompt.layers])
    return prompt.float().clone()


def _updates(method: LoraTuning) -> Updates:
    tensors = {name: value.detach().float().clone() for name, value in method.by_peft_name().items()}
    return Updates(tensors, method.lm.model.peft_config["default"], method.text)
