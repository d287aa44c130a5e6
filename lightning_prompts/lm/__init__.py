"""The frozen language model: load, quantise, embed, score answers over a shared prefix, generate."""

from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.frozen import FrozenLM, Scores

__all__ = ["FrozenLM", "LMConfig", "Scores"]
