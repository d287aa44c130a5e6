"""Every dataset has the shared settings, which its constructor passes on to the base classes."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_prompts import datamodules
from lightning_prompts.cli import run
from lightning_prompts.cli.classes import settings_of
from support.models import TINY

DATASETS = [getattr(datamodules, name) for name in datamodules.__all__ if name != "TextDataModule"]
SHARED = {"template", "stop", "chat", "system", "batch_size", "eval_batch_size", "max_train_examples", "seed"}
# Shared settings whose default is that of a family of datasets: the template, and the sizes of batches.
FAMILIES = {
    datamodules.LastLetters: ("{prompt} {question} -> {answer}\n", r"\n", 32, 64),
    datamodules.Addition: ("{prompt} {question}{equals}{answer}$", r"\$", 32, 64),
    datamodules.BigBenchHard: ("{prompt}\n\n{question}\n\nAnswer: {answer}\n", r"\n", 20, 64),
    datamodules.Navigate: ("{prompt}\n\n{question}\n\nAnswer: {answer}\n", r"\n", 20, 64),
    datamodules.GSM8K: ("{prompt}: {question}\nAnswer: {answer}\n\n", r"\n\n", 16, 32),
    datamodules.WordPairs: ("{prompt}: {question}\nAnswer: {answer}\n", r"\n", 32, 64),
}


def parsed(kind: type) -> dict[str, Any]:
    """The options of a class on the command line."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    return {
        action.dest.removeprefix("data."): action
        for action in parser._actions
        if action.dest.startswith("data.") and not action.dest.endswith(".help")
    }


@pytest.mark.parametrize("kind", DATASETS, ids=lambda kind: kind.__name__)
def test_the_command_line_shows_all_settings_with_help(kind: type) -> None:
    options = parsed(kind)
    assert options.keys() >= SHARED
    assert options.keys() == settings_of(kind).keys()
    assert all(action.help not in (None, "", "_EMPTY_HELP_") for action in options.values())


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_shared_settings_have_the_defaults_of_the_family(kind: type) -> None:
    options, data = parsed(kind), kind()
    shown = [options[name].default for name in ("template", "stop", "batch_size", "eval_batch_size")]
    used = [data.template.text, data.template.stop, data.batch_size, data.eval_batch_size]
    assert shown == used == list(FAMILIES[kind])


@pytest.mark.parametrize("kind", DATASETS, ids=lambda kind: kind.__name__)
def test_an_unknown_keyword_raises_a_type_error(kind: Any) -> None:
    needed = {"members": {"a": datamodules.Addition()}} if kind is datamodules.Mixture else {}
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        kind(**needed, batchsize=4)


@pytest.mark.parametrize(
    ("dataset", "wrong", "near"),
    [
        ("Addition", "max_train_example", "max_train_examples"),
        ("GSM8K", "max_character", "max_characters"),
        ("Navigate", "train_sizes", "train_size"),
        ("BigBenchHard", "balancd", "balanced"),
    ],
)
def test_a_mistyped_shared_setting_is_one_line_with_the_near_name(
    dataset: str, wrong: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--model", "FixedPrompt", "--model.lm.name", TINY, "--data", dataset, f"--data.{wrong}", "1"]
    assert run(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"unknown setting '{wrong}'; did you mean" in line
    assert near in line
