"""Errors of the parser and of config files, each in one line that names what is wrong and the nearest valid names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from lightning import Trainer

from lightning_prompts.cli.checks import ROLES, check, trainer_settings
from lightning_prompts.cli.classes import CONFIGURABLE, role, settings_of
from lightning_prompts.cli.errors import one_line, user_error
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.errors import UserError, nearest


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            'Parser key "optimizer":\n  - Expected a path but SGD either not accessible or invalid\n  - Multiple '
            "subclasses with name SGD. Give the full class path to avoid ambiguity: torch.optim.SGD, b.optim.SGD.",
            "optimizer: Multiple subclasses with name SGD. Give the full class path to avoid ambiguity: torch",
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
            "unknown setting 'lr_scheduler.gamma'; it is called model.scheduler here",
        ),
        (
            "Option 'model.init_args.crossing' is not accepted",
            "unknown setting 'model.crossing'; it is called estimator here",
        ),
        (
            "Parser key \"lm.dtype\":\n  Expected a typing.Literal['float32', 'auto']. Got value: fp16",
            "lm.dtype: expected float32|auto, got 'fp16'",
        ),
        (
            'Parser key "trainer.max_epochs":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
            "[<class 'int'>, <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class "
            "'NoneType'>\n  Given value type: <class 'str'>\n  Given value: 2.5",
            "trainer.max_epochs: expected int or null, got '2.5'",
        ),
        ("Unrecognized arguments: --max_steps 3", "unknown setting 'max_steps'; did you mean trainer.max_steps?"),
    ],
)
def test_one_line(message: str, line: str) -> None:
    assert one_line(message).startswith(line)


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
        check(["fit", "-c", str(tmp_path / "top.yaml")])


def test_what_is_no_file_in_place_of_settings(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("class_path: X\n")
    (tmp_path / "top.yaml").write_text("model: model.yaml\ndata: {train: rows/my.json, template: a/b}\n")
    check(
        [
            "fit",
            "-c",
            str(tmp_path / "top.yaml"),
            "-c",
            "model: {class_path: X}",
            "-c",
            f"model: {{class_path: X, init_args: {{text: {'long ' * 100}}}}}",
            f"--model={tmp_path / 'model.yaml'}",
            "--data",
            "Antonyms",
        ]
    )
    check(["--model.init", '{"class_path": "FromText", "init_args": {"text": "a/b"}}', "--data.train", "no.json"])
    with pytest.raises(UserError, match=r"--model: model: gone\.yaml does not exist"):
        check(["fit", "--model", "gone.yaml"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--modle", "SoftPromptTuning"], "unknown setting 'modle'; did you mean model?"),
        (["fit", "--trainr.max_steps=3"], "unknown setting 'trainr'; did you mean trainer?"),
        (["fit", "-c", "top.yaml"], "top.yaml: unknown setting 'dta'; did you mean data?"),
        (["fit", "--max_steps=3"], "unknown setting 'max_steps'; did you mean trainer.max_steps?"),
        (["fit", "--trainer.max_epoch", "3"], "'trainer.max_epoch'; did you mean trainer.max_epochs?"),
        (["fit", "-c", "trainer.yaml"], "trainer.yaml: unknown setting 'trainer.precison'; did you mean trainer.pre"),
        (["fit", "-c", "gone"], "gone does not exist"),
        (["fit", "-c", "day.yaml"], "day.yaml is not valid YAML: ValueError: day is out of range for month; put"),
    ],
)
def test_mistakes_at_the_top_of_the_command_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "top.yaml").write_text("model: {class_path: X}\ndta: Antonyms\n")
    (tmp_path / "trainer.yaml").write_text("trainer: {max_epochs: 3, precison: 32-true}\n")
    (tmp_path / "day.yaml").write_text("model: {class_path: X, init_args: {text: 2024-02-30}}\n")
    with pytest.raises(UserError, match=re.escape(told)):
        check(words)


def test_other_names_are_left_to_the_parser() -> None:
    names = ["--verbose", "--print_config", "--lr_scheduler", "--help", "--trainer.callbacks+", "--trainer.unheard_of"]
    check(["test", *names, "--trainer.callbacks.monitor", "--trainer.strategy.help", "--trainer"])


def test_the_settings_of_the_trainer_are_those_of_its_signature() -> None:
    assert trainer_settings() == set(inspect.signature(Trainer).parameters)


def test_each_key_has_a_base_class() -> None:
    assert {base for key in ROLES if (base := role(key)) is not None} >= set(CONFIGURABLE)
    assert all(role(f"model.init_args.{key}") for key in ROLES)
    assert role("trainer.max_steps") is None


def test_forwarded_settings_are_settings() -> None:
    class Own(Antonyms):
        def __init__(self, mine: int = 0, **kwargs: object) -> None:
            super().__init__(**kwargs)  # type: ignore[arg-type]

    assert set(settings_of(Own)) == {"mine", *settings_of(Antonyms)}
