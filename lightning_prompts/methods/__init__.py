"""One thin LightningModule per method; each file starts with its paper, prompt, estimator and objective."""

from lightning_prompts.methods.ape import Ape
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.methods.capo import Capo
from lightning_prompts.methods.chain_of_thought import ChainOfThought
from lightning_prompts.methods.deep_language_network import DeepLanguageNetwork
from lightning_prompts.methods.demonstration_search import DemonstrationSearch
from lightning_prompts.methods.few_shot import FewShot
from lightning_prompts.methods.fixed_prompt import FixedPrompt
from lightning_prompts.methods.gepa import Gepa
from lightning_prompts.methods.hard_prompt_search import HardPromptSearch
from lightning_prompts.methods.latent_seek import LatentSeek
from lightning_prompts.methods.lora_tuning import LoraTuning
from lightning_prompts.methods.prefix_tuning import PrefixTuning
from lightning_prompts.methods.prompt_distillation import PromptDistillation
from lightning_prompts.methods.refiner_tuning import RefinerTuning
from lightning_prompts.methods.reinforce_refiner import ReinforceRefiner
from lightning_prompts.methods.relaxed_prompt_tuning import RelaxedPromptTuning
from lightning_prompts.methods.scratch_transformer import ScratchTransformer
from lightning_prompts.methods.soft_prompt_tuning import SoftPromptTuning

__all__ = [
    "Ape",
    "Capo",
    "ChainOfThought",
    "DeepLanguageNetwork",
    "DemonstrationSearch",
    "FewShot",
    "FixedPrompt",
    "Gepa",
    "HardPromptSearch",
    "LatentSeek",
    "LoraTuning",
    "PrefixTuning",
    "PromptDistillation",
    "PromptMethod",
    "RefinerTuning",
    "ReinforceRefiner",
    "RelaxedPromptTuning",
    "ScratchTransformer",
    "SoftPromptTuning",
]
