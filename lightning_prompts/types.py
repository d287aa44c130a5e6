"""Examples and batches, the data that datamodules, language models and methods exchange: text, never tensors.

Shape legend, used in every docstring of the project:

====== ==========================================================
``B``  batch: examples scored together
``P``  prompt tokens
``T``  text tokens of one row
``A``  answer tokens
``M``  tokens of one packed forward pass, over all rows
``D``  model width
``V``  vocabulary
``L``  layers
``H``  attention heads (``Hkv`` key/value heads, ``Dh`` width of a head)
``S``  tokens of the prefix that all rows share
``C``  candidates
``K``  samples
====== ==========================================================
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

MEASURED = ("nll", "exact_match", "accuracy", "examples", "relaxed_nll")  # metrics that methods log of each split


@dataclass(frozen=True, slots=True)
class Example:
    """One task item as text: ``before`` {prompt} ``after`` -> ``answer``.

    Attributes:
        before: Text before the prompt slot.
        after: Text between the prompt slot and the answer.
        answer: Text to score, with its leading space; ``None`` without a reference.
        end: Text after the answer, which training includes and metrics exclude; ``None`` for the end of a chat turn.
        reference: The answer in the data, which generations are compared with.
        fields: The raw fields (question, answer, choices, ...).
        source: Source of the example in error messages (``"train.jsonl row 12"``).
        stop: Regular expression; a generation ends at its first match.
        chat: Whether the text is a user turn, to render with the tokenizer's chat template.
        system: The system turn of a chat; ``None`` for the default of the chat template.
        extract: Regular expression for the final result in a longer generation (such as the steps of a sum). The first
            group of the last match is compared with ``reference``; ``None`` compares the whole generation.
        numeric: Whether to compare final answers as numbers and formulas, ignoring the text around them.
        member: The dataset of a mixture that the example comes from, which has its own metrics.
        labels: The classes of the answer, each as a tuple of its verbalisers (the texts that stand for it); the first
            verbaliser is that of ``reference``. Empty for free-text answers.
        space: In a chat, the white space before the answer in the template, which neither ``after`` nor ``answer`` has;
            otherwise empty.

    >>> Example("Here are two", " hot and", " cold", reference="cold", fields={"question": "hot"}).question
    'hot'
    """

    before: str
    after: str
    answer: str | None
    end: str | None = ""
    reference: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    source: str = ""
    stop: str = r"\n"
    chat: bool = False
    system: str | None = None
    extract: str | None = None
    numeric: bool = False
    member: str = ""
    labels: tuple[tuple[str, ...], ...] = ()
    space: str = ""

    @property
    def identity(self) -> Hashable:
        """What an LM reads of the example, and what its answers are judged by."""
        read = (self.before, self.after, self.answer, self.end, self.space, self.chat, self.system, self.labels)
        return (*read, self.reference, self.stop, self.extract, self.numeric)

    @property
    def label(self) -> int | None:
        """Index of the reference's class in ``labels``; ``None`` without classes or without a reference."""
        names = [verbalisers[0] for verbalisers in self.labels]
        return names.index(self.reference) if self.reference in names else None

    @property
    def target(self) -> str:
        """The expected answer without white space around it; empty if unknown."""
        return self.reference if self.reference is not None else (self.answer or "").strip()

    @property
    def question(self) -> str:
        """The question: the field of that name, or the text around the prompt slot."""
        return str(self.fields.get("question", f"{self.before}{self.after}"))


class Batch:
    """The examples of one step.

    A batch is not a sequence, because Lightning searches sequences for tensors to move.

    Attributes:
        examples: The examples in order.
        split: Split of the examples: ``train``, ``val``, ``test``, or ``test/NAME`` for an additional test set.
        members: All datasets of the mixture of the examples, even those without examples in this batch.
        weight: Weight of the mean over these examples in the mean over the whole batch of a step; 1 unless several
            processes split the batch.
        start: Index of the first of these examples in the whole batch.
        total: Number of examples of the whole batch.
    """

    def __init__(self, examples: Sequence[Example], split: str = "train", members: Sequence[str] = ()) -> None:
        """Keep ``examples`` in the order given."""
        self.examples = tuple(examples)
        self.split = split
        self.members = tuple(members)
        self.weight, self.start, self.total = 1.0, 0, len(self.examples)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)
