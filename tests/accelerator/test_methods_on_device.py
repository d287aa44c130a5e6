"""Every method with every default callback on a device that is not the CPU: the CPU's results, to rounding."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from support.cases import TRAINED
from support.pretend_device import NAME
from support.runs import ALL, STEPS, Fit, assert_alike, evaluate, files, train, trainer


@pytest.mark.parametrize("name", TRAINED)
def test_training_starts_from_the_same_tensors(name: str, fitted: Fit) -> None:
    ours, theirs = fitted(name, NAME).record.start, fitted(name, "cpu").record.start
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_training_gives_the_results_of_the_cpu(name: str, fitted: Fit) -> None:
    ours, theirs = fitted(name, NAME), fitted(name, "cpu")
    assert len(ours.record.logged) == STEPS
    assert_alike(ours.record.logged, theirs.record.logged)
    assert_alike(ours.metrics, theirs.metrics)
    assert_alike(files(ours.folder), files(theirs.folder), tolerance=1e-3)  # some numbers in them are float16
    assert math.isfinite(ours.metrics["val/nll"])


@pytest.mark.parametrize("name", TRAINED)
def test_training_changes_something(name: str, fitted: Fit) -> None:
    run = fitted(name, NAME)
    moved = any(not torch.equal(value, run.record.start[key]) for key, value in run.record.end.items())
    assert moved or files(run.folder)["prompts.jsonl"]


@pytest.mark.parametrize("name", TRAINED)
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


BACK = (
    "soft", "prefix", "relaxed, rounded", "search", "refiner, mlp, soft", "reinforce, value head", "lora", "scratch",
    "network, two layers", "ape",
)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_gives_the_same_answers_on_both_devices(name: str, fitted: Fit, tmp_path: Path) -> None:
    """And so does one of the device, in a case of each class."""
    saved = {device: fitted(name, device).checkpoint(STEPS) if name in TRAINED else None for device in (NAME, "cpu")}
    expected = evaluate(name, "cpu", tmp_path / "expected", saved["cpu"])
    assert expected.keys() >= {"val/nll", "test/nll", "predictions.jsonl", "generations.jsonl"}
    assert_alike(evaluate(name, NAME, tmp_path / "device", saved["cpu"]), expected)
    if name in BACK:
        assert_alike(evaluate(name, "cpu", tmp_path / "back", saved[NAME]), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
@pytest.mark.parametrize("name", ["soft", "prefix", "relaxed, softmax", "refiner, mlp, soft", "lora", "reinforce, mlp"])
def test_training_in_half_precision(name: str, dtype: str, tolerance: float, fitted: Fit) -> None:
    ours, theirs = fitted(name, NAME, dtype), fitted(name, "cpu", dtype)
    for key, value in ours.record.start.items():
        assert torch.allclose(value, theirs.record.start[key], atol=tolerance), key
        assert value.dtype == theirs.record.start[key].dtype, key
    assert ours.record.start["lm.model.model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert_alike(ours.record.logged, theirs.record.logged, tolerance)
    assert ours.metrics["val/nll"] == pytest.approx(theirs.metrics["val/nll"], rel=tolerance)
    assert all(torch.isfinite(value).all() for value in ours.record.end.values() if value.dim())
