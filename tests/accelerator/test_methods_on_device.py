"""Every method with every default callback on a device that is not the CPU: the CPU's results, to rounding.

`tests/contract` trains, resumes, reloads and exports all cases on the CPU. Here are each class and each part of a
method once: on a device, it only matters where tensors are made, loaded and drawn.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.cli import commands, run
from support.cases import MODEL, TRAINED, UNTRAINED
from support.pretend_device import NAME, STRATEGY
from support.runs import STEPS, Fit, assert_alike, evaluate, export, export_format, files, train, trainer

# All parts of these are in other cases, in the architectures' test, in that of waits or in half precision.
REPEATED = {
    "soft, infill",
    "relaxed, softmax",
    "relaxed, straight-through",
    "search",
    "refiner, mlp, soft",
    "refiner, transformer, straight-through",
    "refiner, transformer, gumbel",
    "refiner, states not kept",
    "refiner, bertscore",
    "reinforce, no baseline",
    "reinforce, mlp",
    "network, one layer",
    "network, two layers",
    "gepa, two layers",
}
CASES = [name for name in TRAINED if name not in REPEATED]


@pytest.mark.parametrize("name", CASES)
def test_training_starts_from_the_same_tensors(name: str, fitted: Fit) -> None:
    ours, theirs = fitted(name, NAME).record.start, fitted(name, "cpu").record.start
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_results_of_the_cpu(name: str, fitted: Fit) -> None:
    ours, theirs = fitted(name, NAME), fitted(name, "cpu")
    assert len(ours.record.logged) == STEPS
    assert_alike(ours.record.logged, theirs.record.logged)
    assert_alike(ours.metrics, theirs.metrics)
    assert_alike(files(ours.folder), files(theirs.folder), tolerance=1e-3)  # some numbers in them are float16
    assert math.isfinite(ours.metrics["val/nll"])


@pytest.mark.parametrize("name", CASES)
def test_training_changes_something(name: str, fitted: Fit) -> None:
    run = fitted(name, NAME)
    moved = any(not torch.equal(value, run.record.start[key]) for key, value in run.record.end.items())
    assert moved or files(run.folder)["prompts.jsonl"]


# Two optimisers, a buffer of candidates, kept texts, random numbers of every kind.
@pytest.mark.parametrize(
    "name",
    [
        "soft, reparametrised",
        "relaxed, rounded",
        "search, everything",
        "reinforce, value head",
        "lora",
        "network, two models",
        "capo",
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, fitted: Fit, tmp_path: Path) -> None:
    whole = fitted(name, NAME)
    folder = shutil.copytree(whole.folder, tmp_path / "rest")  # earlier rows of some files stay where they are
    rest = train(name, NAME, folder, resume=whole.checkpoint(2))
    assert_alike(rest.record.logged, whole.record.logged[2:], tolerance=0.0)
    assert rest.record.end.keys() == whole.record.end.keys()
    for key, value in rest.record.end.items():
        assert torch.equal(value, whole.record.end[key]), key
    assert_alike(files(rest.folder), files(whole.folder), tolerance=0.0)


def test_a_run_resumed_between_two_accumulated_batches_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    class SaveFirst(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    prompts = []
    for resume in (None, tmp_path / "first.ckpt"):
        L.seed_everything(1, verbose=False)
        fit = trainer(NAME, tmp_path, SaveFirst(), max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
        method = TRAINED["soft"].make()
        fit.fit(method, TRAINED["soft"].data(), ckpt_path=resume, weights_only=True)
        prompts.append(method.current_prompt())
    assert torch.load(tmp_path / "first.ckpt", map_location="cpu", weights_only=True)["gradients"]
    assert torch.equal(*prompts)
    assert not torch.equal(prompts[0], method.initial_prompt())


RELOADED = (
    "soft",
    "prefix",
    "relaxed, rounded",
    "search, everything",
    "refiner, transformer, soft",
    "reinforce, value head",
    "lora",
    "scratch",
    "network, two models",
    "ape",
)
BACK = ("soft", "reinforce, value head", "lora", "network, two models")


@pytest.mark.parametrize("name", [*RELOADED, *UNTRAINED])
def test_a_checkpoint_gives_the_same_answers_on_both_devices(name: str, fitted: Fit, tmp_path: Path) -> None:
    """A case of each kind of prompt; and the CPU loads what the device saves."""
    saved = fitted(name, "cpu").checkpoint(STEPS) if name in TRAINED else None
    expected = evaluate(name, "cpu", tmp_path / "expected", saved)
    assert expected.keys() >= {"val/nll", "test/nll", "predictions.jsonl", "generations.jsonl"}
    assert_alike(evaluate(name, NAME, tmp_path / "device", saved), expected)
    if name in BACK:
        assert_alike(evaluate(name, "cpu", tmp_path / "back", fitted(name, NAME).checkpoint(STEPS)), expected)


TOLERANCE = {"bfloat16": 0.01, "float16": 0.002}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("soft", "bfloat16"),
        ("soft", "float16"),
        ("prefix", "float16"),
        ("relaxed, softmax", "bfloat16"),
        ("refiner, mlp, soft", "bfloat16"),
        ("lora", "float16"),
        ("reinforce, mlp", "bfloat16"),
    ],
)
def test_training_in_half_precision(name: str, dtype: str, fitted: Fit) -> None:
    tolerance = TOLERANCE[dtype]
    ours, theirs = fitted(name, NAME, dtype), fitted(name, "cpu", dtype)
    for key, value in ours.record.start.items():
        assert torch.allclose(value, theirs.record.start[key], atol=tolerance), key
        assert value.dtype == theirs.record.start[key].dtype, key
    assert ours.record.start["lm.model.model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert_alike(ours.record.logged, theirs.record.logged, tolerance)
    assert ours.metrics["val/nll"] == pytest.approx(theirs.metrics["val/nll"], rel=tolerance)
    assert all(torch.isfinite(value).all() for value in ours.record.end.values() if value.dim())


@pytest.mark.parametrize("name", ["soft", "prefix, mlp", "ape"])
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
    words = [
        "--model",
        "SoftPromptTuning",
        "--model.length",
        "2",
        "--model.lm.name",
        MODEL,
        "--model.max_new_tokens",
        "2",
        "--data",
        "Antonyms",
        "--data.batch_size",
        "4",
        "--data.max_train_examples",
        "8",
        "--data.val_fraction",
        "0.01",
        "--data.test_fraction",
        "0.01",
        "--trainer.accelerator",
        NAME,
        "--trainer.strategy",
        STRATEGY,
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    assert run(["fit", *words, "--trainer.max_steps", "2"]) == 0
    assert run(["fit", *words, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    assert run(["test", *words, "--ckpt_path", "best"]) == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/examples"] > 0
    made = ["--format", "peft", "--base", str(tmp_path / "base")]
    assert commands.run(["export", str(tmp_path / "run"), *made]) == 0
