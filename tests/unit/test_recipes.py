"""What the README tells people to do is done here, word by word, on a tiny model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_prompts.cli import run
from support.pages import SMALL, Block, section
from support.project import ROOT

SHORT = ["--model.max_new_tokens", "2", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]


FEW_TOKENS = ["--model.support.class_path", "TopK", "--model.support.init_args.count", "20"]  # the tiny model has 257


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
