"""Rules that no linter knows: every tensor says where it is, and no file is large."""

from __future__ import annotations

import ast

from support.project import ROOT, modules

FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


def without_device(source: str) -> list[int]:
    """Lines that make a tensor on whatever the default device is; modules and what is built on meta may do so."""
    found: list[int] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef) and any("Module" in ast.unparse(base) for base in node.bases):
            return
        if isinstance(node, ast.With) and any("torch.device(" in ast.unparse(item) for item in node.items):
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            found.extend([] if any(keyword.arg == "device" for keyword in node.keywords) else [node.lineno])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def test_every_tensor_says_where_it_is() -> None:
    """Lightning configures a model under the accelerator as default device, where a CPU's generator cannot draw."""
    assert without_device("x = torch.zeros(3)\ny = torch.zeros(3, device='cpu')\n") == [1]
    wrong = {name: lines for name, path in modules() if (lines := without_device(path.read_text()))}
    assert not wrong


def test_no_file_is_large() -> None:
    for folder in ("lightning_prompts", "datamodules", "callbacks", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*"):
            assert not path.is_file() or path.stat().st_size < 250_000, path
