"""What every datamodule shares: rows become examples, examples become batches. Text only, no tokenizer, no tensors."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch.utils.data import DataLoader

from lightning_prompts.datamodules.checks import check_answers
from lightning_prompts.datamodules.order import BalancedSampler, EpochSampler, InOrder, ResumableLoader
from lightning_prompts.errors import UserError
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example

Split = str  # train, val, test, predict; test/NAME for further test sets


@dataclass(frozen=True)
class SourceRow:
    """A row and where it comes from.

    Attributes:
        fields: The fields by name, ``question`` and ``answer`` among them.
        source: For error messages (``"train.jsonl row 12"``).
        reference: What generations are compared with, where that is not the whole answer.
        labels: The classes that the answer is one of, each as its verbalisers; see `Example`.
    """

    fields: Mapping[str, object]
    source: str
    reference: str | None = None
    labels: Sequence[Sequence[str]] = ()


class TextDataModule(L.LightningDataModule):
    """Question-answer rows, rendered through a template.

    A subclass gives `load_rows`, and ``extract`` or ``numeric`` where a generation holds more than its result.
    Everything random follows ``seed``, except the order of training batches, which follows the run's own seed.

    Args:
        template: Text with ``{prompt}``, ``{answer}`` and the rows' fields.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        batch_size: Examples per training step, of all processes together.
        eval_batch_size: Examples per evaluation step, of all processes together.
        max_train_examples: Keep only so many training examples, drawn by ``seed``; ``None`` keeps all.
        seed: Seed of splits and of ``max_train_examples``.
    """

    instruction: str = ""  # the task in a sentence: where text prompts start that ask for the task's own
    extract: str | None = None  # see `Example`
    numeric: bool = False
    balanced: bool = False  # training batches with as many examples of each class as of any other

    def __init__(
        self,
        template: str,
        stop: str,
        chat: bool,
        system: str | None,
        batch_size: int,
        eval_batch_size: int,
        max_train_examples: int | None,
        seed: int,
    ) -> None:
        """Check the settings; nothing is read before `examples` is called."""
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_train_examples", max_train_examples),
        ):
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        self.template = Template(template, stop=stop, chat=chat, system=system)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_train_examples = max_train_examples
        self.seed = seed
        self._examples: dict[Split, list[Example]] | None = None

    @abstractmethod
    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """The rows of each split; called once."""

    def examples(self, split: Split) -> list[Example]:
        """The examples of a split, in order.

        Raises:
            UserError: The split is empty, or see `load_rows` and `check_answers`.
        """
        if self._examples is None:
            rows = self.load_rows()
            rows["train"] = self.limited(rows.get("train", []))
            examples = {name: [self.render(row) for row in part] for name, part in rows.items()}
            check_answers(examples)
            self._examples = examples
        if split == "predict" and not self._examples.get("predict"):
            split = "test"
        if not self._examples.get(split):
            raise UserError(f"{type(self).__name__} has no {split} examples: the {split} split is empty")
        return self._examples[split]

    def has(self, split: Split) -> bool:
        """Whether there is such a split."""
        if self._examples is None:
            self.examples("train")
        return bool((self._examples or {}).get(split))

    def limited(self, train: list[Any]) -> list[Any]:
        """``max_train_examples`` of the training rows, in their order."""
        if self.max_train_examples is None or self.max_train_examples >= len(train):
            return train
        kept = random.Random(self.seed).sample(range(len(train)), self.max_train_examples)
        return [train[index] for index in sorted(kept)]

    def member_names(self, split: Split) -> tuple[str, ...]:
        """The tasks of a mixture whose metrics are reported apart; none here."""
        del split
        return ()

    def render(self, row: SourceRow) -> Example:
        """A row as an example."""
        return self.template.render(row.fields, row.source, row.reference, self.extract, self.numeric, row.labels)

    def setup(self, stage: str) -> None:
        """Read the data, so that what is wrong with it is said before anything else starts."""
        for split in self.splits(stage):
            self.examples(split)

    def splits(self, stage: str) -> list[Split]:
        """The splits that a stage (``fit``, ``validate``, ``test``, ``predict``) reads; ``test`` has one or more."""
        if stage != "test":
            return {"fit": ["train", "val"], "validate": ["val"]}.get(stage, ["predict"])
        self.examples("test")
        assert self._examples is not None
        return ["test", *(name for name in self._examples if name.startswith("test/"))]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled anew every epoch, the same way for the same seed."""
        examples = self.examples("train")
        return ResumableLoader(
            examples,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=self.sampler(examples, torch.initial_seed() % 2**63),
            collate_fn=Batch,
            generator=torch.Generator(),
        )

    def sampler(self, examples: Sequence[Example], seed: int) -> EpochSampler:
        """The order of the training examples."""
        if self.balanced:
            return BalancedSampler(examples, self.batch_size, seed)
        return EpochSampler(len(examples), seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """In order, one for each test set."""
        loaders = [self._in_order(split) for split in self.splits("test")]
        return loaders if len(loaders) > 1 else loaders[0]

    def predict_dataloader(self) -> DataLoader[Any]:
        """In order; the test split where there is none of its own."""
        return self._in_order("predict")

    def _in_order(self, split: Split) -> DataLoader[Any]:
        collate = partial(Batch, split=split, members=self.member_names(split))
        # With generators of their own, loaders leave the run's randomness alone, which a resumed run goes on with.
        examples = self.examples(split)
        return DataLoader(
            examples,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            sampler=InOrder(len(examples)),
            collate_fn=collate,
            generator=torch.Generator(),
        )


def disjoint_components(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Groups of pair indices such that no word occurs in two groups (the connected components of the word graph).

    >>> disjoint_components([("hot", "cold"), ("up", "down"), ("cold", "warm")])
    [[0, 2], [1]]
    """
    parent: dict[str, str] = {}

    def root(word: str) -> str:
        while parent.setdefault(word, word) != word:
            parent[word] = parent[parent[word]]
            word = parent[word]
        return word

    for first, second in pairs:
        parent[root(first)] = root(second)
    groups: dict[str, list[int]] = {}
    for index, (first, _) in enumerate(pairs):
        groups.setdefault(root(first), []).append(index)
    return list(groups.values())
