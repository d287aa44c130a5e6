"""Several datasets at once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.datamodules.splits import folded
from lightning_prompts.errors import UserError
from lightning_prompts.types import MEASURED, Example

log = logging.getLogger(__name__)


class Mixture(TextDataModule):
    """The examples of several datasets, shuffled together; metrics are reported for all and for each dataset.

    ``max_train_examples`` counts the examples of all datasets. Set it for a large dataset, too, so that the mixture
    does not consist of that dataset alone. ``seed`` replaces the seeds of the datasets. Training examples that another
    dataset validates or tests on, and validation examples that another one tests on, are dropped with a warning.

    Args:
        members: The datasets, by their names in metrics.
        template: One template for all datasets, with fields that all of them have, rendered with ``stop``, ``chat`` and
            ``system``; ``None`` keeps the template of each dataset, with its own.
    """

    def __init__(
        self,
        members: dict[str, TextDataModule],
        template: str | None = "{prompt}: {question}\nAnswer: {answer}\n",
        **kwargs: Any,
    ) -> None:
        """Check the names."""
        super().__init__(template="{prompt} {answer}" if template is None else template, **kwargs)
        if not members:
            raise UserError("data.members is empty; give a mixture at least one datamodule")
        for name, dataset in members.items():
            if not name or "/" in name or name in MEASURED:
                raise UserError(
                    f"data.members: {name!r} cannot be the name of a dataset, as metrics are named test/NAME/nll"
                )
            if isinstance(dataset, Mixture):
                raise UserError(f"data.members.{name} is a mixture itself; list its datasets instead")
        self.members = members
        self.own_templates = template is None

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Not used: each dataset loads its own rows."""
        raise NotImplementedError

    def examples(self, split: Split) -> list[Example]:
        """Return the examples of all datasets, one dataset after another; see `TextDataModule.examples`."""
        if self._examples is None:
            self._examples = self._load()
        return super().examples(split)

    def _load(self) -> dict[Split, list[Example]]:
        merged: dict[Split, list[Example]] = {"train": [], "val": [], "test": []}
        for name, dataset in self.members.items():
            try:
                self._add(merged, name, dataset)
            except UserError as error:
                raise UserError(f"data.members.{name}: {error}") from error
        evaluated = [split for split in merged if split != "train"]
        merged["train"] = self.limited(_without_shared(merged, "train", evaluated))
        tests = [split for split in evaluated if split.partition("/")[0] == "test"]
        merged["val"] = _without_shared(merged, "val", tests)
        return merged

    def _add(self, merged: dict[Split, list[Example]], name: str, dataset: TextDataModule) -> None:
        """Add the examples of a dataset."""
        dataset.seed = self.seed
        if not self.own_templates:
            dataset.template = self.template
        for split in dict.fromkeys(["train", "val", "test", *dataset.held_out()]):
            target = f"test/{name}/{split.removeprefix('test/')}" if split.startswith("test/") else split
            found = [replace(example, member=name) for example in dataset.examples(split)]
            merged.setdefault(target, []).extend(found)

    def dataset_names(self, split: Split) -> tuple[str, ...]:
        """Return all datasets; none for an out-of-distribution test set, which belongs to a single dataset."""
        return tuple(self.members) if split in ("val", "test") else ()


def _without_shared(merged: dict[Split, list[Example]], split: Split, others: Sequence[Split]) -> list[Example]:
    """Return the examples of a split without those that another dataset has in one of the other splits."""
    members: dict[Hashable, set[str]] = {}
    for example in itertools.chain.from_iterable(merged[other] for other in others):
        members.setdefault(_key(example), set()).add(example.member)
    kept = [example for example in merged[split] if not members.get(_key(example), set()) - {example.member}]
    if dropped := len(merged[split]) - len(kept):
        total = len(merged[split])
        log.warning("dropped %d of %d examples of %s, on which another dataset is evaluated", dropped, total, split)
    return kept


def _key(example: Example) -> Hashable:
    """Return the same value for examples with the same question and answer; tasks may share words but not answers."""
    return folded(example.question), example.target.casefold()
