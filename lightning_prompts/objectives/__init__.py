"""What is good: objectives turn scores into a loss."""

from lightning_prompts.objectives.likelihood import Likelihood

__all__ = ["Likelihood"]
