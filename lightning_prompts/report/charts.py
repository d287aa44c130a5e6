"""The charts of a page: bars, curves, cost against quality, and the path of a prompt.

Matplotlib draws them, and the page colours them, so that they can be read in its light and in its dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lightning_prompts.report.statistics import Values

# The charts are drawn in these colours, each of which becomes a variable of the page. The series' are Okabe & Ito's
# (2008), which colour-blind readers tell apart, some made darker for the light theme and lighter for the dark one.
TEXT, FAINT, LINE = "#1f2328", "#59636e", "#d1d9e0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c0629b", "#b87a00", "#3d93cc", "#8a5a44", TEXT)
_DARK_SERIES = ("#4ea8e0", "#ff8a47", "#2fc79a", "#e79bc9", "#e8b23a", "#a5d8f7", "#c79a86", "#e6edf3")
_DARK = {**dict(zip(SERIES, _DARK_SERIES, strict=True)), FAINT: "#9198a1", LINE: "#3d444d"}
_NAMES = {TEXT: "text", FAINT: "faint", LINE: "line"} | {colour: f"series-{n}" for n, colour in enumerate(SERIES[:-1])}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{_NAMES[colour]}: {shown};" for colour, shown in colours.items())


VARIABLES = (
    f":root {{ color-scheme: light dark; --page: #ffffff; {_variables({colour: colour for colour in _NAMES})} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ --page: #0d1117; {_variables(_DARK)} }} }}\n"
)

# Methods differ in colour, in dashes and in marks, so that a reader does not depend on one of them.
_ON_OFF = ((5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (3, 3), (8, 2), (2, 1, 1, 1), (1, 3))
DASHES: tuple[Any, ...] = ("-", *((0, lengths) for lengths in _ON_OFF))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p")
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 72,  # as in SVG: a pixel is a point
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.markeredgewidth": 0,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
    "svg.fonttype": "path",
    "svg.hashsalt": "lightning-prompts",
}
FAR = 5  # an axis whose values differ by more than this factor is logarithmic


@dataclass(frozen=True)
class Look:
    """How a method looks in every chart.

    Args:
        place: Among the methods that have a colour; ``None`` for a method without one.
    """

    place: int | None

    @property
    def line(self) -> dict[str, Any]:
        """Matplotlib's arguments for a line."""
        if self.place is None:
            return {"color": FAINT, "marker": "o", "linestyle": "-", "alpha": 0.35}
        return {"color": SERIES[self.place], "marker": MARKS[self.place], "linestyle": DASHES[self.place]}

    @property
    def marks(self) -> dict[str, Any]:
        """Matplotlib's arguments for marks without a line."""
        return {**self.line, "linestyle": "none", "clip_on": False}


@dataclass(frozen=True)
class Result:
    """The quality of a method, with its interval or its cost.

    Args:
        name: The method.
        look: How it looks.
        quality: One per seed.
        interval: The 95% interval of the quality, where there is one.
        over_seeds: Whether the interval is over seeds; otherwise it is over questions.
        cost: One per seed; empty where nothing was trained.
    """

    name: str
    look: Look
    quality: Sequence[float]
    interval: tuple[float, float] | None = None
    over_seeds: bool = False
    cost: Sequence[float] = ()

    @property
    def mean(self) -> tuple[float, float]:
        """Mean cost, 0 where nothing was trained, and mean quality."""
        return sum(self.cost) / len(self.cost) if self.cost else 0.0, sum(self.quality) / len(self.quality)


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
class Track:
    """The path of one vector of a prompt.

    Args:
        name: Its place in the prompt, and the token that is nearest in the end.
        points: Where it was, ``[N, 2]``.
        token: Where that token is, ``[2]``.
    """

    name: str
    points: Values
    token: Values


def bars(title: str, items: Sequence[Result], percent: bool) -> str:
    """Draw horizontal bars from zero, seeds as dots, the 95% interval as a whisker.

    Returns:
        The chart as SVG.
    """
    longest = max(max(item.quality) for item in items)
    # An interval over two seeds can be ten times as long as the bar: an arrow shows that it is cut.
    ends = [min(item.interval[1], 1.8 * longest) for item in items if item.interval]
    limit = 1.03 * (max(*ends, 1.1 * longest) if ends else 1.1 * longest) or 1.0
    limit = min(limit, 1.0) if percent else limit
    with _axes(title, 3.2, 0.27 * len(items) + 0.15) as axes:
        for row, item in enumerate(items):
            mean = item.mean[1]
            axes.barh(row, mean, height=0.62, color=item.look.line["color"], alpha=0.55, linewidth=0)
            if len(item.quality) > 1:
                axes.plot(item.quality, [row] * len(item.quality), **{**item.look.marks, "marker": "o"}, markersize=3.2)
            if item.interval:
                low, high = max(0.0, item.interval[0]), min(limit, item.interval[1])
                width = 1.3 if item.over_seeds else 0.7
                axes.plot([low, high], [row, row], color=TEXT, linewidth=width, solid_capstyle="butt", zorder=4)
                for end, mark in ((low, "|"), (high, ">" if item.interval[1] > limit else "|")):
                    axes.plot(end, row, mark, color=TEXT, markersize=4, markeredgewidth=1, clip_on=False, zorder=4)
            text = f"{mean:.1%}" if percent else f"{mean:.3g}" if mean >= 100 else f"{mean:.2f}"
            place: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (1, row), xycoords=("axes fraction", "data"), **place)
        axes.set(xlim=(0, limit), ylim=(len(items) - 0.45, -0.55))
        axes.set_yticks(range(len(items)), shown([item.name for item in items], 30))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _number_axis(axes, "x", percent)
        return _svg(axes)


def curves(title: str, items: Sequence[Curve], x_label: str, percent: bool) -> str:
    """Draw one line per method, and a band from the smallest to the largest seed.

    Returns:
        The chart as SVG.
    """
    everything = np.concatenate([item.high for item in items] + [item.low for item in items])
    low, high = float(everything.min()), float(everything.max())
    edge = 0.05 * (high if percent else high - low) or 0.05 * abs(high) or 0.05
    last = [float(item.x.max()) for item in items]
    with _axes(title, 3.4, 2.05) as axes:
        for item in sorted(items, key=lambda item: item.look.place is not None):
            size = 3.5 if len(item.x) < 12 else 0
            axes.plot(item.x, item.y, **item.look.line, linewidth=1.6, markersize=size, clip_on=False)
            if item.look.place is not None and (item.high > item.low).any():
                colour = item.look.line["color"]
                axes.fill_between(item.x, item.low, item.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0 if percent else max(low - edge, 0) if low >= 0 else low - edge, high + edge)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if max(last) > FAR * min(last) > 0:
            x_label += _logarithmic(axes, max(1.0, min(float(item.x[0]) for item in items)) / 1.1, max(last))
        else:
            axes.set_xlim(0, max(last) or 1)
        axes.set_xlabel(x_label)
        _number_axis(axes, "x")
        if percent:
            _number_axis(axes, "y", percent)
        return _svg(axes, [(item.name, item.look, item.look.line) for item in items])


def costs(title: str, items: Sequence[Result], x_label: str, percent: bool) -> str:
    """Draw a large mark per method at its mean, a small one per seed, and the Pareto frontier.

    A method that was not trained is a dashed line across.

    Returns:
        The chart as SVG.
    """
    everything = [value for item in items for value in item.cost]
    qualities = [value for item in items for value in item.quality]
    edge = 0.1 * (max(qualities) - min(qualities)) or 0.1 * abs(max(qualities)) or 0.1
    across: dict[str, Any] = {"linewidth": 1, "marker": "", "alpha": 0.8}
    legend: list[tuple[str, Look | None, dict[str, Any]]] = []
    with _axes(title, 3.4, 2.05) as axes:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if max(everything) > FAR * min(everything):
            x_label += _logarithmic(axes, min(everything) / 1.6, max(everything) * 1.6)
        else:
            axes.set_xlim(0, max(everything) * 1.12)
        axes.set_ylim(max(0.0, min(qualities) - edge), max(qualities) + edge)
        for item in sorted(items, key=lambda item: bool(item.cost)):
            if not item.cost:
                dashes = {"linestyle": (0, (7 / (len(legend) + 1), 3))}
                axes.axhline(item.mean[1], **{**item.look.line, **across, **dashes})
                legend.append((item.name, item.look, {**item.look.line, **across, **dashes}))
                continue
            if len(item.cost) > 1:
                axes.plot(item.cost, item.quality, **{**item.look.marks, "alpha": 0.6}, markersize=2.6)
            axes.plot(*item.mean, **item.look.marks, markersize=7)
            legend.append((item.name, item.look, item.look.marks))
        best = frontier([item.mean for item in items], larger=percent)
        if len(best) > 1:
            line: dict[str, Any] = {"color": FAINT, "linewidth": 0.9, "linestyle": "-"}
            axes.plot(*zip(*best, strict=True), zorder=1, drawstyle="steps-post", **line)
            legend.append(("Pareto frontier", None, line))
        axes.set_xlabel(x_label)
        _number_axis(axes, "x")
        if percent:
            _number_axis(axes, "y", percent)
        return _svg(axes, legend)


def frontier(points: Sequence[tuple[float, float]], larger: bool) -> list[tuple[float, float]]:
    """Find the points of cost and quality that no other point beats in one without losing in the other.

    Args:
        points: Cost and quality.
        larger: Whether more quality is a larger number.

    Returns:
        Those points that have a cost, by cost: a point without one only beats others.
    """
    found: list[tuple[float, float]] = []
    best = -np.inf
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1] if larger else point[1])):
        worth = quality if larger else -quality
        if worth > best:
            best = worth
            found.append((cost, quality))
    return [point for point in found if point[0] > 0]


def paths(title: str, tracks: Sequence[Track], vocabulary: Values) -> str:
    """Draw the paths of a prompt's vectors among the vocabulary's, in the plane that shows most of them.

    Args:
        title: Above it.
        tracks: One per vector.
        vocabulary: Some of the vocabulary's, ``[N, 2]``.

    Returns:
        The chart as SVG.
    """
    with _axes(title, 4.2, 4.2) as axes:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set(visible=True, color=LINE)
        axes.plot(*vocabulary.T, "o", color=FAINT, markersize=2, alpha=0.35)
        legend: list[tuple[str, Look | None, dict[str, Any]]] = []
        for index, track in enumerate(tracks):
            colour: dict[str, Any] = {"color": SERIES[index % len(SERIES)]}
            axes.plot(*track.points.T, "-", linewidth=1.2, marker=".", markersize=4, **colour)
            axes.plot(*track.points[0], "o", markerfacecolor="none", markeredgewidth=1, markersize=5, **colour)
            axes.plot(*track.points[-1], "o", markersize=6, **colour)
            axes.plot(*track.token, "x", markeredgewidth=1, markersize=5, **colour)
            legend.append((track.name, None, {"marker": "o", "linewidth": 1.2, **colour}))
        points = np.concatenate([vocabulary, *(track.points for track in tracks), np.stack([t.token for t in tracks])])
        low, high = points.min(0), points.max(0)
        middle, reach = (low + high) / 2, 0.53 * float((high - low).max()) or 1.0
        axes.set_xlim(middle[0] - reach, middle[0] + reach)
        axes.set_ylim(middle[1] - reach, middle[1] + reach)
        return _svg(axes, legend)


def thinned(line: Values, most: int = 40) -> Values:
    """Shorten a long noisy line to means of neighbours: ``[N]``, at most ``most`` long."""
    if len(line) <= most:
        return line
    return np.array([part.mean() for part in np.array_split(line, most)])


def shown(texts: Sequence[str], most: int) -> list[str]:
    """Write texts as the font can draw them, each in one line.

    Args:
        texts: The texts.
        most: How many characters a text has; more where texts that differ would look the same.
    """
    glyphs = get_font(findfont("DejaVu Sans"))
    lines = [
        "".join(
            char if char.isprintable() and glyphs.get_char_index(ord(char)) else char.encode("unicode_escape").decode()
            for char in text
        )
        for text in texts
    ]
    while True:
        start, end = most // 2, (most - 1) // 2  # names of methods often begin alike
        cut = [line if len(line) <= most else f"{line[:start]}…{line[len(line) - end :]}" for line in lines]
        if len(set(cut)) == len(set(lines)):
            return cut
        most += 1


def thousands(value: float) -> str:
    """Write a large number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@contextmanager
def _axes(title: str, width: float, height: float) -> Iterator[Axes]:
    """Open axes of so many inches; names around them get the room that they need."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_title(title)
        yield axes


def _svg(axes: Axes, legend: Sequence[tuple[str, Look | None, dict[str, Any]]] = ()) -> str:
    """Write a chart as SVG: colours are variables, and its own style gives them values in a file of its own.

    Args:
        axes: With everything drawn.
        legend: Name, look and arguments of each line; methods without a colour share one name.
    """
    named = {"other methods" if look and look.place is None else name: style for name, look, style in legend}
    if named:
        lines: list[Artist] = [Line2D([], [], **{**style, "clip_on": True}) for style in named.values()]
        # Matplotlib leaves out names that begin with an underscore.
        names = [f" {name}" if name.startswith("_") else name for name in shown(list(named), 26)]
        axes.legend(lines, names, loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=2.6, fontsize=8)
    file = io.StringIO()
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    head, rest = text.split(">", 1)
    return f"{head}>\n<style>{VARIABLES}</style>{rest}".replace("\n\n", "\n")


def _logarithmic(axes: Axes, low: float, high: float) -> str:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = [factor * 10**power for power in range(-3, 13) for factor in ((1, 2, 5) if high < 300 * low else (1,))]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    return " (logarithmic)"


def _number_axis(axes: Axes, which: str, percent: bool = False) -> None:
    """Write the numbers of an axis as shares, or shortly."""
    formatter = FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if percent else thousands(value))
    (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter(formatter)
