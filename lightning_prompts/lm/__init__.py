"""The frozen language model: load, quantise, embed, score answers over a shared prefix, generate."""

from lightning_prompts.lm.config import LMConfig, Server
from lightning_prompts.lm.frozen import FrozenLM
from lightning_prompts.lm.key_values import KeyValues, Prompt, prompt_length, slot_length
from lightning_prompts.lm.labels import LabelScores, label_scores
from lightning_prompts.lm.language_model import LanguageModel
from lightning_prompts.lm.remote import RemoteLM
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.scores import Scores, answer_scores
from lightning_prompts.lm.shape import LMShape, MemoryEstimate
from lightning_prompts.lm.state_store import Query, StateStore
from lightning_prompts.lm.usage import Usage

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
