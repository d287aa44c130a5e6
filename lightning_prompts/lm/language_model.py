"""What methods ask of a language model, whether it is loaded here (`FrozenLM`) or runs behind a server (`RemoteLM`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, TypeAlias

from torch import Tensor

from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.key_values import Prompt
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.types import Example

Continuation: TypeAlias = tuple[int, ...] | str  # token ids of a model that is loaded here; the text for a server
Scored: TypeAlias = tuple[float, int]  # sum of a text's log-probabilities in nats, and its number of tokens


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


@dataclass(frozen=True)
class LabelSums:
    """Scores of the texts that stand for the classes of ``B`` examples.

    Attributes:
        sums: Log-probability of each text in nats, ``[..., W]`` for each example.
        owners: The class of each text, ``[W]`` for each example.
        nll: Mean negative log-likelihood of the reference answer's tokens in nats, ``[B]``; ``None`` without one.
    """

    sums: Sequence[Tensor]
    owners: Sequence[tuple[int, ...]]
    nll: list[float | None]


class LanguageModel(ABC):
    """A frozen language model that scores and writes texts.

    Embeddings, hidden states and gradients are in `FrozenLM` alone: a server shows none.

    Attributes:
        name: The model's name, for messages and checkpoints.
        context: Size of the context window in tokens.
        width: Size of an embedding; 0 behind a server.
        vocabulary: Number of tokens; 0 behind a server.
        usage: Counts of what this process used the model for.
        scores_together: Whether all texts after a context are scored in one pass. A server gets a request for each.
        texts_at_once: How many texts to ask `generate` for at once.
    """

    name: str
    context: int
    width: int
    vocabulary: int
    usage: Usage
    scores_together: ClassVar[bool]
    texts_at_once: ClassVar[int]

    @property
    def tokens_forwarded(self) -> int:
        """Number of tokens that this process has run through the model; of a server, those that it says it has."""
        return self.usage.tokens

    @abstractmethod
    def describe(self) -> str:
        """Name, and precision or address."""

    @abstractmethod
    def identity(self, config: LMConfig) -> str:
        """What scores and greedy texts depend on beside the texts, as a key for caches.

        Args:
            config: What the model was loaded from.
        """

    @abstractmethod
    def connect(self) -> None:
        """Get ready for requests; a model that is loaded here is ready.

        Raises:
            UserError: A server cannot be asked; see `RemoteLM.connect`.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait until no other process needs this one for a pass; call it before anything that processes do together."""

    # --- texts ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def chats(self) -> bool:
        """Whether the model takes chats."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Number of tokens of a text; an estimate for a server."""

    @abstractmethod
    def length(self, example: Example) -> int:
        """Number of tokens of an example's context with an empty prompt; an estimate for a server."""

    @abstractmethod
    def check_examples(self, examples: Sequence[Example], length: int, ahead: int = 0) -> None:
        """Check examples before a run starts, and warn of texts that the tokenizer changes.

        A server is not checked: it refuses what does not fit.

        Args:
            examples: Of a split.
            length: Number of positions in the prompt slot.
            ahead: Number of positions that something else takes.

        Raises:
            UserError: An example does not fit the context window, or see `Encoder.row`.
        """

    @abstractmethod
    def text_vectors(self, text: str) -> Tensor:
        """Embeddings ``[P, D]`` of a text in float32; ``[0, 0]`` behind a server."""

    @abstractmethod
    def generate(
        self, examples: Sequence[Example], prompt: Prompt | str, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[str]:
        """Write a text after each example.

        Args:
            examples: ``B`` examples; their reference answers are ignored.
            prompt: The prompt: a text, or what `FrozenLM.score` takes.
            max_new_tokens: Limit of each text.
            sampling: How to draw tokens; ``None`` takes the likeliest one each time.

        Returns:
            One text per example, up to its ``stop`` pattern or the end token, stripped.

        Raises:
            UserError: A server gets a prompt that is not a text.
        """

    # --- scores -----------------------------------------------------------------------------------------------------

    def can_score(self, examples: Sequence[Example]) -> bool:
        """Whether the model gives log-probabilities of texts after examples; servers may not."""
        del examples
        return True

    def check_scores(self, examples: Sequence[Example]) -> None:
        """Raise a `UserError` if the model gives no log-probabilities of texts after examples."""
        del examples

    @abstractmethod
    def continuation(self, text: str) -> Continuation:
        """A text as `text_scores` takes it, with the white space at its start."""

    @abstractmethod
    def label_texts(self, example: Example) -> Sequence[tuple[Continuation, int]]:
        """The texts that stand for an example's classes, none of them twice, each with the class that it stands for.

        Every verbaliser counts with a leading space and without; see `Encoder.label_tokens`.

        Raises:
            UserError: Two classes cannot be told apart.
        """

    @abstractmethod
    def check_texts(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[Continuation]]
    ) -> None:
        """Check what `text_scores` is about to get, in every process alike.

        Raises:
            UserError: A text does not fit the context window, nothing precedes it, or a server gives no
                log-probabilities.
        """

    @abstractmethod
    def text_scores(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Continuation]],
        block: int = 1,
        memory_mb: float = 256.0,
    ) -> list[list[list[Scored]]]:
        """Score texts after examples, under each of several prompts.

        Args:
            examples: ``N`` examples.
            prompts: ``C`` prompts.
            texts: For each example, one or more texts of at least one token each.
            block: Every ``block`` neighbouring examples share their beginning.
            memory_mb: Megabytes that one pass may take, about.

        Returns:
            ``[C][N]`` lists of as many scores as the example has texts.

        Raises:
            UserError: See `check_texts`.
        """

    @abstractmethod
    def answer_nll(self, examples: Sequence[Example], prompt: Prompt | str) -> list[float | None]:
        """Mean negative log-likelihood of reference answers in nats per token; ``None`` where a server gives none.

        Args:
            examples: ``B`` examples with answers.
            prompt: See `generate`.
        """

    @abstractmethod
    def label_sums(self, examples: Sequence[Example], prompt: Prompt | str) -> LabelSums:
        """Score the texts that stand for classes, and the reference answers; see `label_scores`.

        Args:
            examples: ``B`` examples with labels.
            prompt: See `generate`.
        """
