"""The base class of all datamodules: rows become examples, examples become batches. No tokenizer, no tensors."""

from __future__ import annotations

import inspect
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.parsing import collect_init_args
from torch.utils.data import DataLoader

from lightning_prompts.datamodules.checks import check_answers
from lightning_prompts.datamodules.samplers import BalancedSampler, EpochSampler, InOrder, ResumableLoader
from lightning_prompts.errors import UserError
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example

Split = str  # train, val, test, predict; test/NAME for an out-of-distribution test set


@dataclass(frozen=True)
class SourceRow:
    """A row and where it comes from.

    Attributes:
        fields: The fields by name, including ``question`` and ``answer``.
        source: For error messages (``"train.jsonl row 12"``).
        reference: The text that generations are compared with; ``None`` for the whole answer.
        labels: The classes of the answer, each as its verbalisers; see `Example`.
    """

    fields: Mapping[str, object]
    source: str
    reference: str | None = None
    labels: Sequence[Sequence[str]] = ()


class TextDataModule(L.LightningDataModule):
    r"""Question-answer rows, rendered through a template.

    A subclass implements `load_rows`. It declares its own settings, and the shared settings whose default differs, and
    passes all others on as ``**kwargs``. It sets ``extract`` or ``numeric`` if a generation holds more than the result.
    All randomness follows ``seed``, except the order of training batches, which follows the seed of the run.

    Args:
        template: Text with ``{prompt}``, ``{question}``, ``{answer}`` and any other field of the rows.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        batch_size: Examples per training step, over all processes.
        eval_batch_size: Examples per evaluation step, over all processes.
        max_train_examples: Keep only this many training examples, drawn by ``seed``; ``None`` keeps all.
        seed: Seed of the data: of what is drawn, held out and kept.
        instruction: The task in a sentence: the initial prompt of methods whose ``text`` is ``None``; ``None`` for the
            instruction that comes with the dataset, if there is one.

    Raises:
        UserError: A size is below 1, or the template is wrong; see `Template`.
    """

    task_instruction: str = ""  # what comes with the dataset
    extract: str | None = None  # see `Example`
    numeric: bool = False  # see `Example`
    balanced: bool = False  # whether training batches have equally many examples of each class

    def __init__(
        self,
        *,
        template: str = "{prompt}: {question}\nAnswer: {answer}\n",
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
        instruction: str | None = None,
    ) -> None:
        """Check the settings; data is read when `examples` is first called."""
        super().__init__()
        self.settings = _settings(inspect.currentframe())
        check_sizes(batch_size=batch_size, eval_batch_size=eval_batch_size, max_train_examples=max_train_examples)
        self.template = Template(template, stop=stop, chat=chat, system=system)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_train_examples = max_train_examples
        self.seed = seed
        self._instruction = instruction
        self._examples: dict[Split, list[Example]] | None = None

    @property
    def instruction(self) -> str:
        """The task in a sentence; may be empty."""
        return self.task_instruction if self._instruction is None else self._instruction

    @abstractmethod
    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Return the rows of each split; called once."""

    def examples(self, split: Split) -> list[Example]:
        """Return the examples of a split, in order.

        Raises:
            UserError: The split is empty; see also `load_rows` and `check_answers`.
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

    def held_out(self) -> list[Split]:
        """Return the splits that have examples and are not for training: validation, test sets, rows to predict."""
        self.examples("train")
        return [split for split, examples in (self._examples or {}).items() if examples and split != "train"]

    def limited(self, train: list[Any]) -> list[Any]:
        """Keep ``max_train_examples`` of the training rows, in their order."""
        if self.max_train_examples is None or self.max_train_examples >= len(train):
            return train
        kept = random.Random(self.seed).sample(range(len(train)), self.max_train_examples)
        return [train[index] for index in sorted(kept)]

    def dataset_names(self, split: Split) -> tuple[str, ...]:
        """Return the datasets of a mixture that have metrics of their own; none here."""
        del split
        return ()

    def render(self, row: SourceRow) -> Example:
        """Render a row as an example."""
        return self.template.render(row.fields, row.source, row.reference, self.extract, self.numeric, row.labels)

    def setup(self, stage: str) -> None:
        """Read the data, so that errors in it are raised before anything else starts."""
        for split in self.splits(stage):
            self.examples(split)

    def splits(self, stage: str) -> list[Split]:
        """Return the splits that a stage reads.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; ``test`` may have several splits.
        """
        if stage != "test":
            return {"fit": ["train", "val"], "validate": ["val"]}.get(stage, ["predict"])
        self.examples("test")
        assert self._examples is not None
        return ["test", *(name for name in self._examples if name.startswith("test/"))]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, shuffled every epoch, in the same order for the same seed."""
        examples = self.examples("train")
        return ResumableLoader(
            examples,
            batch_size=self.batch_size,
            sampler=self.sampler(examples, torch.initial_seed() % 2**63),
            collate_fn=Batch,
            generator=torch.Generator(),
        )

    def sampler(self, examples: Sequence[Example], seed: int) -> EpochSampler:
        """Return the sampler of the training examples."""
        if self.balanced:
            return BalancedSampler(examples, self.batch_size, seed)
        return EpochSampler(len(examples), seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches in order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the test batches in order: one loader for each test set."""
        loaders = [self._in_order(split) for split in self.splits("test")]
        return loaders if len(loaders) > 1 else loaders[0]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches to predict in order: the test split if there is no predict split."""
        return self._in_order("predict")

    def _in_order(self, split: Split) -> DataLoader[Any]:
        collate = partial(Batch, split=split, members=self.dataset_names(split))
        examples = self.examples(split)
        return DataLoader(
            examples,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            sampler=InOrder(len(examples)),
            collate_fn=collate,
            generator=torch.Generator(),  # its own, so that the loader does not change the run's RNG state
        )


def _settings(frame: FrameType | None) -> dict[str, Any]:
    """Collect the arguments of a datamodule's own constructor, with those that it takes as ``**kwargs``."""
    assert frame is not None
    given: dict[str, Any] = collect_init_args(frame, [], classes=(TextDataModule,))[-1]
    return given


def check_sizes(**sizes: int | None) -> None:
    """Check that sizes are at least 1; ``None`` means no limit.

    Args:
        sizes: The sizes by the names of their settings.

    Raises:
        UserError: A size is below 1.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"data.{name} must be at least 1, got {size}")
