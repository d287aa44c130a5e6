"""The frozen language model: loading, quantisation, embedding, scoring over shared prefixes, generation.

Names are imported when they are first used, as most modules here import transformers, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prompts.lm.config import LMConfig, Server
    from lightning_prompts.lm.frozen import FrozenLM
    from lightning_prompts.lm.key_values import KeyValues, Prompt, prompt_length, slot_length
    from lightning_prompts.lm.labels import LabelScores, label_scores
    from lightning_prompts.lm.language_model import LanguageModel, Usage
    from lightning_prompts.lm.remote import RemoteLM
    from lightning_prompts.lm.sampling import Sampling
    from lightning_prompts.lm.scores import Scores, answer_scores
    from lightning_prompts.lm.shape import LMShape, MemoryEstimate
    from lightning_prompts.lm.state_store import Query, StateStore

__all__ = [
    "FrozenLM",
    "KeyValues",
    "LMConfig",
    "LMShape",
    "LabelScores",
    "LanguageModel",
    "MemoryEstimate",
    "Prompt",
    "Query",
    "RemoteLM",
    "Sampling",
    "Scores",
    "Server",
    "StateStore",
    "Usage",
    "answer_scores",
    "label_scores",
    "prompt_length",
    "slot_length",
]

_MODULES = {
    "FrozenLM": "frozen",
    "KeyValues": "key_values",
    "LMConfig": "config",
    "LMShape": "shape",
    "LabelScores": "labels",
    "LanguageModel": "language_model",
    "MemoryEstimate": "shape",
    "Prompt": "key_values",
    "Query": "state_store",
    "RemoteLM": "remote",
    "Sampling": "sampling",
    "Scores": "scores",
    "Server": "config",
    "StateStore": "state_store",
    "Usage": "language_model",
    "answer_scores": "scores",
    "label_scores": "labels",
    "prompt_length": "key_values",
    "slot_length": "key_values",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds under this name
    """Import a name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # so that this happens once
    return value
