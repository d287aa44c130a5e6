"""The frozen language model: load, quantise, embed, score answers over a shared prefix, generate."""

from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.frozen import FrozenLM, Scores
from lightning_prompts.lm.key_values import KeyValues, Prompt, prompt_length, slot_length

__all__ = ["FrozenLM", "KeyValues", "LMConfig", "Prompt", "Scores", "prompt_length", "slot_length"]
