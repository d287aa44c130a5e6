"""Texts of settings stay as they are written, whatever YAML would read them as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lightning_prompts.cli import PromptCLI
from support.commands import TINY_RUN, code

PROMPT = "Question: {question}\nAnswer: {answer} # no more"


class Parsed(PromptCLI):
    """A command line that is parsed, and no more."""

    def _set_seed(self) -> None:
        """Seed nothing."""

    def before_instantiate_classes(self) -> None:
        """Check nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def parse(*words: str) -> Namespace:
    return Parsed(["fit", *words]).config.fit


def config(path: Path, model: dict[str, Any], data: dict[str, Any]) -> str:
    """A YAML file in which each string has quotes."""
    content = {
        "model": {"class_path": "FixedPrompt", "init_args": model},
        "data": {"class_path": "QuestionAnswer", "init_args": {"train": "a.csv", **data}},
    }
    path.write_text(yaml.safe_dump(content, default_style='"'))
    return str(path)


def texts(given: Namespace) -> list[Any]:
    """Settings of each kind that takes a text: optional or not, of a class, of one in it, and beside other types."""
    model, data = given.model.init_args, given.data.init_args
    return [model.text, model.lm.name, model.lm.revision, data.system, data.template, data.labels]


@pytest.mark.parametrize(
    ("text", "beside"),  # `labels` also takes a list or a dictionary
    [
        ("# x", "# x"),
        ("~", "~"),
        ("true", "true"),
        ("[a,  b]", ["a", "b"]),
        (PROMPT, yaml.safe_load(PROMPT)),
    ],
)
def test_a_word_of_the_command_line_is_a_text(text: str, beside: Any) -> None:
    words = [f"--model.{name}={text}" for name in ("text", "lm.name", "lm.revision")]
    words += [f"--data.{name}={text}" for name in ("system", "template", "labels")]
    *found, labels = texts(parse("--model", "FixedPrompt", "--data", "QuestionAnswer", *words))
    assert found == [text] * len(found)
    assert labels == beside


@pytest.mark.parametrize("text", ["# x", "null", "[a,  b]", PROMPT])
def test_a_quoted_string_of_a_yaml_file_is_a_text(text: str, tmp_path: Path) -> None:
    model = {"text": text, "lm": {"name": text, "revision": text}}
    found = texts(
        parse("-c", config(tmp_path / "a.yaml", model, dict.fromkeys(("system", "template", "labels"), text)))
    )
    assert found == [text] * len(found)


def test_null_on_the_command_line_is_no_text_and_members_read_their_settings() -> None:
    members = ["--data.members.a=Addition", "--data.members.a.init_args.system=# x"]
    members += ["--data.members.a.init_args.train_size=5", "--data.members.a.init_args.ood_digits=[7, 8]"]
    given = parse("--model", "FixedPrompt", "--model.text=null", "--data", "Mixture", "--data.template=null", *members)
    assert given.model.init_args.text is None
    assert given.data.init_args.template is None
    settings = given.data.init_args.members["a"].init_args
    assert (settings.system, settings.train_size, settings.ood_digits) == ("# x", 5, [7, 8])


def test_the_record_of_a_run_has_the_text(tmp_path: Path) -> None:
    data = ["--data", "Addition", "--data.train_size", "8", "--data.val_size", "2", "--data.test_size", "2"]
    root = ["--trainer.default_root_dir", str(tmp_path)]
    assert code("test", "--model", "FixedPrompt", "--model.text", "# x", *TINY_RUN, *data, *root) == 0
    assert parse("-c", str(tmp_path / "config.yaml")).model.init_args.text == "# x"
