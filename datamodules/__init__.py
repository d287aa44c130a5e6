"""One file per dataset; text only."""

from datamodules.addition import Addition
from datamodules.antonyms import Antonyms
from datamodules.base import TextDataModule
from datamodules.last_letters import LastLetters
from datamodules.letter_reversal import LetterReversal
from datamodules.modular_product import ModularProduct
from datamodules.question_answer import QuestionAnswer
from datamodules.symbolic_sum import SymbolicSum

__all__ = [
    "Addition",
    "Antonyms",
    "LastLetters",
    "LetterReversal",
    "ModularProduct",
    "QuestionAnswer",
    "SymbolicSum",
    "TextDataModule",
]
