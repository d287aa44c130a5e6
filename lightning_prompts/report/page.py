"""The page: the blocks that it consists of, its HTML and Markdown, and how it writes numbers."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from lightning_prompts.report.charts import VARIABLES
from lightning_prompts.report.statistics import FLOOR
from lightning_prompts.runs.tables import cell

NONE = "–"
COLUMNS = 5  # methods side by side in a table
T = TypeVar("T")


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: Its text, plain as all texts of blocks: the writer of a page escapes them.
        level: 1 for the page's title, 2 for a part, and so on.
    """

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: Its text.
        kind: ``note`` says that something is missing, ``warning`` that a reader may be misled.
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a reader should know first.

    Args:
        items: A word, a sentence, and a command or an empty text.
    """

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        header: A text for each column.
        rows: A text for each cell, which may have several lines.
        texts: How many columns, from the left, are texts; the others are numbers.
        grey: The row of the baseline, if it should be told apart.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    grey: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        name: A file name without its suffix, unique on the page.
        svg: The picture with its own style, which follows the reader's colour scheme.
        alt: What it shows, for those who do not see it.
    """

    name: str
    svg: str
    alt: str

    @property
    def inline(self) -> Markup:
        """The SVG as a part of the page: in the page's style, and with ids that no other picture has."""
        svg = re.sub(r"<style.*?</style>", "", self.svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        label = escape(visible(self.alt))
        return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # of our own charts


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, where there is room.

    Args:
        items: The pictures.
        caption: What they have in common.
    """

    items: Sequence[Picture]
    caption: str


Block: TypeAlias = Heading | Text | Verdict | Table | Pictures


def visible(text: str) -> str:
    """Replace control characters and halves of characters: JSON and file names allow them, pages do not."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "�", text)


def html(title: str, blocks: Sequence[Block]) -> str:
    """Write a page as one file that needs nothing else, and runs no script but its own.

    Args:
        title: What the browser shows above it.
        blocks: The page.

    Returns:
        HTML that is also well-formed XML.
    """
    environment, template = _template()
    script = environment.get_template("sort.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    named = [(type(block).__name__, block) for block in blocks]
    return template.render(title=title, blocks=named, variables=VARIABLES, script=Markup(script), digest=digest)


@cache
def _template() -> tuple[Environment, Template]:
    environment = Environment(
        loader=PackageLoader("lightning_prompts.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment, environment.get_template("page.html")


def markdown(blocks: Sequence[Block], folder: str) -> str:
    """Write a page.

    Args:
        blocks: The page.
        folder: Where the pictures are, relative to the page.

    Returns:
        GitHub-flavoured Markdown.
    """
    return "\n\n".join(_block(block, folder) for block in blocks) + "\n"


def _escaped(text: str) -> str:
    """Escape a cell: Markdown's signs mean nothing, and line ends stay."""
    return _marked(text.replace("\r", "")).replace(">", "&gt;").replace("\n", "<br>")


def _prose(text: str) -> str:
    """Escape a paragraph, in which there may be names from runs."""
    return _marked(text).replace("\r", " ").replace("\n", " ")


def _marked(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(text)).replace("&", "&amp;").replace("<", "&lt;")


def _block(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_prose(block.text)}"
    if isinstance(block, Text):
        return {"": "{}", "note": "*{}*", "warning": "> {}"}[block.kind].format(_prose(block.text))
    if isinstance(block, Verdict):
        return "\n".join(f"- **{word}**: {_prose(f'{text} {command}'.strip())}" for word, text, command in block.items)
    if isinstance(block, Table):
        rules = ["---" if index < block.texts else "---:" for index in range(len(block.header))]
        rows = [[_escaped(cell) for cell in row] for row in (block.header, *block.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])
    assert isinstance(block, Pictures)
    pictures = "\n".join(f"![{_prose(item.alt)}]({folder}/{item.name}.svg)" for item in block.items)
    return f"{pictures}\n\n*{_prose(block.caption)}*"


# --- what sections share ----------------------------------------------------------------------------------------------


def lacking(what: str, names: Sequence[str]) -> list[Block]:
    """Write a note about the methods that lack a file; nothing if there are none."""
    return [Text(f"Without {what}: {', '.join(names)}.", "note")] if names else []


def side_by_side(items: Sequence[T], size: int = COLUMNS) -> Iterator[Sequence[T]]:
    """Split items into parts of at most so many, as even as possible."""
    if items:
        count = -(-len(items) // size)
        size = -(-len(items) // count)
    for start in range(0, len(items), size):
        yield items[start : start + size]


# --- numbers ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], percent: bool = False) -> str:
    """Write a mean and the standard deviation over seeds."""
    if not values:
        return NONE
    scale, digits = (100, 1) if percent else (1, 3)
    return f"{cell([scale * value for value in values], digits)}{'%' if percent else ''}"


def interval(ends: tuple[float, float] | None, percent: bool = False, signed: bool = False) -> str:
    """Write an interval; one of shares ends at 0 and 1, one of differences has signs."""
    if ends is None:
        return NONE
    low, high = ends
    if percent and not signed:
        low, high = max(0.0, low), min(1.0, high)
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    return f"[{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


def difference(value: float, percent: bool = False) -> str:
    """Write a difference; one of shares is in points."""
    return f"{100 * value:+.1f}" if percent else f"{value:+.3f}"


def p_value(value: float, drawn: float | None = None) -> str:
    """Write a p-value with four digits, as many as 10,000 draws give.

    Args:
        value: The p-value, or what a correction has made of it.
        drawn: The p-value before the correction. At the floor of what draws can give, it is only a bound.

    >>> p_value(0.0314), p_value(1 / 10_001), p_value(3 / 10_001, 1 / 10_001)
    ('0.0314', '≤ 0.0001', '≤ 0.0003')
    """
    bound = math.isclose(value if drawn is None else drawn, FLOOR)
    return f"{'≤ ' if bound else ''}{value:.4f}"


def amount(value: float) -> str:
    """Write a count, or a measured amount."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}" if value >= 1 else f"{value:.3g}"
