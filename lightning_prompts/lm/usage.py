"""What an LM has been used for: tokens, texts, forward passes."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Usage:
    """Counts of one LM in one process, or sums and differences of such.

    The backward pass is not counted, nor what gradient checkpointing computes again for it.

    Attributes:
        tokens_with_gradient: Prompt, text and answer tokens run through the model with a gradient to follow back.
        tokens_without_gradient: The same for nothing but the output.
        tokens_remote: What servers say that they have read and written.
        calls: Texts that were scored, read or written, each as one request to a server would be, those to servers
            included. A batch of ``B`` examples is ``B`` calls, a written text one, however long.
        calls_remote: Those of them that went to servers and were answered.
        passes: Forward passes of the model, of whatever size; a text is written in one for each token.
    """

    tokens_with_gradient: int = 0
    tokens_without_gradient: int = 0
    tokens_remote: int = 0
    calls: int = 0
    calls_remote: int = 0
    passes: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.tokens_with_gradient + self.tokens_without_gradient + self.tokens_remote

    def __add__(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Usage)))

    def __sub__(self, other: Usage) -> Usage:
        """What came in between."""
        return Usage(*(getattr(self, part.name) - getattr(other, part.name) for part in fields(Usage)))
