"""Sums of variables with given values; tested on more variables, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, check_range, check_values
from lightning_prompts.datamodules.splits import Kind


class SymbolicSum(GeneratedTask):
    r"""``x1=1, x2=2, x3=5, sum(x1+x2+x3)=8``; ``test/5_variables`` etc. have that many variables.

    ``spaced`` does not change the names of variables: ``x1 = 1 2, x2 = 3, sum(x1+x2) = 1 5``.

    Args:
        max_value: The largest value of a variable; the smallest is 0.
        min_variables: The smallest number of variables in training.
        max_variables: The largest number of variables in training.
        ood_variables: Numbers of variables in the out-of-distribution test sets; ``[]`` for none.
        template: Text with ``{prompt}``, ``{question}`` (or ``{assignments}`` and ``{sum}``), ``{equals}`` and
            ``{answer}``.
    """

    def __init__(
        self,
        max_value: int = 9,
        min_variables: int = 2,
        max_variables: int = 4,
        ood_variables: list[int] = [5, 6],  # noqa: B006 - never changed
        template: str = "{prompt} {question}{equals}{answer}$",
        stop: str = r"\$",
        **kwargs: Any,
    ) -> None:
        """Check the values and the numbers of variables."""
        super().__init__(template=template, stop=stop, **kwargs)
        check_values("max_value", [max_value])
        check_range(("min_variables", "max_variables", "ood_variables"), min_variables, max_variables, ood_variables)
        self.values = range(max_value + 1)
        self.variables = range(min_variables, max_variables + 1)
        self.ood_variables = ood_variables

    def kinds(self) -> dict[Split, list[Kind]]:
        """Return a kind for each number of variables."""
        return {
            "train": [[self.values] * count for count in self.variables],
            **{f"test/{count}_variables": [[self.values] * count] for count in self.ood_variables},
        }

    def write(self, parts: Sequence[str]) -> SourceRow:
        """Write the variables ``x1``, ``x2``, ... and their sum."""
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
