"""The parser's own messages, as it gives them, and what becomes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_prompts.cli import CONFIGURABLE
from lightning_prompts.config_errors import check_yaml, one_line, user_error
from lightning_prompts.errors import UserError, nearest


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            'Parser key "optimizer":\n  - Expected a path but SGD either not accessible or invalid\n  - Multiple '
            "subclasses with name SGD. Give the full class path to avoid ambiguity: torch.optim.SGD, b.optim.SGD.",
            "several classes are called SGD; write the full path of one: torch.optim.SGD, b.optim.SGD",
        ),
        ("the following arguments are required: fit.data", "no --data given; known: Addition, Antonyms, BigBenchHard"),
        ("something\n   new Namespace(a=1, b=Namespace())", "something new"),
        (
            'Parser key "model.init_args.reward": ... Expected a dot import path string: Rouge',
            "model.init_args.reward: unknown class 'Rouge'; known: AnswerLikelihood, BertScore, ExactMatch",
        ),
        (
            "Option 'predict' is not accepted",
            "unknown setting 'predict'; did you mean data.predict?",
        ),
        (
            "Option 'lr_scheduler.gamma' is not accepted",
            "unknown setting 'lr_scheduler'; did you mean model.scheduler?",
        ),
        (
            "Option 'model.init_args.crossing' is not accepted",
            "unknown setting 'model.crossing'; it is called estimator now",
        ),
        ("Unrecognized arguments: --max_steps 3", "unknown setting 'max_steps'; did you mean trainer.max_steps?"),
    ],
)
def test_one_line(message: str, line: str) -> None:
    assert one_line(message, CONFIGURABLE).startswith(line)


def test_the_user_error_is_found_behind_others() -> None:
    inner = UserError("length must be at least 1")
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = TypeError("wrapped too")
    wrapped.__cause__.__context__ = inner
    assert user_error(wrapped) is inner
    assert user_error(ValueError("x")) is None
    assert user_error(None) is None


def test_nearest() -> None:
    assert nearest("lenght", ["length", "width"]) == "did you mean length?"
    assert nearest("zzz", ["length", "width"]) == "known: length, width"
    assert nearest("width", ["length", "width", "widths"]) == "did you mean widths?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: gone.yaml", "top.yaml: model: gone.yaml does not exist"),
        ("trainer: /etc/hostname", "top.yaml: trainer: /etc/hostname is no config: its name must end in .yaml"),
        ("model: {class_path: X, init_args: {lm: /etc/passwd}}", "top.yaml: lm: /etc/passwd is no config"),
        ("data: broken.yaml", "broken.yaml line 3 is not valid YAML"),
        ("config: inner.yaml", "inner.yaml: init: gone.yaml does not exist"),
        ("trainer: {callbacks: [{reward: gone.yaml}]}", "reward: gone.yaml does not exist"),
    ],
)
def test_files_in_place_of_settings(text: str, told: str, tmp_path: Path) -> None:
    """Nothing of a file that is none of the kind is shown, and what is wrong with one is told with its name."""
    (tmp_path / "top.yaml").write_text(text)
    (tmp_path / "broken.yaml").write_text("class_path: X\ninit_args: [\n")
    (tmp_path / "inner.yaml").write_text("model: {class_path: X, init_args: {init: gone.yaml}}\n")
    with pytest.raises(UserError, match=re.escape(told)):
        check_yaml(["fit", "-c", str(tmp_path / "top.yaml")])


def test_what_is_no_file_in_place_of_settings(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("class_path: X\n")
    (tmp_path / "top.yaml").write_text("model: model.yaml\ndata: {train: rows/my.json, template: a/b}\n")
    check_yaml(["fit", "-c", str(tmp_path / "top.yaml"), f"--model={tmp_path / 'model.yaml'}", "--data", "Antonyms"])
    check_yaml(["--model.init", '{"class_path": "FromText", "init_args": {"text": "a/b"}}', "--data.train", "no.json"])
    with pytest.raises(UserError, match=r"--model: model: gone\.yaml does not exist"):
        check_yaml(["fit", "--model", "gone.yaml"])
