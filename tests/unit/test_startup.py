"""What a command imports before it answers: torch and Lightning take seconds, so nothing imports them without need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lightning_prompts.__main__ import spare_cores
from lightning_prompts.cli import run
from lightning_prompts.cli.help import asks_for_help, print_help
from support.project import ROOT


@pytest.mark.parametrize(
    ("load", "set_by_user", "policy"), [(0.1, None, None), (1e6, None, "PASSIVE"), (1e6, "ACTIVE", "ACTIVE")]
)
def test_threads_do_not_spin_on_a_busy_machine(
    load: float, set_by_user: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    spare_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def imported(words: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], set[str], list[str]]:
    """Run a command: how it ended, the top-level packages that it imported, and the lines of its standard error."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_prompts", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    packages = set(re.findall(r"^import time:.*\| *(\w+)", done.stderr, re.MULTILINE))
    return done, packages, [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


SLOW = {"torch", "lightning", "transformers", "jsonargparse", "numpy"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["reprot", "runs"], "unknown command 'reprot'; did you mean report?"),
        (["fitt"], "unknown command 'fitt'; did you mean fit?"),
        (["zzzz"], "unknown command 'zzzz'; known: fit, validate, test, predict, report, export"),
        (["sweep"], "nothing to run; give configs of methods, or a sweep file with -c"),
        (["doctor", "x"], "unrecognized arguments: x; see lightning-prompts doctor --help"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["fit", "-c", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["plan", "--config=nowhere.yaml"], "nowhere.yaml does not exist"),
        (["fit", "-c", "broken.yaml"], "broken.yaml line 2 is not valid YAML"),
        (["test", "--modle", "SoftPromptTuning"], "unknown setting 'modle'; did you mean model?"),
        (["fit", "--trainer.max_epoch", "3"], "unknown setting 'trainer.max_epoch'; did you mean trainer.max_epochs?"),
    ],
)
def test_mistakes_are_found_before_slow_imports(words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [\n")
    done, packages, lines = imported(words, tmp_path)
    assert done.returncode in (1, 2)
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert not packages & SLOW
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [["--help"], ["sweep", "--help"], ["plan", "--help"], ["doctor", "--help"], ["completion", "--help"]]
)
def test_help_has_no_slow_imports(words: list[str], tmp_path: Path) -> None:
    done, packages, lines = imported(words, tmp_path)
    assert done.returncode == 0, lines
    assert "usage: lightning-prompts" in done.stdout
    assert not packages & SLOW


@pytest.mark.parametrize("words", [["fit", "--help"], ["test", "-h"], ["fit", "--model.help", "SoftPromptTuning"]])
def test_help_of_the_parser_is_made_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "cache"))
    assert run(words) == 0
    first = capsys.readouterr().out
    assert "--trainer.max_steps" in first or "--model.length" in first
    done, packages, _ = imported(words, tmp_path)
    assert (done.returncode, done.stdout) == (0, first)
    assert not packages & SLOW


def test_kept_help_is_made_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path))
    made = []

    def make(words: Sequence[str]) -> int:
        made.append(words)
        print(f"page {len(made)}")
        raise SystemExit(0)

    for width in ("80", "80", "99", "99"):
        monkeypatch.setenv("COLUMNS", width)
        assert print_help(["fit", "-h"], make) == 0
    assert capsys.readouterr().out.split("\n") == ["page 1", "page 1", "page 2", "page 2", ""]
    (tmp_path / "help.json").write_text("[")
    assert print_help(["fit", "-h"], make) == 0
    monkeypatch.setattr("lightning_prompts.cli.help.__version__", "0.0.0")
    assert print_help(["fit", "-h"], make) == 0
    assert capsys.readouterr().out == "page 3\npage 4\n"


@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["fit", "-c", "a.yaml", "--help"],
        ["fit", "--model.help", "mine.Own"],
        ["fit", "--model.help", "a.yaml"],
    ],
)
def test_other_command_lines_are_not_kept(words: list[str]) -> None:
    assert not asks_for_help(words)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the doctor tries a training on an accelerator")
def test_the_doctor_imports_torch_only(tmp_path: Path) -> None:
    done, packages, _ = imported(["doctor"], tmp_path)
    assert "fast dtype" in done.stdout
    assert not packages & (SLOW - {"torch", "numpy"} | {"scipy", "matplotlib", "tensorboard", "datasets"})
