"""TAB, as the shell asks: what is offered, how fast, and without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prompts import commands, completion
from lightning_prompts.__main__ import spare_cores
from support.project import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The options, collected once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_PROMPTS_CACHE", str(folder))
        completion.collect()
    return folder


def tab(line: str, cache: Path, folder: Path, flags: tuple[str, ...] = ()) -> tuple[set[str], str]:
    """What is offered at the end of a line, and what was imported."""
    answer = folder / "answer"
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "LIGHTNING_PROMPTS_CACHE": str(cache), "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *flags, "-m", "lightning_prompts"], env=env, cwd=folder, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    offered = answer.read_text().split("\n") if answer.exists() else []
    answer.unlink(missing_ok=True)
    return {word.rstrip("\x0b ") for word in offered if word}, done.stderr


def imports_of(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command; its standard error names the modules that it imports."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_prompts", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("load", "set_by_user", "policy"), [
    (0.1, None, None), (1e6, None, "PASSIVE"), (1e6, "ACTIVE", "ACTIVE"),
])  # fmt: skip
def test_threads_do_not_spin_on_a_busy_machine(
    load: float, set_by_user: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setenv("OMP_WAIT_POLICY", set_by_user or "")
    if set_by_user is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    spare_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_subcommands_at_once(tmp_path: Path) -> None:
    """Also before anything was collected."""
    offered, imported = tab("lightning-prompts ", tmp_path / "empty", tmp_path, ("-X", "importtime"))
    assert offered == {*commands.TRAINER, *commands.COMMANDS}
    assert "argcomplete" in imported
    assert "torch" not in imported
    assert tab("lightning-prompts co", tmp_path / "empty", tmp_path)[0] == {"completion"}


@pytest.mark.parametrize(
    ("typed", "some", "none"),
    [
        ("fit --model ", {"SoftPromptTuning", "Ape"}, {"PromptMethod", "Antonyms"}),
        ("fit --data ", {"Antonyms", "QuestionAnswer"}, {"SoftPromptTuning"}),
        ("fit --model SoftPromptTuning --model.", {"--model.length", "--model.lm.dtype", "--model.init"},
         {"--model.top_k", "--data.seed"}),
        ("fit --model.", {"--model.length", "--model.top_k"}, set()),
        ("fit --model HardPromptSearch --data Addition --data.max", {"--data.max_digits"}, {"--data.modulus"}),
        ("fit --model.lm.dtype ", {"float32", "bfloat16", "auto"}, {"int8"}),
        ("fit --model SoftPromptTuning --model.init ", {"Zeros", "FromText"}, {"SoftPromptTuning"}),
        ("test --data.chat ", {"true", "false"}, set()),
        ("fit --trainer.max_", {"--trainer.max_epochs", "--trainer.max_steps"}, {"--trainer.min_epochs"}),
        ("fit --budget.", {"--budget.tokens"}, set()),
        ("sweep --ad", {"--address"}, set()),
        ("export --", {"--format", "--checkpoint", "--push"}, {"--model"}),
        ("export --format ", {"peft", "vllm"}, set()),
        ("report --", {"--out", "--baseline"}, set()),
        ("plan --model ", {"SoftPromptTuning"}, {"Antonyms"}),
        ("plan --model SoftPromptTuning --model.l", {"--model.length", "--model.lm.dtype"}, set()),
        ("plan --trainer.dev", {"--trainer.devices"}, set()),
        ("completion ", {"bash", "zsh"}, set()),
        ("fit -c ", {"a.yaml"}, set()),
    ],
)  # fmt: skip
def test_options(typed: str, some: set[str], none: set[str], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    offered, imported = tab(f"lightning-prompts {typed}", cache, tmp_path)
    assert offered >= some, imported
    assert not offered & none


def test_each_subcommand_s_options_are_known(cache: Path) -> None:
    kept = json.loads((cache / "completion.json").read_text())
    assert set(kept["commands"]) == set(commands.COMMANDS)
    assert set(kept["trainer"]) == set(commands.TRAINER)
    assert all("--help" in options for options in kept["commands"].values())


def test_the_shell_s_part(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """bash accepts it; options are collected when they are of another version, and not again."""
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(cache))
    assert commands.run(["completion", "bash"]) == 0
    code, told = capsys.readouterr()
    assert told == ""
    check = "type _python_argcomplete >/dev/null && complete -p lightning-prompts"
    done = subprocess.run(["bash", "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("lightning-prompts")
    kept = cache / "completion.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "of": "0.0.0"}))
    assert commands.run(["completion", "zsh"]) == 0
    assert "collecting" in capsys.readouterr().err
    assert commands.run(["completion", "zsh"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["reprot", "runs"], "unknown command 'reprot'; did you mean report?"),
        (["fitt"], "unknown command 'fitt'; did you mean fit?"),
        (["zzzz"], "unknown command 'zzzz'; known: fit, validate, test, predict, report, export"),
        (["sweep"], "the following arguments are required: -c/--config; see lightning-prompts sweep --help"),
        (["doctor", "x"], "unrecognized arguments: x; see lightning-prompts doctor --help"),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_a_mistyped_command_is_told_at_once(words: list[str], told: str, tmp_path: Path) -> None:
    """In one line, and without importing torch."""
    done = imports_of(words, tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert "| torch\n" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["doctor", "--help"], ["completion", "--help"]])
def test_help_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    done = imports_of(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: lightning-prompts" in done.stdout
    assert "| torch\n" not in done.stderr
