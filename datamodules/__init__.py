"""One file per dataset; text only."""

from datamodules.antonyms import Antonyms
from datamodules.base import TextDataModule
from datamodules.question_answer import QuestionAnswer

__all__ = ["Antonyms", "QuestionAnswer", "TextDataModule"]
