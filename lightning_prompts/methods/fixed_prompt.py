"""A fixed text prompt, the baseline of every comparison; nothing is trained.

Prompt: text. Estimator: none. Objective: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate, Prompt
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.types import Example


class FixedPrompt(PromptMethod):
    """Puts a text into the prompt slot and scores it, with a local LM or a server.

    A server without log-probabilities also generates the answers of classification tasks, without an NLL.

    Args:
        text: The prompt; may be empty, and may need a leading space. ``None`` for the task's own instruction.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "text"
    estimator_name = "none"
    objective_name = "none"
    takes_server = True

    def __init__(self, text: str | None = "", lm: LMConfig = LMConfig(), max_new_tokens: int = 16) -> None:
        """Keep the text."""
        super().__init__(lm, max_new_tokens)
        self.given, self.text = text, text or ""

    def configure_model(self) -> None:
        """Load the LM once, and make the prompt from the data of each run."""
        if hasattr(self, "lms") and self._trainer is not None and getattr(self.trainer, "datamodule", None) is not None:
            self.build_prompt()
        super().configure_model()

    def build_prompt(self) -> None:
        """Use the task's instruction as the prompt if no text is given."""
        if self.given is None:
            self.text = self.task_instruction()

    def current_prompt(self) -> Tensor:
        """Return the embeddings of the text, ``[P, D]``; see `LanguageModel.text_vectors`."""
        return self.language_model.text_vectors(self.text)

    def evaluate_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """See `PromptMethod`; the prompt stays a text."""
        return self.map_across_ranks(examples, lambda part: self.evaluate(part, self.text))

    def _classify(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        if self.lm_config.calibrate_labels:
            self.language_model.check_scores(examples)
        if self.language_model.can_score(examples):
            return super()._classify(examples, prompt)
        return self._generate(examples, prompt)

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        return MemoryEstimate(length=len(shape.encoder.tokens(self.text)))

    def setup(self, stage: str) -> None:
        """Raise an error if the run is to train.

        Raises:
            UserError: The stage is ``fit``.
        """
        if stage == "fit":
            raise UserError(f"{type(self).__name__} trains nothing; evaluate it with test instead of fit")
