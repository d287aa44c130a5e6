"""What it takes to have an LM write: text in, text out. A `FrozenLM` can do it, and so can a `RemoteLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.usage import Usage
from lightning_prompts.types import Example


class TextModel(Protocol):
    """An LM that writes.

    Attributes:
        name: What to call it.
        context: How many tokens it can take.
        usage: What it was used for, by this process.
    """

    name: str
    context: int
    usage: Usage

    @property
    def chats(self) -> bool:
        """Whether it can be asked in a chat."""

    def count(self, text: str) -> int:
        """Tokens of a text, or about."""

    def length(self, example: Example) -> int:
        """Tokens of an example's context with an empty prompt, or about."""

    def write(
        self, examples: Sequence[Example], prompt: str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """Texts after examples with a prompt.

        Args:
            examples: ``B`` examples; their reference answers are not looked at.
            prompt: What stands in the prompt slot.
            max_new_tokens: At most so many tokens each.
            sampling: How to draw; ``None`` takes the likeliest token each time.

        Returns:
            One text per example, up to its ``stop`` pattern or the end token, stripped.
        """
