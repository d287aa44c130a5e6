"""Few-shot prompting (Brown et al. 2020): solved examples precede the question, and nothing is trained.

Prompt: text. Estimator: none. Objective: none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.fixed_prompt import FixedPrompt
from lightning_prompts.randomness import run_seed
from lightning_prompts.search.demonstrations import Demonstration, FewShotPrompt
from lightning_prompts.types import Example


class FewShot(FixedPrompt):
    """Puts ``shots`` training examples with their answers in front of each question.

    The run's seed decides which examples are drawn; all questions get the same ones. In a chat they are in the user's
    turn.

    Args:
        shots: Number of examples.
        text: The prompt of the question and of the examples; ``None`` for the task's own instruction.
        separator: Text between the examples.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    def __init__(
        self,
        shots: int = 5,
        text: str | None = "",
        separator: str = "\n",
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Keep the settings."""
        super().__init__(text, lm, max_new_tokens)
        if shots < 1:
            raise UserError(f"shots must be at least 1, got {shots}; FixedPrompt has none")
        self.shots = shots
        self.separator = separator

    def build_prompt(self) -> None:
        """Draw the examples.

        Raises:
            UserError: There are no training examples, or too few.
        """
        super().build_prompt()
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("FewShot takes its examples from the datamodule's training split; give a datamodule")
        drawn = draw_shots(data.examples("train"), self.shots)
        self.demonstrations = few_shot_prompt(self.text, drawn).solved(self.separator)

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """Put the solved examples in front of each example."""
        return [replace(example, before=self.demonstrations + example.before) for example in examples]

    def added_tokens(self) -> int:
        """Return the number of tokens of the solved examples."""
        return self.language_model.count(self.demonstrations)


def draw_shots(train: Sequence[Example], shots: int) -> list[Example]:
    """Draw examples with an answer by the seed of the run.

    Raises:
        UserError: There are too few.
    """
    solved = [example for example in train if example.answer is not None]
    if shots > len(solved):
        raise UserError(f"shots ({shots}) is more than the {len(solved)} training examples with an answer; lower shots")
    return random.Random(run_seed()).sample(solved, shots)


def few_shot_prompt(instruction: str, examples: Sequence[Example]) -> FewShotPrompt:
    """Put solved examples in front of an instruction."""
    return FewShotPrompt(instruction, tuple(map(Demonstration.of, examples)))
