"""What a page is made of, whatever it is written in. Texts are plain: who writes a page escapes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    """A heading.

    Args:
        text: Its text.
        level: 1 for the page's, 2 for a part's, and so on.
    """

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: Its text.
        note: Whether it says that something is missing.
    """

    text: str
    note: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        header: A text for each column.
        rows: A text for each cell; line ends within are shown as such.
        texts: How many columns, from the left, are texts; the others are numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        name: A file name without its end, unique on the page.
        svg: The picture with its own style, which follows the reader's colour scheme.
        alt: What it shows, for those who do not see it.
    """

    name: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, where there is room.

    Args:
        items: The pictures.
        caption: What they have in common.
    """

    items: Sequence[Picture]
    caption: str


Block: TypeAlias = Heading | Text | Table | Pictures


def visible(text: str) -> str:
    """A text without control characters and halves of characters: JSON and file names allow them, pages do not."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "�", text)
