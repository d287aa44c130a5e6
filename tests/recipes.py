"""Carry out the recipes of CONTRIBUTING.md in a copy of the project, and type-check the README's examples.

    python tests/recipes.py

A script and no test, as it runs pytest, ruff and mypy. `make lint` runs it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from support.pages import SMALL, section
from support.project import ROOT

USE = """import torch
from lightning_prompts.callbacks import TextMetrics
from lightning_prompts.datamodules import Addition
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import SoftPromptTuning
from my_reward import Closeness

lm = FrozenLM.load(LMConfig())
nll: list[float] = lm.score(Addition().examples('test'), torch.zeros(4, lm.width)).nll.tolist()
TextMetrics([Closeness()])
SoftPromptTuning(length=4)
"""
WRONG = "from lightning_prompts.methods import SoftPromptTuning\n\nSoftPromptTuning(length='4')\n"
FOUND = 'wrong.py:3: error: Argument "length" to "SoftPromptTuning" has incompatible type "str"'


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module in a folder."""
    command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def check_types(folder: Path) -> None:
    """Strict mypy finds the one planted fault in a user's own files, so the types of the public API reach them."""
    for heading in ("### Your own method", "### Your own reward"):
        for block in section("README.md", heading):
            if block.file:
                (folder / block.file).write_text(block.text)
    (folder / "use.py").write_text(USE)
    (folder / "wrong.py").write_text(WRONG)
    strict = ["mypy", "--strict", "--config-file", "", "--cache-dir", str(ROOT / ".mypy_cache" / "recipes")]
    done = run([*strict, "my_method.py", "my_reward.py", "use.py", "wrong.py"], folder, MYPYPATH=str(ROOT))
    own = [line for line in done.stdout.splitlines() if re.match(r"(my_method|my_reward|use|wrong)\.py", line)]
    assert len(own) == 1, done.stdout + done.stderr
    assert own[0].startswith(FOUND), done.stdout


def follow_recipes(copy: Path) -> None:
    """Write the files, then run the tests, the new YAMLs, the commands and the linter in one copy of the project."""
    for name in ("lightning_prompts", "datamodules", "callbacks", "experiments", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, copy / name)
    for heading in ("### Your own method", "### Your own reward"):
        for block in section("README.md", heading):
            if block.file:
                (copy / block.file).write_text(block.text)
    tests: set[str] = set()
    words: list[str] = []
    fits: list[list[str]] = []
    readme = (ROOT / "README.md").read_text().splitlines()
    for heading in ("## A dataset", "## A method", "## A reward"):
        for block in section("CONTRIBUTING.md", heading):
            if block.added:
                with (copy / block.file).open("a") as file:
                    file.write(block.text)
            elif block.file:
                (copy / block.file).write_text(block.text)
            elif block.language == "markdown":
                columns = block.text.count("|")
                assert [row for row in readme if row.startswith("| `") and row.count("|") == columns], block.text
            else:
                for command in map(shlex.split, block.commands):
                    if command[0] == "cp":
                        subprocess.run(command, cwd=copy, check=True)
                    elif command[:4] == ["python", "-m", "pytest", "-q"]:
                        tests |= {word for word in command[4:] if word.startswith("tests/")}
                        words.append(command[-1])
                    else:
                        assert command[0] == "lightning-prompts", command
                        fits.append(command[1:])
    assert (len(fits), len(words)) == (2, 3)
    more = copy / "tests" / "unit" / "test_fits.py"
    more.write_text(
        "from lightning_prompts.cli import run\n\n\n"
        f"def test_roman_low_rank_closeness():\n    for words in {fits!r}:\n"
        f"        assert run([*words, *{[*SMALL, '--data.max_train_examples', '64']!r}]) == 0\n"
    )
    pytest = ["pytest", "-q", "-p", "no:cacheprovider", *sorted(tests), str(more), "tests/unit/test_project.py"]
    done = run([*pytest, "-k", " or ".join([*words, "large"])], copy, PYTHONPATH=str(copy))
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    # A test each, three YAMLs that open with their triple and train, the two commands together, file sizes.
    assert int(passed[1]) == EXPECTED, done.stdout[-3000:]
    more.unlink()
    linted = run(["ruff", "check", "--no-cache", "."], copy)
    assert linted.returncode == 0, linted.stdout


EXPECTED = 3 + 3 + 1 + 1


def main() -> None:
    """Check types, then follow the recipes."""
    with tempfile.TemporaryDirectory() as folder:
        check_types(Path(folder))
        follow_recipes(Path(folder) / "copy")
    print("the recipes work")


if __name__ == "__main__":
    main()
