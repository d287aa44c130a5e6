"""Self-study: the LM writes questions about a context, and answers them (Eyuboglu et al. 2025, section 4.1)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_prompts.datamodules.base import SourceRow, TextDataModule
from lightning_prompts.datamodules.splits import folded
from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.lm.encoding import unused_character
from lightning_prompts.randomness import run_seed
from lightning_prompts.types import Example

# Writes a text after each example, given the text in the slot, the maximum number of tokens and one seed per example.
Write: TypeAlias = Callable[[Sequence[Example], str, int, Sequence[int]], Sequence[str]]
Written: TypeAlias = list[Any]  # [question, answer], or [index of the training example, answer]


@dataclass(frozen=True)
class SelfStudy:
    """Training examples that the LM answers with the context in front, and whose questions it may write itself.

    They are written once, before training, and checkpoints contain them.

    Attributes:
        questions: ``written`` for questions that the LM samples after the context, in the form of the template;
            ``data`` for those of the training split, drawn by the run's seed.
        size: Number of questions. Fewer remain if the LM writes some twice, or writes those of validation or test.
        instruction: Text between the context and a question to be written.
        temperature: Temperature of the samples.
        max_question_tokens: Maximum length of a written question, in tokens.
    """

    questions: Literal["written", "data"] = "written"
    size: int = 256
    instruction: str = ""
    temperature: float = 1.0
    max_question_tokens: int = 64

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.questions not in ("written", "data"):
            raise UserError(f"self_study.questions must be written or data, got {self.questions!r}")
        for name in ("size", "max_question_tokens"):
            check_at_least(f"self_study.{name}", getattr(self, name))
        check_finite("self_study.temperature", self.temperature, above=True)

    def study(self, data: TextDataModule, text: str, max_new_tokens: int, write: Write) -> list[Written]:
        """Write questions, if wanted, and answers.

        Args:
            data: The data, with the template.
            text: The text in the prompt slot.
            max_new_tokens: Maximum length of an answer, in tokens.
            write: Samples texts with the context in front.

        Raises:
            UserError: The template has other fields than the question, or the LM writes nothing.
        """
        asked: list[Any]
        if self.questions == "data":
            rows = range(len(data.examples("train")))
            asked = sorted(random.Random(run_seed()).sample(rows, min(self.size, len(rows))))
        else:
            asked = self._questions(data, text, write)
        seeds = _seeds(2, len(asked))
        answers = write([self.example(data, question, None) for question in asked], text, max_new_tokens, seeds)
        pairs: list[Written] = [[question, answer] for question, answer in zip(asked, answers, strict=True) if answer]
        if not pairs:
            raise UserError("self_study: the LM writes no question with an answer; give self_study.instruction")
        return pairs

    def example(self, data: TextDataModule, question: str | int, answer: str | None) -> Example:
        """Return the example of a question and an answer of `study`."""
        if isinstance(question, str):
            return data.render(SourceRow({"question": question, "answer": answer}, "a written question"))
        train = data.examples("train")
        if question >= len(train):
            raise UserError(
                f"self_study has an answer to training example {question + 1}, and the data has {len(train)} now; "
                "resume with the same training data"
            )
        example = train[question]
        if answer is None:
            return replace(example, answer=None)
        known = example.answer or ""
        space = known[: len(known) - len(known.lstrip())]
        return replace(example, answer=f"{space}{answer}", reference=answer, labels=())

    def _questions(self, data: TextDataModule, text: str, write: Write) -> list[str]:
        if getattr(data, "own_templates", False):
            raise UserError("self_study needs one template for all datasets; set data.template")
        mark = unused_character(data.template.text)
        shown = data.render(SourceRow({"question": mark, "answer": None}, "self_study"))
        head, found, tail = f"{shown.before}{text}{shown.after}".partition(mark)
        if not found:
            raise UserError("self_study writes questions, and data.template has no {question}")
        # In a chat, the model's turn is the question. Tokens of words begin with their space.
        before = self.instruction if shown.chat else f"{self.instruction}{head.rstrip(' ')}"
        end = "" if shown.chat else tail.strip()
        asking = replace(shown, before=before, after="", answer=None, stop=re.escape(end) if end else r"\n")
        texts = write([asking] * self.size, "", self.max_question_tokens, _seeds(1, self.size))  # `before` has `text`
        held_out = {folded(example.question) for split in data.held_out() for example in data.examples(split)}
        known: dict[str, str] = {}
        for text in texts:
            known.setdefault(folded(text), text)
        return [text for key, text in known.items() if text and key not in held_out]


def _seeds(kind: int, count: int) -> list[int]:
    """Make seeds that follow the run's seed, different for each kind."""
    return [(run_seed() * 1_000_003 + kind * 500_009 + index) % 2**63 for index in range(count)]
