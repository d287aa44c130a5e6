"""The parser's own messages, as it gives them, and what becomes of them."""

from __future__ import annotations

import pytest

from lightning_prompts.cli import CONFIGURABLE
from lightning_prompts.config_errors import one_line, user_error
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
        ("Option 'predict' is not accepted", "unknown setting 'predict'; known: ckpt_path, config, data, model, "),
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
