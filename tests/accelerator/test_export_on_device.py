"""What is trained on the device is exported, on the CPU; and the command line runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_prompts.cli import commands, run
from support.cases import MODEL
from support.pretend_device import NAME, STRATEGY
from support.runs import STEPS, Fit, export, export_format


@pytest.mark.parametrize("name", ["soft", "prefix, mlp", "relaxed, rounded", "lora", "network, two layers"])
def test_a_run_on_the_device_is_exported(
    name: str, fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export_format(name)
    assert made is not None
    folder = export(name, made, fitted(name, NAME).checkpoint(STEPS), tmp_path, monkeypatch)
    about = json.loads((folder / "prompt.json").read_text())
    assert (about["format"], about["model"]) == (made, MODEL)
    assert about["step"] == STEPS


def test_the_command_line_runs_on_the_device(tmp_path: Path) -> None:
    words = ["--model", "SoftPromptTuning", "--model.length", "2", "--model.lm.name", MODEL, "--model.max_new_tokens",
             "2", "--data", "Antonyms", "--data.batch_size", "4", "--data.max_train_examples", "8",
             "--data.val_fraction", "0.01", "--data.test_fraction", "0.01", "--trainer.accelerator", NAME,
             "--trainer.strategy", STRATEGY, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir",
             str(tmp_path / "run")]  # fmt: skip
    assert run(["fit", *words, "--trainer.max_steps", "2"]) == 0
    assert run(["fit", *words, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    for what in ("validate", "test", "predict"):
        assert run([what, *words, "--ckpt_path", "best"]) == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/examples"] > 0
    made = ["--format", "peft", "--base", str(tmp_path / "base")]
    assert commands.run(["export", str(tmp_path / "run"), *made]) == 0
