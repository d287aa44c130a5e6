"""Dividing rows into splits, the same way wherever a dataset has no split of its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)
Row = TypeVar("Row")


def hold_out(train: Sequence[Row], sizes: Mapping[Split, int], seed: int) -> dict[Split, list[Row]]:
    """Take rows for other splits out of the training rows, drawn by a seed; what is left is ``train``.

    Args:
        train: All rows.
        sizes: How many rows each of the other splits gets.
        seed: What the draw follows.

    Returns:
        The splits, each in the order of the rows.

    Raises:
        UserError: Nothing would be left to train on.

    >>> splits = hold_out("abcdefgh", {"val": 2, "test": 1}, seed=0)
    >>> [len(splits[name]) for name in ("train", "val", "test")], sorted(sum(splits.values(), []))
    ([5, 2, 1], ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'])
    """
    if sum(sizes.values()) >= len(train):
        asked = " and ".join(f"data.{split}_size {size}" for split, size in sizes.items())
        raise UserError(f"{asked} of {len(train)} training rows leave nothing to train on; lower them")
    order = random.Random(seed).sample(range(len(train)), len(train))
    splits: dict[Split, list[Row]] = {}
    for split, size in sizes.items():
        held, order = order[:size], order[size:]
        splits[split] = [train[index] for index in sorted(held)]
    splits["train"] = [train[index] for index in sorted(order)]
    return splits


def draw(rows: Sequence[Row], size: int | None, seed: int, split: Split) -> list[Row]:
    """So many rows, or all where there are no more, drawn by a seed, in their order."""
    if size is None or size >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(f"{seed} {split}").sample(range(len(rows)), size))]


def draw_balanced(
    rows: Sequence[Row], kind: Callable[[Row], str], size: int, seed: int, split: Split, leave: bool
) -> tuple[list[Row], list[Row]]:
    """As many rows of each class as of any other, drawn by a seed, in their order; and the rest.

    Args:
        rows: To draw from.
        kind: The class of a row.
        size: Rows to draw, at most: fewer where it is no multiple of the classes, or a class has not so many.
        seed: What the draw follows.
        split: What they are drawn for.
        leave: At least half of the rows of each class are left.

    Raises:
        UserError: There are more classes than rows to draw.

    >>> draw_balanced(["a1", "a2", "a3", "b1", "b2"], lambda row: row[0], 5, seed=0, split="val", leave=False)
    (['a2', 'a3', 'b1', 'b2'], ['a1'])
    """
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(kind(row), []).append(index)
    name, rarest = min(((name, len(found)) for name, found in places.items()), key=lambda item: item[1])
    each = min(size // len(places), rarest // 2 if leave else rarest)
    if not each:
        few = f"data.{split}_size {size} is less than one row of each of {len(places)} classes; raise it"
        one = f"data.balanced_{split} needs a row to hold out and one to train on, and {name!r} has {rarest}"
        raise UserError(few if size < len(places) else one)
    generator = random.Random(f"{seed} {split}")
    drawn = {index for name in sorted(places) for index in generator.sample(places[name], each)}
    return ([row for index, row in enumerate(rows) if index in drawn],
            [row for index, row in enumerate(rows) if index not in drawn])  # fmt: skip


def log_dropped(count: int, total: int, split: Split, reason: str) -> None:
    """Say that rows are dropped; aloud where they are many."""
    level = logging.WARNING if 10 * count > total else logging.INFO
    log.log(level, "%d of %d %s rows dropped: %s", count, total, split, reason)


def apart(
    splits: Mapping[Split, list[SourceRow]], key: Callable[[SourceRow], Hashable]
) -> dict[Split, list[SourceRow]]:
    """Drop validation rows that are test rows too, and training rows that are either, or stand there twice.

    Args:
        splits: Rows of ``train``, ``val`` and ``test``, as far as there are such.
        key: What two rows share that ask the same.

    Raises:
        UserError: Nothing is left of a split.
    """
    seen: set[Hashable] = set()
    kept: dict[Split, list[SourceRow]] = {}
    for split in ("test", "val", "train"):
        if split not in splits:
            continue
        rows = splits[split] if split == "test" else [row for row in splits[split] if key(row) not in seen]
        if split == "train":
            rows = list({key(row): row for row in reversed(rows)}.values())[::-1]  # the first of those that are alike
        if len(rows) < len(splits[split]):
            log_dropped(len(splits[split]) - len(rows), len(splits[split]), split, "they ask what other rows ask")
        if not rows:
            raise UserError(
                f"all {len(splits[split])} {split} rows are rows of another split too; give data.{split} another file"
                + ("" if split == "train" else ", or none, so that its rows are held out")
            )
        kept[split] = rows
        seen.update(map(key, rows))
    return kept
