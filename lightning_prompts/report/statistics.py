"""Intervals and tests: over seeds by Student's t, over questions by resampling and by swapping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
EXACT = 14  # with so many questions that differ, or fewer, all swaps are counted instead of drawn
AT_ONCE = 4_000_000  # random numbers in memory

Values: TypeAlias = NDArray[np.float64]
Groups: TypeAlias = NDArray[np.int64]


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Student's t distribution, turned around.

    Args:
        freedom: Degrees of freedom, at least 1.
        probability: Above one half.

    Returns:
        The value that stays above ``t`` with that probability (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_two_sided(angle, freedom) < 2 * probability - 1 else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_two_sided(angle: float, freedom: int) -> float:
    """The probability of ``abs(t) < sqrt(freedom) * tan(angle)``: a sum that ends."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a mean over independent runs, by Student's t.

    Args:
        values: One per seed.

    Returns:
        Its ends; ``None`` for a single run, which says nothing about others.
    """
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return mean - reach, mean + reach


def bootstrap(
    values: Values, generator: np.random.Generator, groups: Groups | None = None
) -> tuple[float, float] | None:
    """The 95% interval of a mean over questions, by the percentiles of resampled means (Efron 1979).

    Args:
        values: ``[N]``.
        generator: Draws the samples.
        groups: ``[N]``, which rows belong to the same question and are drawn together, counted from 0; ``None`` where
            every row is a question of its own.

    Returns:
        Its ends; ``None`` for a single question, which says nothing about others.
    """
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        return None
    means = []
    for size in _parts(len(sums)):
        drawn = generator.integers(len(sums), size=(size, len(sums)))
        means.append(sums[drawn].sum(-1) / counts[drawn].sum(-1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def permutation(differences: Values, generator: np.random.Generator, groups: Groups | None = None) -> float:
    """Whether two methods differ, by swapping them within questions (Fisher's test for pairs).

    Args:
        differences: ``[N]``, of one method to the other on the same row.
        generator: Draws the swaps, where there are too many to count all of them.
        groups: As in `bootstrap`; rows of one question are swapped together.

    Returns:
        How often a swap makes the mean difference as large as it is, two-sided.
    """
    sums, _ = _by_group(differences, groups)
    sums = sums[sums != 0]  # a swap changes nothing there
    least = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= EXACT:
        codes = np.arange(2 ** len(sums))[:, None]
        signs = 1 - 2 * (codes >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= least).mean())
    extreme = 0
    for size in _parts(len(sums)):
        signs = generator.integers(0, 2, size=(size, len(sums)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= least).sum())
    return (extreme + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that none is small by their number alone (Holm 1979).

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


def _by_group(values: Values, groups: Groups | None) -> tuple[Values, Values]:
    """The sum over each group, and how many rows it has."""
    if groups is None:
        return values, np.ones(len(values))
    sums: Values = np.bincount(groups, weights=values).astype(np.float64)
    return sums, np.bincount(groups).astype(np.float64)


def _parts(width: int) -> Iterator[int]:
    """How many of the draws to make at a time."""
    left = DRAWS
    while left:
        size = min(left, max(1, AT_ONCE // max(1, width)))
        yield size
        left -= size
