"""One file per dataset; text only."""

from datamodules.addition import Addition
from datamodules.antonyms import Antonyms
from datamodules.base import TextDataModule
from datamodules.big_bench_hard import BigBenchHard
from datamodules.classification import Classification
from datamodules.competition_math import Math
from datamodules.gsm8k import GSM8K
from datamodules.hyperbaton import Hyperbaton
from datamodules.last_letters import LastLetters
from datamodules.letter_reversal import LetterReversal
from datamodules.mixture import Mixture
from datamodules.modular_product import ModularProduct
from datamodules.navigate import Navigate
from datamodules.openmathinstruct2 import OpenMathInstruct2
from datamodules.question_answer import QuestionAnswer
from datamodules.symbolic_sum import SymbolicSum
from datamodules.word_pairs import WordPairs

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
