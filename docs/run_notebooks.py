"""Run the notebooks on the embedded model, and store their outputs.

    python docs/run_notebooks.py [NAME ...]

Without names all notebooks run, each in a kernel and an empty folder of its own. Cells with the tag
``skip-execution`` install the packages; they are not run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
KINDS = {"text/plain", "text/html", "text/markdown", "image/png"}  # without widgets


def main(names: Sequence[str]) -> None:
    """Run notebooks, and write them with their new outputs."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        started, notebook = time.time(), nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as place:
            client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": place}})
            client.execute()
        for cell in notebook.cells:
            _tidy(cell)
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.time() - started:.0f} seconds, {path.stat().st_size / 1000:.0f} kB")


def _tidy(cell: Any) -> None:  # noqa: ANN401 - a notebook node
    """Keep what a reader sees: what was printed in one piece, results without widgets, no warnings."""
    cell.metadata.pop("execution", None)
    if cell.cell_type != "code":
        return
    cell.execution_count, shown = None, []
    for output in cell.outputs:
        if output.output_type == "stream":
            if output.name == "stdout" and shown and shown[-1].output_type == "stream":
                shown[-1].text += output.text
            elif output.name == "stdout":
                shown.append(output)
        elif data := {kind: value for kind, value in output.data.items() if kind in KINDS}:
            output.data, output.metadata = data, {}
            if output.output_type == "execute_result":
                output.execution_count = None
            shown.append(output)
    cell.outputs = shown


if __name__ == "__main__":
    main(sys.argv[1:])
