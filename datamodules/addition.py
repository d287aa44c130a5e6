"""Addition of whole numbers, with or without steps; tested on longer numbers, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, check_range
from lightning_prompts.datamodules.splits import Kind

NINE, TEN = "123456789", "0123456789"


class Addition(GeneratedTask):
    r"""``321+654=975``; both lengths are drawn independently; ``test/5_digits`` etc. have two numbers of that length.

    Args:
        steps: Answer with the steps and then the result, ``1405;2507;3609;000=975``: for each digit from the last one
            to the first, both digits, the carry into this digit and the digit of the result; then ``00`` and the last
            carry. Only the result is compared. Numbers of ``d`` digits take up to ``6 d + 6`` characters: set
            ``model.max_new_tokens``, to twice as many if ``spaced``.
        aligned: Pad the shorter number of the question with zeros, ``012+345``.
        min_digits: Digits of the shortest numbers in training.
        max_digits: Digits of the longest numbers in training.
        ood_digits: Digits of both numbers in the out-of-distribution test sets; ``[]`` for none.
        template: Text with ``{prompt}``, ``{question}`` (or ``{a}`` and ``{b}``), ``{equals}`` and ``{answer}``.

    >>> data = Addition(max_digits=2, ood_digits=[3])
    >>> [len(data.examples(split)) for split in ("train", "val", "test", "test/3_digits")]
    [5000, 200, 200, 200]
    >>> example = data.examples("test")[0]
    >>> int(example.reference) == sum(map(int, example.question.split("+")))
    True
    """

    def __init__(
        self,
        steps: bool = False,
        aligned: bool = False,
        min_digits: int = 1,
        max_digits: int = 4,
        ood_digits: list[int] = [5, 6],  # noqa: B006 - never changed
        template: str = "{prompt} {question}{equals}{answer}$",
        stop: str = r"\$",
        **kwargs: Any,
    ) -> None:
        """Check the lengths."""
        super().__init__(template=template, stop=stop, **kwargs)
        check_range(("min_digits", "max_digits", "ood_digits"), min_digits, max_digits, ood_digits)
        self.steps = steps
        self.aligned = aligned
        self.digits = range(min_digits, max_digits + 1)
        self.ood_digits = ood_digits
        if steps:
            self.extract = r"=([^=]*)$"  # the text after the last equals sign

    def kinds(self) -> dict[Split, list[Kind]]:
        """Return a kind for each pair of lengths."""
        return {
            "train": [_sums(first, second) for first in self.digits for second in self.digits],
            **{f"test/{digits}_digits": [_sums(digits, digits)] for digits in self.ood_digits},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """Write the sum, perhaps its steps, and the result that is compared."""
        a, b = "".join(parts).split("+")
        result = str(int(a) + int(b))
        answer = f"{column_steps(a, b)}={result}" if self.steps else result
        if self.aligned:
            a, b = a.zfill(len(b)), b.zfill(len(a))
        a, b = self.apart(a), self.apart(b)
        question = f"{a}{self.sign('+')}{b}"
        fields = {"question": question, "answer": self.apart(answer), "a": a, "b": b, "equals": self.sign("=")}
        return SourceRow(fields, f"Addition {question}", reference=self.apart(result))


def column_steps(a: str, b: str) -> str:
    """Add two numbers digit by digit, the last digits first.

    Args:
        a: Digits.
        b: Digits; their number may differ.

    Returns:
        A group for each digit of the longer number (digit of ``a``, digit of ``b``, carry into this digit, digit of the
        result) and a last group of ``00`` and the carry, separated by semicolons.
    """
    width = max(len(a), len(b))
    groups, carry = [], 0
    for first, second in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        total = int(first) + int(second) + carry
        groups.append(f"{first}{second}{carry}{total % 10}")
        carry = total // 10
    return ";".join([*groups, f"00{carry}"])


def _sums(first: int, second: int) -> Kind:
    """Return the choices for sums of two numbers with these numbers of digits."""
    return [*_number(first), "+", *_number(second)]


def _number(digits: int) -> list[str]:
    """Return the choices for numbers of this many digits; one digit includes 0."""
    return [TEN] if digits == 1 else [NINE, *[TEN] * (digits - 1)]
