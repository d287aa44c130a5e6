"""One file per dataset; text only."""

from lightning_prompts.datamodules.addition import Addition
from lightning_prompts.datamodules.antonyms import Antonyms
from lightning_prompts.datamodules.base import TextDataModule
from lightning_prompts.datamodules.big_bench_hard import BigBenchHard
from lightning_prompts.datamodules.classification import Classification
from lightning_prompts.datamodules.competition_math import Math
from lightning_prompts.datamodules.gsm8k import GSM8K
from lightning_prompts.datamodules.hyperbaton import Hyperbaton
from lightning_prompts.datamodules.last_letters import LastLetters
from lightning_prompts.datamodules.letter_reversal import LetterReversal
from lightning_prompts.datamodules.mixture import Mixture
from lightning_prompts.datamodules.modular_product import ModularProduct
from lightning_prompts.datamodules.navigate import Navigate
from lightning_prompts.datamodules.openmathinstruct2 import OpenMathInstruct2
from lightning_prompts.datamodules.question_answer import QuestionAnswer
from lightning_prompts.datamodules.symbolic_sum import SymbolicSum
from lightning_prompts.datamodules.word_pairs import WordPairs

__all__ = [
    "GSM8K",
    "Addition",
    "Antonyms",
    "BigBenchHard",
    "Classification",
    "Hyperbaton",
    "LastLetters",
    "LetterReversal",
    "Math",
    "Mixture",
    "ModularProduct",
    "Navigate",
    "OpenMathInstruct2",
    "QuestionAnswer",
    "SymbolicSum",
    "TextDataModule",
    "WordPairs",
]

if not __name__.startswith("lightning_prompts."):  # in a checkout; its classes would be there twice
    raise ImportError(f"import lightning_prompts.{__name__}")
