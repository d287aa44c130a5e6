"""Names that stand beside what they name, and do not lie on top of each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextPath
from matplotlib.transforms import Bbox

from lightning_prompts.report.theme import LINE

Point = tuple[float, float]
LEADER = (0, (1, 2.5))  # dots
NEAR = ((6.0, 0.0), (-6.0, 0.0), (0.0, 8.0), (0.0, -8.0), (5.0, 8.0), (5.0, -8.0), (-5.0, 8.0), (-5.0, -8.0))


def shown(text: str, most: int = 30) -> str:
    """A text as the font can draw it, in one line, and not too long."""
    glyphs = get_font(findfont("DejaVu Sans"))
    line = "".join(
        char if char.isprintable() and glyphs.get_char_index(ord(char)) else char.encode("unicode_escape").decode()
        for char in text
    )
    return line if len(line) <= most else f"{line[: most - 1]}…"


@cache
def width(text: str, size: float = 9) -> float:
    """How wide a text is, in points."""
    return float(TextPath((0, 0), text, prop=FontProperties(family="DejaVu Sans", size=size)).get_extents().x1)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places on a line that are as near as possible to the wanted ones, with a gap between neighbours.

    Args:
        wanted: In any order.
        gap: The least distance; less where there is no room for it.
        low: Where the line begins.
        high: Where it ends.

    Returns:
        A place for each.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    # Without their gaps, places must not fall: means of neighbours that would are those that move least.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            last, count = pools.pop()
            pools[-1] = [(pools[-1][0] * pools[-1][1] + last * count) / (pools[-1][1] + count), pools[-1][1] + count]
    flat = [place for place, count in pools for _ in range(int(count))]
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = min(max(flat[rank], low), high - (len(wanted) - 1) * gap) + rank * gap
    return places


def at_the_right(axes: Axes, ends: Sequence[Point], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Write names in the margin at the right, each tied to its line's end; axes must have their final limits."""
    _, bottom, right, top = axes.get_window_extent().extents
    points = axes.transData.transform(ends)
    heights = spread([float(y) for _, y in points], 11, bottom, top)
    back = axes.transData.inverted()
    for (x, y), height, text, colour in zip(points, heights, texts, colours, strict=True):
        corner = (right + 6, height)
        line = back.transform([(min(x, right), y), (right + 1, y), (right + 5, height)])
        # Dotted, or a line that ends early seems to go on to the right at the same height.
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.8, alpha=0.6, linestyle=LEADER, clip_on=False,
                  zorder=1)  # fmt: skip
        axes.annotate(text, corner, xycoords="figure points", color=colour, va="center", annotation_clip=False)


def beside(
    axes: Axes, points: Sequence[Point], texts: Sequence[str], colours: Sequence[str], size: float = 9,
    also: Sequence[Point] = (),
) -> None:  # fmt: skip
    """Write names next to points, where there is room; a thin line leads to one that had to go further away.

    Args:
        axes: With their final limits.
        points: In data coordinates.
        texts: One for each.
        colours: One for each.
        size: In points.
        also: Further points that names must not lie on.
    """
    places = axes.transData.transform([*points, *also])
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places]
    frame = axes.get_window_extent()
    for (x, y), text, colour in zip(places, texts, colours, strict=False):
        wide, high = width(text, size), 1.2 * size
        best: tuple[float, Bbox, float] | None = None
        for far in (1.0, 2.5, 4.0, 6.0):
            for dx, dy in NEAR:
                corner_x = x + dx * far - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
                box = Bbox.from_bounds(corner_x, y + dy * far - high / 2, wide, high)
                inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
                cost = sum(box.overlaps(other) for other in taken) + (0 if inside else 2)
                if best is None or cost < best[0]:
                    best = (cost, box, far)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        _, box, far = best
        taken.append(box)
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        axes.annotate(
            text, middle, xycoords="figure points", color=colour, fontsize=size, ha="center", va="center",
            annotation_clip=False,
        )  # fmt: skip
        if far > 1:
            near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            ends = axes.transData.inverted().transform([(x, y), near])
            axes.plot(ends[:, 0], ends[:, 1], color=LINE, linewidth=0.7, zorder=1)
