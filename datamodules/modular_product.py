"""Products of two numbers, modulo a third; tested on larger factors and on other moduli too."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.datamodules.generated import GeneratedTask, Kind, check_values
from lightning_prompts.errors import UserError


class ModularProduct(GeneratedTask):
    r"""``26*37 mod 5=2``; ``test/larger_factors`` has two larger factors, ``test/other_moduli`` other moduli.

    Args:
        template: Text with ``{prompt}``, ``{question}`` (or ``{a}``, ``{b}``, ``{m}``), ``{equals}``, ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        max_factor: The largest factor in training; the smallest is 1.
        moduli: The moduli in training.
        ood_max_factor: The largest factor of ``test/larger_factors``, whose smallest is ``max_factor + 1``, out of
            distribution; ``null`` for no such test set.
        ood_moduli: The moduli of ``test/other_moduli``, out of distribution; ``[]`` for no such test set.
        spaced: Write digits and signs apart, ``2 6 * 3 7 mod 5 = 2``, since tokenizers merge digits into one token.
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
        max_factor: int = 50,
        moduli: list[int] = [3, 5, 7, 9],  # noqa: B006 - never changed
        ood_max_factor: int | None = 99,
        ood_moduli: list[int] = [11, 13],  # noqa: B006 - never changed
        spaced: bool = False,
        train_size: int = 5000,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check factors and moduli."""
        super().__init__(template, stop, chat, system, spaced, train_size, val_size, test_size, batch_size,
                         eval_batch_size, max_train_examples, seed)  # fmt: skip
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
        """One for each modulus."""
        kinds: dict[Split, list[Kind]] = {"train": [[self.factors, self.factors, [m]] for m in self.moduli]}
        if self.larger_factors:
            kinds["test/larger_factors"] = [[self.larger_factors, self.larger_factors, [m]] for m in self.moduli]
        if self.ood_moduli:
            kinds["test/other_moduli"] = [[self.factors, self.factors, [m]] for m in self.ood_moduli]
        return kinds

    def write(self, parts: Sequence[str]) -> SourceRow:
        """The product's remainder."""
        a, b, m = map(int, parts)
        first, second, modulus = map(self.apart, parts)
        question = f"{first}{self.sign('*')}{second} mod {modulus}"
        answer = self.apart(str(a * b % m))
        fields = {"question": question, "answer": answer, "a": first, "b": second, "m": modulus,
                  "equals": self.sign("=")}  # fmt: skip
        return SourceRow(fields, f"ModularProduct {question}")
