"""Tab completion, as bash offers it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import shtab

from lightning_prompts.cli import commands, completion

# Prints what the completion function of a script offers for a command line.
ASK = """
source "$1"
read -ra COMP_WORDS <<<"$2"
[[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_lightning_prompts lightning-prompts "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    path = tmp_path_factory.mktemp("completion") / "bash"
    path.write_text(shtab.complete(completion.plain_parser(), shell="bash"))
    return path


def tab(line: str, script: Path, folder: Path) -> set[str]:
    """What bash offers at the end of a line."""
    words = ["bash", "-c", ASK, "bash", str(script), line]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("typed", "some", "none"),
    [
        ("", {*commands.TRAINER, *commands.COMMANDS}, {"--model"}),
        ("co", {"completion"}, {"fit"}),
        ("fit --model ", {"SoftPromptTuning", "Ape"}, {"PromptMethod", "Antonyms"}),
        ("fit --data ", {"Antonyms", "QuestionAnswer"}, {"SoftPromptTuning"}),
        ("fit --data An", {"Antonyms"}, {"QuestionAnswer"}),
        (
            "fit --model SoftPromptTuning --model.",
            {"--model.length", "--model.lm.dtype", "--model.init"},
            {"--data.seed"},
        ),
        ("fit --model.", {"--model.length", "--model.top_k", "--model.lm.server.base_url"}, {"--model.help"}),
        ("fit -c a.yaml --data Addition --data.max", {"--data.max_digits"}, {"--data.modulus"}),
        ("fit --model.lm.dtype ", {"float32", "bfloat16", "auto"}, {"int8"}),
        ("fit --model SoftPromptTuning --model.init ", {"Zeros", "FromText"}, {"SoftPromptTuning"}),
        ("test --data.chat ", {"true", "false"}, set()),
        ("fit --trainer.max_", {"--trainer.max_epochs", "--trainer.max_steps"}, {"--trainer.min_epochs"}),
        ("validate --trainer.max_", {"--trainer.max_epochs"}, set()),
        ("fit --budget.", {"--budget.tokens"}, set()),
        ("sweep --ad", {"--address"}, set()),
        ("export --", {"--format", "--checkpoint", "--push"}, {"--model"}),
        ("export --format ", {"peft", "vllm"}, set()),
        ("report --", {"--out", "--baseline"}, set()),
        ("report a", {"a.yaml"}, set()),
        ("plan --model ", {"SoftPromptTuning"}, {"Antonyms"}),
        ("plan --model SoftPromptTuning --model.l", {"--model.length", "--model.lm.dtype"}, set()),
        ("plan --trainer.dev", {"--trainer.devices"}, set()),
        ("completion ", {"bash", "zsh"}, set()),
        ("fit -c ", {"a.yaml"}, set()),
        ("fit -c a.yaml --config ", {"a.yaml"}, set()),
        ("fit -c antonyms/s", {"antonyms/soft_prompt.yaml"}, {"a.yaml"}),
        ("sweep antonyms/st", {"antonyms/static.yaml"}, set()),
    ],
)
def test_bash_offers(typed: str, some: set[str], none: set[str], script: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    offered = tab(f"lightning-prompts {typed}", script, tmp_path)
    assert offered >= some
    assert not offered & none


def test_the_command_prints_a_script_for_each_shell(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["completion", "bash"]) == 0
    assert capsys.readouterr() == (script.read_text() + "\n", "")
    assert commands.run(["completion", "zsh"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#compdef lightning-prompts")
    for word in (*commands.TRAINER, *commands.COMMANDS, "SoftPromptTuning", "--data.batch_size"):
        assert word in shown


def test_the_script_is_small(script: Path) -> None:
    """Every shell reads it; the options of Lightning's and torch's own classes would make it ten times as large."""
    assert script.stat().st_size < 200_000
    assert "device_mesh" not in script.read_text()


def test_completion_without_shtab_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert commands.run(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "error: completion needs shtab; install it with: pip install shtab\n"
