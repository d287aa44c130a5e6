"""The project's own rules: every YAML works, imports run one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from lightning_prompts.cli import PromptCLI
from support.pretend_device import ROOT
from support.project import CONFIGS, modules

# Who may import whom, top to bottom: a package may import those above it in its own list, and itself.
ALLOWED = {
    "lightning_prompts.types": set(),
    "lightning_prompts.errors": set(),
    "lightning_prompts.template": {"types", "errors"},
    "lightning_prompts.answers": {"types", "errors", "template"},
    "lightning_prompts.files": {"errors"},
    "lightning_prompts.processes": {"types", "errors"},
    "lightning_prompts.environment": set(),
    "lightning_prompts.run_folder": {"environment", "errors", "files", "lm", "methods"},
    "lightning_prompts.report": {"errors", "files", "cli"},
    "lightning_prompts.checkpoints": {"errors", "files"},
    "lightning_prompts.lm": {"types", "errors", "template", "files", "randomness"},
    "lightning_prompts.parallel": {"errors"},
    "lightning_prompts.randomness": set(),
    "lightning_prompts.prompts": {"types", "errors", "template", "lm", "randomness"},
    "lightning_prompts.objectives": {"types", "errors", "template", "answers", "lm", "estimators"},
    "lightning_prompts.estimators": {"types", "errors", "template", "lm", "randomness"},
    "lightning_prompts.refiners": {"types", "errors", "template", "lm", "randomness"},
    "lightning_prompts.search": {"types", "errors", "template", "lm", "objectives", "processes"},
    "lightning_prompts.dln": {"types", "errors", "template", "answers", "lm", "search", "processes"},
    "lightning_prompts.methods": {
        "types",
        "checkpoints",
        "errors",
        "template",
        "lm",
        "prompts",
        "objectives",
        "estimators",
        "search",
        "refiners",
        "dln",
        "answers",
        "randomness",
        "processes",
    },
    "lightning_prompts.export": {
        "types",
        "errors",
        "template",
        "files",
        "lm",
        "prompts",
        "dln",
        "methods",
        "cli",
        "__version__",
    },
    "lightning_prompts.studies": {"errors", "files", "cli", "methods"},
    "lightning_prompts.datamodules": {"types", "errors", "template", "answers", "files"},
    "lightning_prompts.callbacks": {"types", "errors", "methods", "objectives", "files", "lm"},
}


FREE = {
    "lightning_prompts",
    "lightning_prompts.accelerators",
    "lightning_prompts.__main__",
    "lightning_prompts.memory_plan",
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_parses_and_instantiates(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    text = config.read_text()
    parts = yaml.safe_load(text)
    missing = {"model": "FixedPrompt", "data": "Antonyms"}
    rest = [word for part, name in missing.items() if part not in parts for word in (f"--{part}", name)]
    for name in ("fit", "test"):  # what the command line would run with these classes
        monkeypatch.setattr(PromptCLI, name, lambda cli, **kwargs: built.append(kwargs["model"]), raising=False)
        PromptCLI([name, "-c", str(config), *rest, "--trainer.default_root_dir", str(tmp_path)])
    assert len(built) == 2
    if "model" not in parts:
        return
    for axis in ("prompt:", "estimator:", "objective:"):
        assert axis in text, f"a YAML opens with its triple; {axis} is missing"


def test_imports_run_one_way() -> None:
    checked = 0
    for name, path in modules():
        home = next((home for home in ALLOWED if name == home or name.startswith(home + ".")), None)
        if home is None:
            assert name in FREE or name.startswith("lightning_prompts.cli"), f"{name} has no line in ALLOWED"
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for imported in names:
                root, _, rest = imported.partition(".")
                if root == "lightning_prompts" and not imported.startswith(home):
                    checked += 1
                    assert not rest or rest.split(".")[0] in ALLOWED[home], f"{name} imports {imported}"
    assert checked > 40


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
             "zeros"}  # fmt: skip


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
