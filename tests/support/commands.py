"""The command line in this process, and its errors."""

from __future__ import annotations

import pytest

from lightning_prompts.cli import run
from support.models import SMALLEST

TINY_RUN = [
    "--model.lm.name",
    SMALLEST,
    "--model.max_new_tokens",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]


FIT = ["fit", "--model", "SoftPromptTuning", "--model.length", "3", *TINY_RUN, "--trainer.max_steps", "3"]


SMALL = [
    "--data",
    "Antonyms",
    "--data.max_train_examples",
    "96",
    "--data.val_fraction",
    "0.01",
    "--data.test_fraction",
    "0.01",
]


def code(*args: str) -> int:
    try:
        return run(args)
    except SystemExit as stop:
        return int(stop.code or 0)


def expect_error(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    status = code(*args)
    err = capsys.readouterr().err
    assert status in (1, 2), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert words in errors[0]
    assert "Traceback" not in err
    assert err.rstrip().endswith(errors[0])
