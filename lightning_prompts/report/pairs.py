"""Two methods on the same questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prompts.report.statistics import Groups, bootstrap, permutation
from lightning_prompts.runs.reader import Prediction

Key = tuple[str, str, str, str, int]  # seed, split, question, answer, and which of several that are equal so far


@dataclass(frozen=True)
class Comparison:
    """One method against another.

    Args:
        count: How many rows both have.
        difference: The mean of one less the mean of the other, on these.
        interval: Of 95%, over questions; ``None`` for a single question.
        p_value: Of the paired permutation test, two-sided.
    """

    count: int
    difference: float
    interval: tuple[float, float] | None
    p_value: float


def values(rows: Mapping[str, Sequence[Prediction]], what: str) -> dict[Key, float]:
    """A figure of every row that has it.

    Args:
        rows: Predictions by seed.
        what: ``nll`` or ``correct``.

    Returns:
        The figure by seed, split, question and answer. A question that a test set holds twice is two rows.
    """
    found: dict[Key, float] = {}
    for seed, predictions in rows.items():
        seen: Counter[tuple[str, str, str]] = Counter()
        for row in predictions:
            value = row.nll if what == "nll" else row.correct
            question = row.split, row.question, row.answer
            if value is not None and math.isfinite(value):
                found[(seed, *question, seen[question])] = value
            seen[question] += 1
    return found


def mean_over_seeds(found: Mapping[Key, float]) -> dict[Key, float]:
    """The mean of each row over the seeds that have it, under no seed; for methods that have none in common.

    Args:
        found: As `values` gives them.
    """
    rows: dict[Key, list[float]] = {}
    for key, value in found.items():
        rows.setdefault(("", *key[1:]), []).append(value)
    return {key: sum(several) / len(several) for key, several in rows.items()}


def compare(mine: Mapping[Key, float], other: Mapping[Key, float]) -> Comparison | None:
    """Compare row by row.

    A question that came in the test sets of several seeds is one question, whose rows are drawn and swapped together:
    they are no independent evidence.

    Args:
        mine: As `values` gives them.
        other: The same of the method to compare with.

    Returns:
        The comparison; ``None`` where they have no row in common. The same numbers every time.
    """
    shared = [key for key in mine if key in other]
    if not shared:
        return None
    differences = np.array([mine[key] - other[key] for key in shared])
    groups = questions(shared)
    interval = bootstrap(differences, np.random.default_rng(0), groups)
    p_value = permutation(differences, np.random.default_rng(0), groups)
    return Comparison(len(shared), float(differences.mean()), interval, p_value)


def questions(keys: Sequence[Key]) -> Groups:
    """Which rows are about the same question, whatever the seed: ``[N]``, counted from 0."""
    numbers: dict[tuple[str, str, str], int] = {}
    return np.array([numbers.setdefault(key[1:4], len(numbers)) for key in keys], dtype=np.int64)
