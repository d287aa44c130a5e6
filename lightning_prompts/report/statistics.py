"""Intervals and tests: over seeds by Student's t, over questions by resampling and by sign flips."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
EXACT = 14  # with at most this many questions that differ, all sign flips are counted instead of drawn
FLOOR = 1 / (DRAWS + 1)  # the smallest p-value that random sign flips can give
LEVEL = 0.05  # a difference with a smaller adjusted p-value is established
POWER = 0.8  # of the tests that `questions_needed` plans for
AT_ONCE = 4_000_000  # random numbers in memory

Values: TypeAlias = NDArray[np.float64]
Groups: TypeAlias = NDArray[np.int64]


def _stats() -> Any:  # noqa: ANN401 - SciPy has no types
    """SciPy's statistics. Its import takes a second, so only what computes pays for it."""
    return importlib.import_module("scipy.stats")


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95% interval of a mean over independent runs by Student's t.

    Args:
        values: One per seed.

    Returns:
        The ends; ``None`` for a single run, which says nothing about others.
    """
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    reach = float(_stats().t.ppf(0.975, len(values) - 1) * _stats().sem(values))
    return mean - reach, mean + reach


def bootstrap(
    values: Values, generator: np.random.Generator, groups: Groups | None = None
) -> tuple[float, float] | None:
    """Compute the 95% interval of a mean over questions by the percentiles of resampled means (Efron 1979).

    Args:
        values: ``[N]``.
        generator: Draws the samples.
        groups: ``[N]``, the question of each row, counted from 0: rows of one question are drawn together. ``None``
            where every row is a question of its own.

    Returns:
        The ends; ``None`` for a single question, which says nothing about others.
    """
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        return None

    def mean(total: Values, count: Values, axis: int) -> Values:
        return np.asarray(total.sum(axis=axis) / count.sum(axis=axis))

    options = {"paired": True, "vectorized": True, "n_resamples": DRAWS, "batch": _batch(len(sums)), "rng": generator}
    found = _stats().bootstrap((sums, counts), mean, method="percentile", **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def permutation(differences: Values, generator: np.random.Generator, groups: Groups | None = None) -> float:
    """Test whether two methods differ by swapping them within questions (Fisher's test for pairs).

    Args:
        differences: ``[N]``, of one method to the other on the same row.
        generator: Draws the swaps, where there are too many to count all of them.
        groups: As in `bootstrap`; rows of one question are swapped together.

    Returns:
        How often a swap makes the mean difference as large as it is, two-sided.
    """
    sums, _ = _by_group(differences, groups)
    sums = sums[sums != 0]  # a swap changes nothing there
    if len(sums) < 2:  # the only swap there is changes the sign alone
        return 1.0

    def magnitude(total: Values, axis: int) -> Any:  # noqa: ANN401 - an array, or a number where there is no batch
        return np.abs(total.sum(axis=axis))

    common = {"vectorized": True, "alternative": "greater", "batch": _batch(len(sums))}
    if len(sums) <= EXACT:
        exact = _stats().permutation_test((sums,), magnitude, permutation_type="samples", n_resamples=np.inf, **common)
        return float(exact.pvalue)

    def swapped(size: tuple[int, int]) -> Values:
        signs = generator.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
        drawn: Values = np.multiply(signs, sums, dtype=np.float64)
        return drawn

    return float(_stats().monte_carlo_test(sums, swapped, magnitude, n_resamples=DRAWS, **common).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests for their number (Holm 1979).

    Args:
        p_values: Of each test.

    Returns:
        The adjusted ones, in the same order.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def questions_needed(difference: float, deviation: float, tests: int = 1) -> int | None:
    """Estimate how many questions a paired two-sided test at 5% needs to find a difference four times in five.

    Args:
        difference: The true mean difference.
        deviation: Standard deviation of the difference from question to question.
        tests: How many tests share the 5% (Bonferroni).

    Returns:
        The number by the normal approximation; ``None`` where there is no difference.
    """
    if not difference:
        return None
    normal = _stats().norm
    reach = normal.ppf(1 - LEVEL / 2 / tests) + normal.ppf(POWER)
    return max(2, math.ceil(float((reach * deviation / difference) ** 2)))


def by_question(values: Values, groups: Groups) -> Values:
    """Average the rows of each question: ``[N]`` to ``[questions]``."""
    sums, counts = _by_group(values, groups)
    return np.divide(sums, counts)


def _by_group(values: Values, groups: Groups | None) -> tuple[Values, Values]:
    """The sum over each group, and how many rows it has."""
    if groups is None:
        return values, np.ones(len(values))
    sums: Values = np.bincount(groups, weights=values).astype(np.float64)
    return sums, np.bincount(groups).astype(np.float64)


def _batch(width: int) -> int:
    """How many of the draws to make at a time."""
    return max(1, AT_ONCE // width)
