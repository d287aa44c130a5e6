"""The contract that every method keeps. A new method is one row in `support.cases`."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path

import pytest
import torch

from lightning_prompts.errors import UserError
from lightning_prompts.methods import PromptMethod
from support.cases import TRAINED
from support.runs import ALL, STEPS, Fit, Run, assert_alike, evaluate, export, export_format, files, train

OWN_WEIGHTS = {"scratch": "lm.", "lora": ".lora_"}  # what these methods train inside of the LM


def half_precision() -> list[tuple[str, str]]:
    """Every case in one of the two precisions, and every method in both."""
    dtypes = ("bfloat16", "float16")
    methods = [case.method for case in TRAINED.values()]
    return [
        (name, dtype)
        for row, (name, case) in enumerate(TRAINED.items())  # the cases of a method stand together
        for dtype in (dtypes if methods.count(case.method) == 1 else [dtypes[row % 2]])
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A finished training of a method; each is done once."""

    @functools.cache
    def fit(name: str) -> Run:
        return train(name, "cpu", tmp_path_factory.mktemp("run"))

    return fit


@pytest.mark.parametrize("name", TRAINED)
def test_training_changes_the_prompt_and_nothing_else(name: str, fitted: Fit) -> None:
    run = fitted(name)
    own = OWN_WEIGHTS.get(name)
    frozen = [key for key in run.record.start if key.startswith("lm.") and not (own and own in key)]
    assert frozen or name == "scratch"
    moved = {key for key, value in run.record.end.items() if not torch.equal(value, run.record.start[key])}
    assert not moved & set(frozen)
    assert moved or files(run.folder)["prompts.jsonl"], "text methods change their text"
    assert math.isfinite(run.metrics["val/nll"])


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_is_small_data_without_the_frozen_lm(name: str, fitted: Fit) -> None:
    run = fitted(name)
    path = run.checkpoint(STEPS)
    assert path.stat().st_size < 1_000_000
    checkpoint = torch.load(path, weights_only=True)
    trained = {key for key, value in run.method.named_parameters() if value.requires_grad}
    saved = checkpoint["state_dict"]
    assert len(saved) >= len(trained)
    assert not any(key.startswith("lm.") for key in saved)
    assert {"optimizer_states", "rng", "loops", "callbacks"} <= checkpoint.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_is_loaded_from_python_without_a_trainer(name: str, fitted: Fit) -> None:
    run = fitted(name)
    loaded = PromptMethod.load_from_checkpoint(run.checkpoint(STEPS))
    assert type(loaded) is type(run.method)
    assert loaded.prompt_text() == run.method.prompt_text()
    live = {key: value for key, value in run.method.named_parameters() if value.requires_grad}
    for key, value in loaded.named_parameters():
        assert not value.requires_grad or torch.equal(value, live[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_resume_is_bitwise_identical(name: str, fitted: Fit, tmp_path: Path) -> None:
    whole = fitted(name)
    folder = shutil.copytree(whole.folder, tmp_path / "rest")  # the files of a run are continued
    rest = train(name, "cpu", folder, resume=whole.checkpoint(2))
    assert_alike(rest.record.logged, whole.record.logged[2:], tolerance=0.0)
    assert rest.record.end.keys() == whole.record.end.keys()
    for key, value in rest.record.end.items():
        assert torch.equal(value, whole.record.end[key]), key
    assert_alike(files(rest.folder), files(whole.folder), tolerance=0.0)


@pytest.mark.parametrize("name", ALL)
def test_a_reloaded_checkpoint_validates_tests_and_predicts_the_same(name: str, fitted: Fit, tmp_path: Path) -> None:
    live, saved = None, None
    if name in TRAINED:
        live, saved = fitted(name).method, fitted(name).checkpoint(STEPS)
    again = evaluate(name, "cpu", tmp_path / "again", saved)
    assert again.keys() >= {"val/nll", "test/nll", "test/exact_match", "predictions.jsonl", "generations.jsonl"}
    assert_alike(evaluate(name, "cpu", tmp_path / "live", None, live), again, tolerance=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_export_writes_a_prompt_or_refuses(
    name: str, fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = fitted(name).checkpoint(STEPS) if name in TRAINED else None
    made = export_format(name)
    if made is None:
        with pytest.raises(UserError, match=r"has no prompt to export|generates a prompt for each question"):
            export(name, "text", saved, tmp_path, monkeypatch)
        return
    folder = export(name, made, saved, tmp_path, monkeypatch)
    assert (folder / "prompt.json").is_file()
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(("name", "dtype"), half_precision())
def test_half_precision_trains_float32_parameters(name: str, dtype: str, tmp_path: Path) -> None:
    run = train(name, "cpu", tmp_path, dtype, steps=1)
    trained = [value for value in run.method.parameters() if value.requires_grad]
    assert all(value.dtype == torch.float32 for value in trained)
    if name != "scratch":
        assert run.method.lm.model.dtype == getattr(torch, dtype)
    assert all(torch.isfinite(value).all() for value in trained)
    assert math.isfinite(run.metrics["val/nll"])
