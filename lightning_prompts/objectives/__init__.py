"""Objectives compute a loss from scores; rewards rate generated texts."""

from lightning_prompts.objectives.base import Objective
from lightning_prompts.objectives.bertscore import BertScoreLoss
from lightning_prompts.objectives.divergence import Divergence
from lightning_prompts.objectives.likelihood import Likelihood
from lightning_prompts.objectives.weighted_sum import WeightedSum

__all__ = ["BertScoreLoss", "Divergence", "Likelihood", "Objective", "WeightedSum"]
