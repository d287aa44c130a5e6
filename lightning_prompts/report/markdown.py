"""A page as Markdown, with its pictures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_prompts.report.page import Block, Heading, Pictures, Table, Text, Verdict, visible


def write(blocks: Sequence[Block], folder: str) -> str:
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
