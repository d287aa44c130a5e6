"""A text prompt, nothing trained: the baseline of every comparison, on the same code path.

Prompt: text. Estimator: none. Objective: none.
"""

from __future__ import annotations

from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.base import PromptMethod


class FixedPrompt(PromptMethod):
    """Puts a text into the prompt slot and scores it.

    Args:
        text: The prompt; may be empty. Mind its leading space. ``None`` for the task's own instruction.
        lm: The frozen language model.
        max_new_tokens: How long a generated answer may get.
    """

    prompt_kind = "text"
    estimator_name = "none"
    objective_name = "none"
    ids: Tensor

    def __init__(self, text: str | None = "", lm: LMConfig = LMConfig(), max_new_tokens: int = 16) -> None:  # noqa: B008
        """Keep the text."""
        super().__init__(lm, max_new_tokens)
        self.given, self.text = text, text or ""

    def build_prompt(self) -> None:
        """Tokenise the text."""
        if self.given is None:
            self.text = self.task_instruction()
        self.register_buffer("ids", self.lm.token_ids(self.text), persistent=False)

    def current_prompt(self) -> Tensor:
        """The embeddings of the text, ``[P, D]``."""
        return self.lm.embed(self.ids).float()

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        return MemoryEstimate(length=len(shape.encoder.tokens(self.text)))

    def training_step(self, *args: object) -> None:
        """There is none; Lightning asks for the method before it calls `setup`."""

    def setup(self, stage: str) -> None:
        """Say at once that there is nothing to fit.

        Raises:
            UserError: The stage is ``fit``.
        """
        if stage == "fit":
            raise UserError(f"{type(self).__name__} trains nothing; evaluate it with test instead of fit")
