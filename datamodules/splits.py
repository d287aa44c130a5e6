"""How rows are divided into splits: sizes, shares, balance, and what must not be in two splits."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from lightning_prompts.datamodules.base import SourceRow, Split
from lightning_prompts.errors import UserError

log = logging.getLogger(__name__)
Row = TypeVar("Row")

# All questions of one kind: choices for each of the parts. Every combination of choices is a question, and all are
# equally likely (numbers of two digits: "123456789" and then "0123456789").
Kind = Sequence[Sequence[object]]


def hold_out(train: Sequence[Row], sizes: Mapping[Split, int], seed: int) -> dict[Split, list[Row]]:
    """Draw the rows of other splits from the training rows; the rest is ``train``.

    Args:
        train: All rows.
        sizes: The number of rows of each other split.
        seed: Seed of the draw.

    Returns:
        The splits, each in the order of the rows.

    Raises:
        UserError: No training rows are left.

    >>> splits = hold_out("abcdefgh", {"val": 2, "test": 1}, seed=0)
    >>> [len(splits[name]) for name in ("train", "val", "test")], sorted(sum(splits.values(), []))
    ([5, 2, 1], ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'])
    """
    if sum(sizes.values()) >= len(train):
        wanted = " and ".join(f"data.{split}_size {size}" for split, size in sizes.items())
        raise UserError(f"{wanted} of {len(train)} training rows leave nothing to train on; lower them")
    order = random.Random(seed).sample(range(len(train)), len(train))
    splits: dict[Split, list[Row]] = {}
    for split, size in sizes.items():
        held, order = order[:size], order[size:]
        splits[split] = [train[index] for index in sorted(held)]
    splits["train"] = [train[index] for index in sorted(order)]
    return splits


def hold_out_questions(
    train: Sequence[Row], sizes: Mapping[Split, int], seed: int, key: Callable[[Row], Hashable]
) -> dict[Split, list[Row]]:
    """Draw other splits as `hold_out` does, but by question: rows that ask the same are in one split.

    Args:
        train: All rows.
        sizes: The number of rows of each other split, each with a question of its own.
        seed: Seed of the draw.
        key: Returns the same value for rows that ask the same.

    Raises:
        UserError: No training rows are left.

    >>> splits = hold_out_questions(["a1", "b1", "a2", "c1", "b2"], {"val": 1}, seed=1, key=lambda row: row[0])
    >>> splits["val"], splits["train"]
    (['a1'], ['b1', 'b2', 'c1'])
    """
    questions: dict[Hashable, list[Row]] = {}
    for row in train:
        questions.setdefault(key(row), []).append(row)
    held = hold_out(list(questions.values()), sizes, seed)
    return {
        split: [row for rows in drawn for row in (rows if split == "train" else rows[:1])]
        for split, drawn in held.items()
    }


def asked(row: SourceRow) -> str:
    """Return the question without differences of case and white space, to find rows that ask the same."""
    return folded(str(row.fields["question"]))


def folded(text: str) -> str:
    """Return a text without differences of case and white space."""
    return " ".join(text.casefold().split())


def hold_out_share(
    rows: Sequence[Row], size: float, seed: int, split: Split, source: str
) -> tuple[list[Row], list[Row]]:
    """Draw one split from the training rows.

    Args:
        rows: The training rows.
        size: A share of the rows below 1, or a count.
        seed: Seed of the draw.
        split: The split to draw.
        source: Where the rows come from, for the error message.

    Returns:
        The drawn rows and the others, in their order.

    Raises:
        UserError: One of the two would be empty.
    """
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise UserError(
            f"data.{split}_size {size} of the {len(rows)} rows of {source} leaves nothing to "
            f"{'hold out' if count <= 0 else 'train on'}; change it or give data.{split} a file"
        )
    return _split_at(rows, set(random.Random(f"{seed} {split}").sample(range(len(rows)), count)))


def draw(rows: Sequence[Row], size: int | None, seed: int, split: Split) -> list[Row]:
    """Draw ``size`` rows in their order; return all rows if there are no more, or if it is ``None``."""
    if size is None or size >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(f"{seed} {split}").sample(range(len(rows)), size))]


def draw_balanced(
    rows: Sequence[Row], kind: Callable[[Row], str], size: int, seed: int, split: Split, leave: bool
) -> tuple[list[Row], list[Row]]:
    """Draw the same number of rows of each class.

    Args:
        rows: The rows to draw from.
        kind: Returns the class of a row.
        size: The largest number of rows to draw. There are fewer if ``size`` is not a multiple of the number of classes
            or if a class is too small.
        seed: Seed of the draw.
        split: The split to draw.
        leave: Leave at least half of the rows of each class.

    Returns:
        The drawn rows and the others, in their order.

    Raises:
        UserError: There are more classes than rows to draw, or a class is too small to leave a row.

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
    return _split_at(rows, {index for name in sorted(places) for index in generator.sample(places[name], each)})


def _split_at(rows: Sequence[Row], drawn: set[int]) -> tuple[list[Row], list[Row]]:
    """Return the rows at these indices and the others."""
    return (
        [row for index, row in enumerate(rows) if index in drawn],
        [row for index, row in enumerate(rows) if index not in drawn],
    )


def remove_duplicates(
    splits: Mapping[Split, list[SourceRow]], key: Callable[[SourceRow], Hashable], repeats: bool = False
) -> dict[Split, list[SourceRow]]:
    """Drop validation rows that are test rows, and training rows that are either or occur twice.

    Args:
        splits: Rows of ``train``, ``val`` and ``test``; some may be missing.
        key: Returns the same value for rows that ask the same.
        repeats: Keep training rows that ask the same as each other.

    Raises:
        UserError: No rows of a split are left.
    """
    seen: set[Hashable] = set()
    kept: dict[Split, list[SourceRow]] = {}
    for split in ("test", "val", "train"):
        if split not in splits:
            continue
        rows = splits[split] if split == "test" else [row for row in splits[split] if key(row) not in seen]
        if split == "train" and not repeats:
            rows = list({key(row): row for row in reversed(rows)}.values())[::-1]  # the first of the same
        if len(rows) < len(splits[split]):
            _log_dropped(len(splits[split]) - len(rows), len(splits[split]), split, "they ask what other rows ask")
        if not rows:
            raise UserError(
                f"all {len(splits[split])} {split} rows are rows of another split too; give data.{split} another file"
                + ("" if split == "train" else ", or none, so that its rows are held out")
            )
        kept[split] = rows
        seen.update(map(key, rows))
    return kept


def without_shared(
    train: Sequence[SourceRow], held_out: Sequence[SourceRow], split: Split, words: bool
) -> list[SourceRow]:
    """Drop training rows that share a question, or a word, with the rows of another split.

    Args:
        train: The training rows.
        held_out: The rows of the other split.
        split: The other split.
        words: Compare the words of question and answer, not the whole question. The names of classes do not count.

    Raises:
        UserError: No training rows are left.
    """
    key = _words if words else _question
    taken = {item for row in held_out for item in key(row)}
    kept = [row for row in train if taken.isdisjoint(key(row))]
    if len(kept) < len(train):
        reason = f"they share {'words' if words else 'questions'} with the {split} split"
        _log_dropped(len(train) - len(kept), len(train), "train", reason)
    if not kept:
        raise UserError(
            f"data.disjoint: {'words' if words else 'rows'} leaves nothing to train on beside the {split} split"
        )
    return kept


def _question(row: SourceRow) -> set[str]:
    return {asked(row)}


def _words(row: SourceRow) -> set[str]:
    answer = "" if row.labels else row.fields["answer"]  # classes are the same in all splits
    return set(re.findall(r"\w+", f"{row.fields['question']} {answer}".casefold()))


def _log_dropped(count: int, total: int, split: Split, reason: str) -> None:
    """Log dropped rows: a warning for more than a tenth of them."""
    level = logging.WARNING if 10 * count > total else logging.INFO
    log.log(level, "%d of %d %s rows dropped: %s", count, total, split, reason)


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check the shares of validation and test rows.

    Raises:
        UserError: A share is not above 0, or nothing is left to train on.
    """
    if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1):
        raise UserError(
            f"data.val_fraction ({val_fraction}) and data.test_fraction ({test_fraction}) must be above 0 "
            "and leave something to train on"
        )


def disjoint_components(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Group the indices of pairs so that no word is in two groups: the connected components of the word graph.

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


class Deck:
    """The questions of one kind in random order, each dealt once.

    Args:
        kind: The choices.

    >>> deck, generator = Deck([["1", "2"], "ab"]), random.Random(0)
    >>> sorted("".join(deck.deal(generator)) for _ in range(deck.left))
    ['1a', '1b', '2a', '2b']
    """

    def __init__(self, kind: Kind) -> None:
        """Start with all questions."""
        self.kind = kind
        self.left = math.prod(map(len, kind))
        self._moved: dict[int, int] = {}

    def deal(self, generator: random.Random) -> list[str]:
        """Return the parts of the next question."""
        # Fisher-Yates that stores only the places it changed: there may be more questions than fit into memory.
        place = generator.randrange(self.left)
        self.left -= 1
        number = self._moved.get(place, place)
        self._moved[place] = self._moved.pop(self.left, self.left)
        parts = []
        for choices in self.kind:
            number, index = divmod(number, len(choices))
            parts.append(str(choices[index]))
        return parts


def deal(decks: Sequence[Deck], size: int, generator: random.Random, leave_most: bool) -> list[list[str]]:
    """Deal different questions, as equally over the decks as possible.

    Args:
        decks: The kinds of questions.
        size: The number of questions.
        generator: For the order.
        leave_most: Leave nine tenths of each deck, unless there are too few questions. Otherwise a test set would take
            all questions of a small kind, such as sums of two one-digit numbers, from training.

    Returns:
        The parts of each question.
    """
    total = sum(deck.left for deck in decks)
    kept = [min(deck.left * 9 // 10, deck.left * (total - size) // total) if leave_most else 0 for deck in decks]
    dealt: list[list[str]] = []
    while len(dealt) < size:
        dealing = [deck for deck, rest in zip(decks, kept, strict=True) if deck.left > rest]
        for deck in generator.sample(dealing, min(len(dealing), size - len(dealt))):
            dealt.append(deck.deal(generator))
    return dealt
