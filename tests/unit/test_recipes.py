"""What README and CONTRIBUTING tell people to do is done here, word by word, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_prompts.cli import run
from support.models import TINY
from support.project import ROOT

SMALL = ["--model.lm.name", f"{TINY},max_position_embeddings=2048", "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false"]  # fmt: skip
SHORT = ["--model.max_new_tokens", "2", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
FEW_TOKENS = ["--model.support.class_path", "TopK", "--model.support.init_args.count", "20"]  # the tiny model has 257


@dataclass(frozen=True)
class Block:
    """A piece of code in a page: its language, its text, and the file that its first line names."""

    language: str
    text: str

    @property
    def file(self) -> str:
        match = re.match(r"# (?:add to )?([\w/.]+\.(?:py|yaml))\n", self.text)
        return match[1] if match else ""

    @property
    def added(self) -> bool:
        return self.text.startswith("# add to ")

    @property
    def commands(self) -> list[str]:
        """The lines of a shell script, continued ones joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line and not line.startswith("#")]


def section(page: str, heading: str) -> list[Block]:
    """The blocks between a heading and the next of its kind."""
    text = (ROOT / page).read_text(encoding="utf-8")
    body = text.partition(f"\n{heading}\n")[2]
    assert body, f"{page} has no section {heading!r}"
    masked = re.sub(r"```.*?```", _masked, body, flags=re.S)
    body = re.split(rf"\n#{{1,{heading.count('#')}}} ", masked)[0].replace("\x00", "#")
    return [Block(language, code) for language, code in re.findall(r"```(\w+)\n(.*?)```", body, re.S)]


def _masked(match: re.Match[str]) -> str:
    return match[0].replace("#", "\x00")  # a comment in code is no heading


def follow(blocks: list[Block], extra: list[str]) -> None:
    """Write the files and run the commands of a section, in the current folder, on the tiny model."""
    for block in blocks:
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "bash":
            for line in block.commands:
                words = shlex.split(line, comments=True)
                if "lightning-prompts" not in words:
                    subprocess.run(["bash", "-ec", line], check=True)
                    continue
                _, *typed = words[words.index("lightning-prompts") :]  # behind PYTHONPATH=., which the test has set
                assert run([*typed, *([*SMALL, *SHORT, *extra] if typed[0] == "fit" else [])]) == 0, line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own, on the Python path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_method", "my_reward"):
        sys.modules.pop(name, None)


def test_own_data(folder: Path) -> None:
    blocks = section("README.md", "### Your own data")
    follow([block for block in blocks if block.language == "bash"], [])
    assert len((folder / "my.jsonl").read_text().splitlines()) == 200
    for name in ("metrics.json", "predictions.jsonl", "generations.jsonl", "config.yaml"):
        assert (folder / "runs" / "mine" / name).is_file()
    (described,) = (block for block in blocks if block.language == "yaml")
    (folder / "data.yaml").write_text(described.text)
    named = ["--data.question", "input", "--trainer.default_root_dir", "runs/described"]
    assert run(["fit", "--model", "SoftPromptTuning", "-c", "data.yaml", *named, *SMALL, *SHORT]) == 0


def test_own_method(folder: Path) -> None:
    follow(section("README.md", "### Your own method"), ["--data.max_train_examples", "64"])
    run_folder = folder / "runs" / "low_rank"
    assert "my_method.LowRankPrompt" in (run_folder / "config.yaml").read_text()
    assert run(["test", "-c", str(run_folder / "config.yaml"), "--ckpt_path", "best"]) == 0


def test_own_reward(folder: Path) -> None:
    blocks = section("README.md", "### Your own reward")
    follow(blocks, ["--data.max_train_examples", "64", *FEW_TOKENS])
    assert "my_reward.Closeness" in (folder / "runs" / "reward" / "config.yaml").read_text()
    text = (ROOT / "README.md").read_text()
    (measured,) = re.findall(r"`(--trainer\.callbacks\+=TextMetrics .*?)`", text)
    where = ["-c", "runs/reward/config.yaml", "--ckpt_path", "last"]
    assert run(["test", *where, *shlex.split(measured)]) == 0
    assert '"test/closeness"' in (folder / "runs" / "reward" / "metrics.json").read_text()


@pytest.mark.timeout(900)  # half a minute where mypy has no cache yet, on a machine that does nothing else
def test_files_of_one_s_own_are_type_checked(folder: Path) -> None:
    """The types of the public API reach whoever uses it: strict mypy finds nothing but a real fault."""
    for heading in ("### Your own method", "### Your own reward"):
        for block in section("README.md", heading):
            if block.file:
                Path(block.file).write_text(block.text)
    (folder / "use.py").write_text(
        "import torch\nfrom lightning_prompts.callbacks import TextMetrics\n"
        "from lightning_prompts.datamodules import Addition\n"
        "from lightning_prompts.lm import FrozenLM, LMConfig\nfrom lightning_prompts.methods import SoftPromptTuning\n"
        "from my_reward import Closeness\n\n"
        "lm = FrozenLM.load(LMConfig())\n"
        "nll: list[float] = lm.score(Addition().examples('test'), torch.zeros(4, lm.width)).nll.tolist()\n"
        "TextMetrics([Closeness()])\nSoftPromptTuning(length=4)\n"
    )
    (folder / "wrong.py").write_text(
        "from lightning_prompts.methods import SoftPromptTuning\n\nSoftPromptTuning(length='4')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [*command, "my_method.py", "my_reward.py", "use.py", "wrong.py"], capture_output=True, text=True, check=False,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    own = [line for line in done.stdout.splitlines() if re.match(r"(my_method|my_reward|use|wrong)\.py", line)]
    assert len(own) == 1, done.stdout
    assert own[0].startswith('wrong.py:3: error: Argument "length" to "SoftPromptTuning" has incompatible type "str"')


@pytest.mark.timeout(900)
def test_the_three_recipes(tmp_path: Path) -> None:
    """In a copy of the project: files, imports, YAMLs, tests and commands, and the rows in the README's tables."""
    copy = tmp_path / "copy"
    for name in ("lightning_prompts", "datamodules", "callbacks", "experiments", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, copy / name)
    env = {**os.environ, "PYTHONPATH": str(copy)}
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
                assert [row for row in readme if row.startswith("| `") and row.count("|") == columns]
            else:
                for command in map(shlex.split, block.commands):
                    if command[0] == "cp":
                        subprocess.run(command, cwd=copy, check=True)
                    elif command[:4] == ["python", "-m", "pytest", "-q"]:
                        tests |= {word for word in command[4:] if word.startswith("tests/")}
                        words.append(command[-1])
                    else:
                        assert command[0] == "lightning-prompts"
                        fits.append(command[1:])
    assert len(fits) == 2
    assert len(words) == 3
    # One process for all of it: the project's own rules, the recipes' tests, and every new YAML.
    (copy / "tests" / "test_fits.py").write_text(
        "from lightning_prompts.cli import run\n\n\n"
        f"def test_roman_low_rank_closeness():\n    for words in {fits!r}:\n"
        f"        assert run([*words, *{[*SMALL, '--data.max_train_examples', '64']!r}]) == 0\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(tests), "tests/test_fits.py",
               "tests/test_project.py", "-k", " or ".join([*words, "imports", "large"])]  # fmt: skip
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    # A test each, three YAMLs trained and built, the two commands, imports, file sizes.
    assert int(passed[1]) == 3 + 3 + 3 + 1 + 2, done.stdout
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--exclude", "tests/test_fits.py", "."], cwd=copy,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
