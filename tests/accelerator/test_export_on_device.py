"""What is trained on the device is exported, on the CPU; and the command line runs on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accelerator.methods_table import MODEL, TRAINED, trainer
from accelerator.pretend_device import NAME, STRATEGY
from accelerator.runs import ALL, STEPS, Fit
from lightning_prompts import commands
from lightning_prompts.cli import run
from lightning_prompts.errors import UserError
from lightning_prompts.export import command
from lightning_prompts.export.run import Run

FORMATS = {
    "soft": "peft",
    "soft, reparametrised": "safetensors",
    "soft, infill": "npy",
    "soft, gradient checkpointing": "safetensors",
    "prefix": "peft",
    "prefix, mlp": "safetensors",
    "lora": "peft",
}
REFUSED = ("refiner", "scratch", "reinforce, mlp", "reinforce, transformer")


def export(name: str, made: str, fitted: Fit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Export a run of the table, which has no config to rebuild it from."""
    checkpoint = fitted(name, NAME).checkpoint(STEPS) if name in TRAINED else None
    again = trainer("cpu", folder / "run", limit_test_batches=0)
    rebuilt = Run(folder / "run", {}, checkpoint, again, ALL[name].make(), ALL[name].data())
    monkeypatch.setattr(command, "open_run", lambda *args: rebuilt)
    base = [] if made == "text" else ["--base", str(folder / "base")]
    assert command.main([str(folder / "run"), "--format", made, "--out", str(folder / "out"), *base]) == 0
    return folder / "out"


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(REFUSED)])
def test_a_run_on_the_device_is_exported(
    name: str, fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FORMATS.get(name, "text")
    folder = export(name, made, fitted, tmp_path, monkeypatch)
    about = json.loads((folder / "prompt.json").read_text())
    assert (about["format"], about["model"]) == (made, MODEL)
    assert about["step"] == (STEPS if name in TRAINED else None)
    assert len(list(folder.iterdir())) > 2


@pytest.mark.parametrize("name", ["refiner, mlp, soft", "scratch"])
def test_what_cannot_be_exported_is_refused_in_words(
    name: str, fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"has no prompt to export|generates a prompt for each question"):
        export(name, "text", fitted, tmp_path, monkeypatch)


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
