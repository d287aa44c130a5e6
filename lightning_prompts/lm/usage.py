"""Counts of what an LM was used for: tokens, texts, forward passes."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Usage:
    """Counts of one LM in one process, or sums and differences of counts.

    The backward pass, and the forward pass that gradient checkpointing repeats for it, are not counted.

    Attributes:
        tokens_with_gradient: Prompt, text and answer tokens run through the model with a gradient.
        tokens_without_gradient: The same without a gradient.
        tokens_remote: Tokens that servers say they have read and written.
        calls: Texts that were scored, read or written, here or by servers: the number of requests that a server would
            get. A batch of ``B`` examples is ``B`` calls; a generated text is one, however long.
        calls_remote: Calls that went to servers and were answered.
        passes: Forward passes of the model, of any size; a text takes one for each token.
    """

    tokens_with_gradient: int = 0
    tokens_without_gradient: int = 0
    tokens_remote: int = 0
    calls: int = 0
    calls_remote: int = 0
    passes: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.tokens_with_gradient + self.tokens_without_gradient + self.tokens_remote

    def __add__(self, other: Usage) -> Usage:
        """The sum of two counts."""
        return Usage(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Usage)))

    def __sub__(self, other: Usage) -> Usage:
        """The difference of two counts."""
        return Usage(*(getattr(self, part.name) - getattr(other, part.name) for part in fields(Usage)))
