"""The main job on the embedded model, as a user would do it, only shorter."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lightning_prompts.cli import run
from support.project import ROOT


def validations(folder: Path) -> list[dict[str, float]]:
    """What was measured while the prompt was still in memory."""
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [{"val/nll": float(row["val/nll"])} for row in csv.DictReader(file) if row["val/nll"]]


def test_a_soft_prompt_learns_and_comes_back_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "experiments" / "antonyms" / "soft_prompt.yaml")
    small = [
        "--data.val_fraction",
        "0.01",
        "--data.test_fraction",
        "0.01",
        "--data.batch_size",
        "8",
        "--trainer.enable_progress_bar",
        "false",
    ]
    folder, untrained = tmp_path / "run", tmp_path / "untrained"
    root = "--trainer.default_root_dir"
    assert run(["fit", "-c", config, *small, "--trainer.max_steps", "12", root, str(folder)]) == 0
    best = folder / "checkpoints" / "best.ckpt"
    assert best.stat().st_size < 1_000_000
    assert run(["test", "-c", str(folder / "config.yaml"), "--ckpt_path", str(best)]) == 0
    after = json.loads((folder / "metrics.json").read_text())
    assert run(["test", "-c", config, *small, root, str(untrained)]) == 0
    before = json.loads((untrained / "metrics.json").read_text())
    held = min(row["val/nll"] for row in validations(folder))
    assert run(["validate", "-c", str(folder / "config.yaml"), "--ckpt_path", str(best)]) == 0
    assert float(capsys.readouterr().out.split("val/nll")[1].split()[1]) == pytest.approx(held, abs=1e-6)
    assert after["test/nll"] < before["test/nll"] - 1
    assert after["test/exact_match"] > before["test/exact_match"] + 0.1
