"""How pictures look: drawn by matplotlib, coloured by the page, so that they can be read in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Drawn in these; each is a variable of the page in the end. The series' are Okabe & Ito's (2008), which those who see
# few colours tell apart, some darker in light and lighter in dark.
TEXT, FAINT, LINE = "#1f2328", "#59636e", "#d1d9e0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c0629b", "#b87a00", "#3d93cc", "#8a5a44", TEXT)
_DARK = {
    TEXT: "#e6edf3", FAINT: "#9198a1", LINE: "#3d444d",
    "#0072b2": "#4ea8e0", "#d55e00": "#ff8a47", "#009e73": "#2fc79a", "#c0629b": "#e79bc9", "#b87a00": "#e8b23a",
    "#3d93cc": "#a5d8f7", "#8a5a44": "#c79a86",
}  # fmt: skip
_NAMES = {TEXT: "text", FAINT: "faint", LINE: "line"} | {colour: f"series-{n}" for n, colour in enumerate(SERIES[:-1])}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{_NAMES[colour]}: {shown};" for colour, shown in colours.items())


VARIABLES = (
    f":root {{ color-scheme: light dark; --page: #ffffff; {_variables({colour: colour for colour in _NAMES})} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ --page: #0d1117; {_variables(_DARK)} }} }}\n"
)

# By place: in colour, in dashes and in marks, so that no line depends on one of them.
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (3, 3)),
    (0, (8, 2)),
    (0, (2, 1, 1, 1)),
    (0, (1, 3)),
)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for the pictures of a page."""
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
        "axes.edgecolor": FAINT, "axes.labelcolor": TEXT, "text.color": TEXT, "xtick.color": FAINT,
        "ytick.color": FAINT, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6,
        "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "svg.fonttype": "path", "svg.hashsalt": "lightning-prompts", "text.parse_math": False,
        "figure.dpi": 72,  # as in SVG: a pixel is a point
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def svg(figure: Figure) -> str:
    """A figure as SVG, with its colours as variables and a style that says what they are, for a file of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    head, rest = text.split(">", 1)
    return f"{head}>\n<style>{VARIABLES}</style>{rest}".replace("\n\n", "\n")
