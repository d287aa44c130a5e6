"""The pictures of a page: bars, curves, cost against quality, and a prompt's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lightning_prompts.report.labels import Point, at_the_right, beside, shown, width
from lightning_prompts.report.statistics import Values
from lightning_prompts.report.theme import DASHES, FAINT, LINE, MARKS, SERIES, TEXT, style, svg

SQUARE = 4.2  # inches
FAR = 5  # with ends so many times as far as others, an axis is logarithmic


@dataclass(frozen=True)
class Look:
    """How a method looks in every picture.

    Args:
        place: Among the methods that have a colour; ``None`` for one of many that have not.
    """

    place: int | None

    @property
    def colour(self) -> str:
        """Its colour."""
        return FAINT if self.place is None else SERIES[self.place]

    @property
    def mark(self) -> str:
        """The mark of its points."""
        return "o" if self.place is None else MARKS[self.place]


@dataclass(frozen=True)
class Bar:
    """A method's figure.

    Args:
        name: The method.
        look: How it looks.
        values: One per seed.
        interval: Its 95% interval, where there is one.
        over_seeds: Whether that is over seeds; over questions otherwise.
    """

    name: str
    look: Look
    values: Sequence[float]
    interval: tuple[float, float] | None
    over_seeds: bool


@dataclass(frozen=True)
class Curve:
    """A method's line.

    Args:
        name: The method.
        look: How it looks.
        x: ``[N]``.
        y: The mean over seeds, ``[N]``.
        low: The smallest of the seeds, ``[N]``.
        high: The largest, ``[N]``.
    """

    name: str
    look: Look
    x: Values
    y: Values
    low: Values
    high: Values


@dataclass(frozen=True)
class Spot:
    """What a method has cost and found.

    Args:
        name: The method.
        look: How it looks.
        cost: One per seed; empty where nothing was trained.
        quality: One per seed.
    """

    name: str
    look: Look
    cost: Sequence[float]
    quality: Sequence[float]


@dataclass(frozen=True)
class Track:
    """The way of one vector of a prompt.

    Args:
        name: Its place in the prompt, and the token that is nearest in the end.
        points: Where it was, ``[N, 2]``.
        token: Where that token is, ``[2]``.
    """

    name: str
    points: Values
    token: Values


def thousands(value: float) -> str:
    """A large number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def bars(title: str, items: Sequence[Bar], percent: bool) -> str:
    """Horizontal bars from zero, the seeds as dots, the 95% interval as a whisker; a picture as SVG."""
    with style():
        names = [shown(item.name) for item in items]
        margin = max(width(name) for name in names) / 72 + 0.25
        right = 0.65
        size = (margin + 3.2 + right, 0.27 * len(items) + 0.75)
        figure = Figure(figsize=size)
        axes = figure.add_axes((margin / size[0], 0.45 / size[1], 3.2 / size[0], 1 - 0.75 / size[1]))
        means = [sum(item.values) / len(item.values) for item in items]
        # An interval over two seeds can be ten times as long as the bar: it is cut, and an arrow says so.
        longest = max(max(item.values) for item in items)
        limit = max(min(max(item.interval[1] for item in items if item.interval), 1.8 * longest)
                    if any(item.interval for item in items) else 0, 1.1 * longest) or 1.0  # fmt: skip
        limit = min(1.03 * limit, 1.0) if percent else 1.03 * limit
        for row, (item, mean) in enumerate(zip(items, means, strict=True)):
            axes.barh(row, mean, height=0.62, color=item.look.colour, alpha=0.55, linewidth=0)
            if len(item.values) > 1:
                axes.plot(item.values, [row] * len(item.values), "o", color=item.look.colour, markersize=3.2,
                          markeredgewidth=0, clip_on=False)  # fmt: skip
            if item.interval:
                low, high = max(0.0, item.interval[0]), min(limit, item.interval[1])
                axes.plot([low, high], [row, row], color=TEXT, linewidth=1.3 if item.over_seeds else 0.7,
                          solid_capstyle="butt", zorder=4)  # fmt: skip
                for end, mark in ((low, "|"), (high, ">" if item.interval[1] > limit else "|")):
                    axes.plot(
                        [end], [row], mark, color=TEXT, markersize=5 if mark == "|" else 3.5, clip_on=False, zorder=4
                    )
            text = f"{mean:.1%}" if percent else f"{mean:.3g}" if mean >= 100 else f"{mean:.2f}"
            axes.annotate(text, (1, row), xycoords=("axes fraction", "data"), xytext=(8, 0),
                          textcoords="offset points", va="center")  # fmt: skip
        axes.set(xlim=(0, limit), ylim=(len(items) - 0.45, -0.55), yticks=range(len(items)), title=title)
        axes.set_yticks(range(len(items)), names)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if percent:
            _percent(axes, "x")
        return svg(figure)


def curves(title: str, items: Sequence[Curve], x_label: str, percent: bool) -> str:
    """One line per method, a band from the smallest to the largest seed; a picture as SVG."""
    with style():
        figure, axes = _frame(title, [item.name for item in items if item.look.place is not None])
        for item in sorted(items, key=lambda item: item.look.place is not None):
            dashes = DASHES[item.look.place or 0]
            alone = len(item.x) < 3
            axes.plot(item.x, item.y, color=item.look.colour, linestyle=dashes, linewidth=1.6, marker=item.look.mark,
                      markersize=3.5 if alone or len(item.x) < 12 else 0, markeredgewidth=0,
                      alpha=1 if item.look.place is not None else 0.35, clip_on=False)  # fmt: skip
            if item.look.place is not None and (item.high > item.low).any():
                axes.fill_between(item.x, item.low, item.high, color=item.look.colour, alpha=0.15, linewidth=0)
        everything = np.concatenate([item.high for item in items] + [item.low for item in items])
        low, high = float(everything.min()), float(everything.max())
        edge = 0.05 * (high if percent else high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(0 if percent else max(low - edge, 0) if low >= 0 else low - edge, high + edge)
        last = [float(item.x[-1]) for item in items]
        if max(last) > FAR * min(last) > 0:
            _logarithmic(axes, max(1.0, min(float(item.x[0]) for item in items)) / 1.1, max(last))
            x_label += " (logarithmic)"
        else:
            axes.set_xlim(0, max(last) or 1)
        axes.set_xlabel(x_label)
        if percent:
            _percent(axes, "y")
        named = [item for item in items if item.look.place is not None]
        at_the_right(axes, [(float(item.x[-1]), float(item.y[-1])) for item in named],
                     [shown(item.name) for item in named], [item.look.colour for item in named])  # fmt: skip
        return svg(figure)


def costs(title: str, items: Sequence[Spot], x_label: str, percent: bool) -> str:
    """A mark per method at its mean, a dot per seed; what was not trained is a line across; a picture as SVG."""
    with style():
        untrained = [item for item in items if not item.cost]
        trained = [item for item in items if item.cost]
        figure, axes = _frame(title, [item.name for item in untrained])
        everything = [value for item in trained for value in item.cost]
        low, high = min(everything), max(everything)
        if high > FAR * low:
            _logarithmic(axes, low / 1.6, high * 1.6)
            x_label += " (logarithmic)"
        else:
            axes.set_xlim(0, high * 1.12)
        qualities = [value for item in items for value in item.quality]
        edge = 0.1 * (max(qualities) - min(qualities)) or 0.1 * abs(max(qualities)) or 0.1
        axes.set_ylim(max(0.0, min(qualities) - edge), max(qualities) + edge)
        means: list[Point] = []
        dots: list[Point] = []
        for item in trained:
            means.append((sum(item.cost) / len(item.cost), sum(item.quality) / len(item.quality)))
            if len(item.cost) > 1:
                dots += zip(item.cost, item.quality, strict=True)
                axes.plot(item.cost, item.quality, item.look.mark, color=item.look.colour, markersize=2.6, alpha=0.6,
                          markeredgewidth=0, clip_on=False)  # fmt: skip
            axes.plot(
                *means[-1], item.look.mark, color=item.look.colour, markersize=7, markeredgewidth=0, clip_on=False
            )
        for item in untrained:
            axes.axhline(sum(item.quality) / len(item.quality), color=item.look.colour, linewidth=1,
                         linestyle=(0, (4, 3)), alpha=0.8)  # fmt: skip
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        if percent:
            _percent(axes, "y")
        at_the_right(axes, [(axes.get_xlim()[1], sum(item.quality) / len(item.quality)) for item in untrained],
                     [shown(item.name) for item in untrained], [item.look.colour for item in untrained])  # fmt: skip
        beside(axes, means, [shown(item.name) for item in trained], [item.look.colour for item in trained], also=dots)
        return svg(figure)


def paths(title: str, tracks: Sequence[Track], vocabulary: Values) -> str:
    """The ways of a prompt's vectors among the vocabulary's, in the plane that shows most of them; a picture as SVG.

    Args:
        title: Above it.
        tracks: One per vector.
        vocabulary: Some of the vocabulary's, ``[N, 2]``.
    """
    with style():
        size = (SQUARE + 0.2, SQUARE + 0.45)
        figure = Figure(figsize=size)
        axes = figure.add_axes((0.1 / size[0], 0.1 / size[1], SQUARE / size[0], SQUARE / size[1]))
        axes.set_title(title)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set(visible=True, color=LINE)
        axes.plot(vocabulary[:, 0], vocabulary[:, 1], "o", color=FAINT, markersize=2, alpha=0.35, markeredgewidth=0)
        for index, track in enumerate(tracks):
            colour = SERIES[index % len(SERIES)]
            axes.plot(
                track.points[:, 0], track.points[:, 1], "-", color=colour, linewidth=1.2, marker=".", markersize=4
            )
            axes.plot(*track.points[0], "o", markerfacecolor="none", color=colour, markersize=5)
            axes.plot(*track.points[-1], "o", color=colour, markersize=6, markeredgewidth=0)
            axes.plot(*track.token, "x", color=colour, markersize=5)
        points = np.concatenate([vocabulary, *(track.points for track in tracks), np.stack([t.token for t in tracks])])
        low, high = points.min(0), points.max(0)
        middle, reach = (low + high) / 2, 0.58 * float((high - low).max()) or 1.0
        axes.set_xlim(middle[0] - reach, middle[0] + reach)
        axes.set_ylim(middle[1] - reach, middle[1] + reach)
        ends = [(float(track.points[-1][0]), float(track.points[-1][1])) for track in tracks]
        also = [(float(x), float(y)) for track in tracks for x, y in (*_along(track.points), track.token)]
        colours = [SERIES[index % len(SERIES)] for index in range(len(tracks))]
        beside(axes, ends, [shown(track.name, 24) for track in tracks], colours, 8, also)
        return svg(figure)


def _along(points: Values) -> Values:
    """Places on a path, close together: ``[N, 2]``."""
    shares = np.linspace(0, 1, 12, endpoint=False)[:, None, None]
    between: Values = (points[:-1] * (1 - shares) + points[1:] * shares).reshape(-1, 2)
    return between


def _frame(title: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes with room at the right for these names."""
    margin = max((width(shown(name)) for name in names), default=0.0) / 72 + 0.2
    size = (0.55 + 3.4 + margin, 2.9)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.55 / size[0], 0.5 / size[1], 3.4 / size[0], 1 - 0.85 / size[1]))
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    return figure, axes


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = [factor * 10**power for power in range(-3, 13) for factor in ((1, 2, 5) if high < 300 * low else (1,))]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _percent(axes: Axes, which: str) -> None:
    def shown_as(value: float, _: object) -> str:
        return f"{100 * value:.3g}%"

    (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(FuncFormatter(shown_as))


def thinned(line: Values, most: int = 40) -> Values:
    """A long noisy line as means of neighbours: ``[N]``, at most ``most`` long."""
    if len(line) <= most:
        return line
    return np.array([part.mean() for part in np.array_split(line, most)])
