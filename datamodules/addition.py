"""Addition of whole numbers, with or without the digit steps; tested on longer numbers too."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, Kind, check_range

NINE, TEN = "123456789", "0123456789"


class Addition(GeneratedTask):
    r"""``321+654=975``, each number's length drawn by itself; ``test/5_digits`` etc. have two numbers of that length.

    Args:
        template: Text with ``{prompt}``, ``{question}`` (or ``{a}`` and ``{b}``), ``{equals}`` and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        steps: Answer with the steps and then the result, ``1405;2507;3609;000=975``: for each digit from the last one
            up, both digits, the carry that comes in and the result's digit; ``00`` and the last carry. The result alone
            is compared. Numbers of ``d`` digits take up to ``6 d + 6`` characters: set ``model.max_new_tokens``, to
            twice as many if ``spaced``.
        aligned: Write zeros ahead of the question's shorter number, ``012+345``.
        min_digits: Digits of the shortest numbers in training.
        max_digits: Digits of the longest numbers in training.
        ood_digits: Digits of both numbers in further test sets, out of distribution; ``[]`` for none.
        spaced: Write digits and signs apart, ``3 2 1 + 6 5 4 = 9 7 5``, since tokenizers merge digits into one token.
        train_size: How many questions to train on, no two alike.
        val_size: How many questions for validation.
        test_size: How many questions in each test set.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the questions.

    >>> data = Addition(max_digits=2, ood_digits=[3])
    >>> [len(data.examples(split)) for split in ("train", "val", "test", "test/3_digits")]
    [5000, 200, 200, 200]
    >>> example = data.examples("test")[0]
    >>> int(example.reference) == sum(map(int, example.question.split("+")))
    True
    """

    def __init__(
        self,
        template: str = "{prompt} {question}{equals}{answer}$",
        stop: str = r"\$",
        chat: bool = False,
        system: str | None = None,
        steps: bool = False,
        aligned: bool = False,
        min_digits: int = 1,
        max_digits: int = 4,
        ood_digits: list[int] = [5, 6],  # noqa: B006 - never changed
        spaced: bool = False,
        train_size: int = 5000,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the lengths."""
        super().__init__(template, stop, chat, system, spaced, train_size, val_size, test_size, batch_size,
                         eval_batch_size, max_train_examples, seed)  # fmt: skip
        check_range(("min_digits", "max_digits", "ood_digits"), min_digits, max_digits, ood_digits)
        self.steps = steps
        self.aligned = aligned
        self.digits = range(min_digits, max_digits + 1)
        self.ood_digits = ood_digits
        if steps:
            self.extract = r"=([^=]*)$"  # what follows the last equals sign

    def kinds(self) -> dict[Split, list[Kind]]:
        """One for each pair of lengths."""
        return {
            "train": [_sums(first, second) for first in self.digits for second in self.digits],
            **{f"test/{digits}_digits": [_sums(digits, digits)] for digits in self.ood_digits},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """The sum, its steps, and the result that counts."""
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
    """The steps of adding two numbers digit by digit, the last digits first.

    Args:
        a: Digits.
        b: Digits, as many or not.

    Returns:
        A group for each digit of the longer number (digit of ``a``, digit of ``b``, carry coming in, digit of the
        result) and a last group of ``00`` and the carry, between semicolons.
    """
    width = max(len(a), len(b))
    groups, carry = [], 0
    for first, second in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        total = int(first) + int(second) + carry
        groups.append(f"{first}{second}{carry}{total % 10}")
        carry = total // 10
    return ";".join([*groups, f"00{carry}"])


def _sums(first: int, second: int) -> Kind:
    """All sums of two numbers of so many digits."""
    return [*_number(first), "+", *_number(second)]


def _number(digits: int) -> list[str]:
    """All numbers of so many digits, 0 among those of one."""
    return [TEN] if digits == 1 else [NINE, *[TEN] * (digits - 1)]
