"""A page as one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from lightning_prompts.report.blocks import Block, Heading, Picture, Pictures, Table, Text, visible
from lightning_prompts.report.theme import VARIABLES

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 0.5rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }
p { max-width: 56rem; margin: 0.5rem 0; }
p.note, figcaption { color: var(--faint); font-size: 0.9rem; }
div.table { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th.text, td.text { text-align: left; white-space: pre-wrap; overflow-wrap: break-word; max-width: 22rem;
  min-width: 5rem; }
figure { margin: 1rem 0; }
figure div.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure svg { max-width: 100%; height: auto; }
"""


def write(title: str, blocks: Sequence[Block]) -> str:
    """The page.

    Args:
        title: What the browser shows above it.
        blocks: What stands on it.

    Returns:
        HTML that is also well-formed XML.
    """
    body = "\n".join(_block(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{_escaped(title)}</title>\n<style>{VARIABLES}{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escaped(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        css = ' class="note"' if block.note else ""
        return f"<p{css}>{_escaped(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    assert isinstance(block, Pictures)
    pictures = "\n".join(_picture(picture) for picture in block.items)
    return (
        f'<figure><div class="pictures">{pictures}</div>\n<figcaption>{_escaped(block.caption)}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        classes = [' class="text"' if index < table.texts else "" for index in range(len(cells))]
        return "<tr>" + "".join(
            f"<{tag}{css}>{_escaped(cell)}</{tag}>" for css, cell in zip(classes, cells, strict=True)
        ) + "</tr>"  # fmt: skip

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="table"><table>\n<thead>{row(table.header, "th")}</thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _picture(picture: Picture) -> str:
    """Inlined: its style is the page's, and its names are its own, since all pictures share one document."""
    svg = re.sub(r"<style.*?</style>", "", picture.svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{picture.name}-', svg)
    svg = re.sub(r'href="#', f'href="#{picture.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{picture.name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_escaped(picture.alt)}" ', 1)
