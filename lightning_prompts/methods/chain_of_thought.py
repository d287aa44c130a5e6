"""Zero-shot chain of thought (Kojima et al. 2022): the LM writes its reasoning first, and then the answer.

Prompt: text. Estimator: none. Objective: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_prompts.errors import check_at_least, check_stop
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.labels import HIDDEN
from lightning_prompts.methods.fixed_prompt import FixedPrompt
from lightning_prompts.template import cut
from lightning_prompts.types import Example


class ChainOfThought(FixedPrompt):
    """Generates reasoning after ``trigger``, then scores and generates the answer after ``extraction``.

    Args:
        trigger: Text that makes the LM reason.
        extraction: Text that asks for the answer, after the reasoning.
        text: The prompt; ``None`` for the task's own instruction.
        reasoning_tokens: Maximum length of the reasoning, in tokens.
        reasoning_stop: Regular expression; the reasoning ends where it first matches.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    def __init__(
        self,
        trigger: str = "\nLet's think step by step.",
        extraction: str = "\nTherefore, the answer is",
        text: str | None = "",
        reasoning_tokens: int = 64,
        reasoning_stop: str = r"\n\n",
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Keep the settings."""
        super().__init__(text, lm, max_new_tokens)
        check_at_least("reasoning_tokens", reasoning_tokens)
        check_stop("reasoning_stop", reasoning_stop)
        self.trigger = trigger
        self.extraction = extraction
        self.reasoning_tokens = reasoning_tokens
        self.reasoning_stop = reasoning_stop

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """Generate the reasoning, and append it with ``extraction`` to the examples."""
        asked = [replace(example, after=example.after + self.trigger, stop=self.reasoning_stop) for example in examples]
        written = self.language_model.generate(asked, self.text, self.reasoning_tokens)
        return [
            replace(
                example,
                after=f"{example.after}{self.trigger} {reasoning}{self.extraction}",
                fields={**example.fields, HIDDEN: reasoning},
                # The answer now follows a word, so it needs a leading space, unless it starts a turn.
                answer=None if example.answer is None else f"{'' if example.chat else ' '}{example.answer.lstrip()}",
            )
            for example, reasoning in zip(examples, [cut(text, self.reasoning_stop) for text in written], strict=True)
        ]

    def added_tokens(self) -> int:
        """See `Evaluation`; the reasoning counts twice, because its text may have more tokens than were generated."""
        own = self.language_model.count(self.trigger) + self.language_model.count(self.extraction)
        return own + 2 * self.reasoning_tokens
