"""The bar of a notebook, without one: IPython is not needed, and a real kernel would take seconds to start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_prompts as lp
from lightning_prompts.cli import notebook
from support.models import TINY

ROWS = [{"question": f"w{n}", "answer": f"v{n % 7}"} for n in range(60)]


class Shown:
    """Output below a cell, which is updated in place."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


class OutStream:
    """As the kernel's: it says where it is from."""

    def __init__(self, stream: Any) -> None:
        self.write, self.flush, self.isatty = stream.write, stream.flush, stream.isatty


OutStream.__module__ = "ipykernel.iostream"


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """What a notebook would show: one entry per output."""
    made: list[Shown] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Shown:
        assert display_id
        made.append(Shown())
        made[-1].update(data, raw)
        return made[-1]

    ipython = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=None), display=SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    monkeypatch.setattr(notebook, "SECONDS", 0.0)
    return made


def test_one_bar_shows_the_training(outputs: list[Shown], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", OutStream(sys.stdout))  # here, as pytest replaces it after each fixture
    data = lp.QuestionAnswer.from_rows(ROWS, batch_size=8)
    quick: dict[str, Any] = {"lm": TINY, "max_new_tokens": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    run = lp.fit("soft_prompt", data, length=2, max_steps=3, folder=tmp_path / "a", **quick)
    (bar,) = outputs
    assert bar.texts[0].startswith("  0% step 0 of 3 · 0 s")
    assert any("validating" in text for text in bar.texts)
    last = bar.texts[-1]
    assert last.startswith("100% step 3 of 3 · ")
    for name in ("train/loss", "val/nll", "val/exact_match 0.0%"):
        assert name in last
    run.test()
    assert outputs[1].texts[0] == "100% test: batch 1 of 1"
    assert outputs[1].texts[-1] == "", "the bar of a test gives way to its table"
    trainer = {"max_steps": 1, "logger": {"class_path": "CSVLogger", "init_args": {"name": "mine"}}}
    lp.compare(["static", "soft_prompt"], data, seeds=1, folder=tmp_path / "b", trainer=trainer, **quick)
    assert list((tmp_path / "b" / "soft_prompt" / "seed-0" / "mine").rglob("metrics.csv"))
    assert len(outputs) == 3
    assert outputs[2].texts == ["  0% run 1 of 2: static, seed 0", " 50% run 2 of 2: soft_prompt, seed 0", ""]
    lp.fit("static", data, folder=tmp_path / "c", verbose=False, **quick)
    assert len(outputs) == 3
