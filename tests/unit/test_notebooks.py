"""The notebooks run from top to bottom, here on a tiny model, and can be read on a phone."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.models import SMALL
from support.odd_tokenizers import save_model
from support.project import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model in a folder, as exports name a folder."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "byte level", f"random:llama,{SMALL},max_position_embeddings=2048")
    (folder / "chat_template.jinja").write_text(CHAT)
    return str(folder)


def cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """Kind, source and tags of each cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in notebook["cells"]
    ]


def run(source: str, name: str, values: dict[str, Any]) -> None:
    """Run a cell, and show the value of its last line as a notebook does."""
    body = ast.parse(source, name).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), values)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval"), values)
        show = getattr(value, "_repr_html_", lambda: repr(value))
        assert value is None or show()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    values: dict[str, Any] = {"__name__": "__main__"}
    for kind, source, tags in cells(path):
        if kind == "code" and "skip-execution" not in tags:
            run(source, path.name, values)
        if "parameters" in tags:
            quick = {"LM": tiny_folder, "STEPS": 1, "QUESTIONS": 4}
            assert quick.keys() <= values.keys()
            values |= quick


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small(path: Path) -> None:
    listed = cells(path)
    code = [(source, tags) for kind, source, tags in listed if kind == "code"]
    assert [number for number, (_, tags) in enumerate(code) if "skip-execution" in tags] == [0]
    assert all(line.startswith("%pip install") for line in code[0][0].splitlines())
    assert listed[0][1].startswith("# ")
    assert path.stat().st_size < 250_000
    assert all(len(source.splitlines()) <= 25 for _, source, _ in listed)
    assert all(len(line) <= 110 for source, _ in code for line in source.splitlines())


def test_notebooks_have_outputs() -> None:
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert any(cell.get("outputs") for cell in notebook["cells"]), path.name
