"""Numbers as the page writes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NONE = "–"


def spread(values: Sequence[float], percent: bool = False) -> str:
    """The mean, and the standard deviation over seeds."""
    if not values:
        return NONE
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * sum(values) / len(values):.{digits}f}"
    several = len(values) > 1 and all(map(math.isfinite, values))
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if several else ""
    return f"{mean}{deviation}{'%' if percent else ''}"


def interval(ends: tuple[float, float] | None, percent: bool = False, signed: bool = False) -> str:
    """An interval; one of shares ends at 0 and 1, one of differences has signs."""
    if ends is None:
        return NONE
    low, high = ends
    if percent and not signed:
        low, high = max(0.0, low), min(1.0, high)
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    return f"[{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


def difference(value: float, percent: bool = False) -> str:
    """A difference: of shares in points."""
    return f"{100 * value:+.1f}" if percent else f"{value:+.3f}"


def p_value(value: float) -> str:
    """A p-value with four digits, as many as 10,000 draws give."""
    return f"{value:.4f}"


def amount(value: float) -> str:
    """A count, or a measured amount."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
