"""Products of two numbers modulo a third; tested on larger factors and on other moduli, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, check_values
from lightning_prompts.datamodules.splits import Kind
from lightning_prompts.errors import UserError


class ModularProduct(GeneratedTask):
    r"""``26*37 mod 5=2``; ``test/larger_factors`` has two larger factors, ``test/other_moduli`` other moduli.

    Args:
        max_factor: The largest factor in training; the smallest is 1.
        moduli: The moduli in training.
        ood_max_factor: The largest factor of the out-of-distribution test set ``test/larger_factors``; its smallest is
            ``max_factor + 1``. ``null`` for no such test set.
        ood_moduli: The moduli of the out-of-distribution test set ``test/other_moduli``; ``[]`` for no such test set.
        template: Text with ``{prompt}``, ``{question}`` (or ``{a}``, ``{b}``, ``{m}``), ``{equals}``, ``{answer}``.
    """

    def __init__(
        self,
        max_factor: int = 50,
        moduli: list[int] = [3, 5, 7, 9],  # noqa: B006 - never changed
        ood_max_factor: int | None = 99,
        ood_moduli: list[int] = [11, 13],  # noqa: B006 - never changed
        template: str = "{prompt} {question}{equals}{answer}$",
        stop: str = r"\$",
        **kwargs: Any,
    ) -> None:
        """Check the factors and the moduli."""
        super().__init__(template=template, stop=stop, **kwargs)
        check_values("max_factor", [max_factor])
        check_values("moduli", moduli, least=2)
        check_values("ood_moduli", ood_moduli, least=2)
        if not moduli:
            raise UserError("data.moduli is empty; give at least one modulus, for example [7]")
        if shared := set(moduli) & set(ood_moduli):
            raise UserError(f"data.ood_moduli {min(shared)} is one of data.moduli too; take it out of one of them")
        if ood_max_factor is not None and ood_max_factor <= max_factor:
            raise UserError(
                f"data.ood_max_factor {ood_max_factor} lies in the training range 1 to {max_factor} "
                "(data.max_factor); give a larger one, or null for no larger factors"
            )
        self.factors = range(1, max_factor + 1)
        self.larger_factors = range(max_factor + 1, ood_max_factor + 1) if ood_max_factor else None
        self.moduli = moduli
        self.ood_moduli = ood_moduli

    def kinds(self) -> dict[Split, list[Kind]]:
        """Return a kind for each modulus."""
        kinds: dict[Split, list[Kind]] = {"train": [[self.factors, self.factors, [m]] for m in self.moduli]}
        if self.larger_factors:
            kinds["test/larger_factors"] = [[self.larger_factors, self.larger_factors, [m]] for m in self.moduli]
        if self.ood_moduli:
            kinds["test/other_moduli"] = [[self.factors, self.factors, [m]] for m in self.ood_moduli]
        return kinds

    def write(self, parts: Sequence[str]) -> SourceRow:
        """Write the product and its remainder."""
        a, b, m = map(int, parts)
        first, second, modulus = map(self.apart, parts)
        question = f"{first}{self.sign('*')}{second} mod {modulus}"
        answer = self.apart(str(a * b % m))
        fields = {"question": question, "answer": answer, "a": first, "b": second, "m": modulus}
        fields["equals"] = self.sign("=")
        return SourceRow(fields, f"ModularProduct {question}")
