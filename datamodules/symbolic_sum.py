"""Sums of variables, each assigned a number first; tested on more variables too."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, Kind, check_range, check_values


class SymbolicSum(GeneratedTask):
    r"""``x1=1, x2=2, x3=5, sum(x1+x2+x3)=8``; ``test/5_variables`` etc. have that many variables.

    Args:
        template: Text with ``{prompt}``, ``{question}`` (or ``{assignments}`` and ``{sum}``), ``{equals}`` and
            ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        max_value: The largest value of a variable; the smallest is 0.
        min_variables: How few variables there are in training.
        max_variables: How many variables there are in training.
        ood_variables: How many variables in further test sets, out of distribution; ``[]`` for none.
        spaced: Write the digits of numbers apart, ``x1 = 1 2, x2 = 3, sum(x1+x2) = 1 5``, since tokenizers merge digits
            into one token; names stay as they are.
        train_size: How many questions to train on, no two alike.
        val_size: How many questions for validation.
        test_size: How many questions in each test set.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the questions.
    """

    def __init__(
        self,
        template: str = "{prompt} {question}{equals}{answer}$",
        stop: str = r"\$",
        chat: bool = False,
        system: str | None = None,
        max_value: int = 9,
        min_variables: int = 2,
        max_variables: int = 4,
        ood_variables: list[int] = [5, 6],  # noqa: B006 - never changed
        spaced: bool = False,
        train_size: int = 5000,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check values and numbers of variables."""
        super().__init__(template, stop, chat, system, spaced, train_size, val_size, test_size, batch_size,
                         eval_batch_size, max_train_examples, seed)  # fmt: skip
        check_values("max_value", [max_value])
        check_range(("min_variables", "max_variables", "ood_variables"), min_variables, max_variables, ood_variables)
        self.values = range(max_value + 1)
        self.variables = range(min_variables, max_variables + 1)
        self.ood_variables = ood_variables

    def kinds(self) -> dict[Split, list[Kind]]:
        """One for each number of variables."""
        return {
            "train": [[self.values] * count for count in self.variables],
            **{f"test/{count}_variables": [[self.values] * count] for count in self.ood_variables},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """The variables ``x1``, ``x2``, ... and their sum."""
        equals = self.sign("=")
        assignments = ", ".join(f"x{index}{equals}{self.apart(value)}" for index, value in enumerate(parts, start=1))
        total = f"sum({'+'.join(f'x{index}' for index in range(1, len(parts) + 1))})"
        fields = {
            "question": f"{assignments}, {total}",
            "answer": self.apart(str(sum(map(int, parts)))),
            "assignments": assignments,
            "sum": total,
            "equals": equals,
        }
        return SourceRow(fields, f"SymbolicSum {assignments}")
