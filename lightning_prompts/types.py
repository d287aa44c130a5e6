"""The data that travels between datamodules, language models and methods: text, never tensors.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """One task item as text: ``before`` {prompt} ``after`` -> ``answer``.

    Attributes:
        before: Text ahead of the prompt slot.
        after: Text between the prompt slot and the answer.
        answer: The text that is scored, with its leading space; ``None`` when there is no reference.
        end: What follows the answer, which training teaches and metrics leave out; ``None`` for the end of a chat turn.
        reference: The answer as the data gives it, which generations are compared with.
        fields: The raw fields (question, answer, choices, ...).
        source: Where the example comes from, for error messages (``"train.jsonl row 12"``).
        stop: Regular expression; a generation ends where it first matches.
        chat: Whether the text is a user turn, to be rendered through the tokenizer's chat template.
        system: The system turn of a chat, or ``None`` for the chat template's own.
        extract: Regular expression for the final result in a generation that has more in it (the steps of a sum): the
            last match's first group is compared with ``reference``; ``None`` compares the whole generation.
        numeric: Compare final answers as numbers and formulas, whatever stands around them, instead of to the letter.
        member: The task of a mixture that this is from, whose metrics are reported apart.
        labels: The classes that the answer is one of, each as its verbalisers: the ways to write it, the first of them
            as in ``reference``. Empty where the answer is free text.

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

    @property
    def label(self) -> int | None:
        """The class of the reference, an index into ``labels``; ``None`` without classes or without a reference."""
        names = [verbalisers[0] for verbalisers in self.labels]
        return names.index(self.reference) if self.reference in names else None

    @property
    def target(self) -> str:
        """What should be answered, without white space around it; empty where that is unknown."""
        return self.reference if self.reference is not None else (self.answer or "").strip()

    @property
    def question(self) -> str:
        """What a reader would call the question: the field of that name, or else the text around the slot."""
        return str(self.fields.get("question", f"{self.before}{self.after}"))


class Batch:
    """The examples of one step.

    Deliberately no sequence: Lightning would take it apart, looking for tensors to move, and there are none.

    Attributes:
        examples: The examples in order.
        split: The split that they come from: ``train``, ``val``, ``test``, ``test/NAME`` for a further test set.
        members: All tasks of the mixture that they come from, whether or not this batch has examples of each.
        weight: What a mean over these examples counts in the mean over all that a step sees; 1, unless several
            processes have parts of them.
        start: How many examples of the whole batch stand before these.
        total: How many the whole batch has.
    """

    def __init__(self, examples: Sequence[Example], split: str = "train", members: Sequence[str] = ()) -> None:
        """Keep ``examples`` in the order given."""
        self.examples = tuple(examples)
        self.split = split
        self.members = tuple(members)
        self.weight, self.start, self.total = 1.0, 0, len(self.examples)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.examples)
