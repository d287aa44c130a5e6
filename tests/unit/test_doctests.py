"""Examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

from support.project import modules

FLAGS = doctest.NORMALIZE_WHITESPACE
# Where a reader looks for an example; one that is gone is missed.
SHOWN = {
    "lightning_prompts.answers",
    "lightning_prompts.errors",
    "lightning_prompts.template",
    "lightning_prompts.types",
    "lightning_prompts.objectives.rewards",
    "lightning_prompts.estimators.reinforce",
    "lightning_prompts.estimators.temperature",
    "lightning_prompts.estimators.relaxations",
    "lightning_prompts.runs.tables",
    "lightning_prompts.runs.spaces",
    "lightning_prompts.datamodules.addition",
    "lightning_prompts.datamodules.question_answer",
    "lightning_prompts.datamodules.labels",
    "lightning_prompts.datamodules.splits",
}


@pytest.mark.parametrize("name", [name for name, path in modules() if not name.endswith("__main__")])
def test_examples_are_true(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted > 0 or name not in SHOWN
