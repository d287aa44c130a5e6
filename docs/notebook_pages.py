"""MkDocs hook: shows the notebooks as pages, so that their links are checked and nothing is loaded from other hosts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\([\w./-]+)\.ipynb\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, beside the notebook itself."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        page = f"{file.src_uri.removesuffix('.ipynb')}.md"
        files.append(File.generated(config, page, content=as_markdown(notebook, Path(file.src_uri).name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to notebooks lead to their pages."""
    return LINK.sub(r"\1.md)", markdown)


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """The cells of a notebook and their outputs as a page."""
    title, *cells = notebook["cells"]
    parts = ["".join(title["source"]), f'<a href="../{name}" download>Download this notebook</a>']
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    """An output in the richest form that it has."""
    data = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        html = html if html.startswith("<pre") else re.sub(r"\n *", "", html)  # indented HTML is code in Markdown
        return f'<div class="output">{html}</div>'
    if "text/markdown" in data:
        return f'<div class="output" markdown>\n\n{data["text/markdown"]}\n\n</div>'
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{data["image/png"].strip()}">'
    text = "".join(output.get("text", "")) or data["text/plain"]
    return f'<div class="output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>'
