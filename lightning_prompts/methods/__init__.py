"""One thin LightningModule per method; each file opens with its paper and its triple."""

from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.methods.fixed_prompt import FixedPrompt
from lightning_prompts.methods.soft_prompt_tuning import SoftPromptTuning

__all__ = ["FixedPrompt", "PromptMethod", "SoftPromptTuning"]
