"""Random configs: valid ones train two steps, invalid ones end in one line. No traceback ever reaches a user.

``RANDOM_CONFIGS=1000 python -m pytest tests/faults/test_random_configs.py`` tries more of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import tempfile
import types
import typing
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_prompts import datamodules, methods
from lightning_prompts.cli import run
from lightning_prompts.cli.classes import CONFIGURABLE, abstract, settings_of
from lightning_prompts.lm import LMConfig
from support.models import SMALLEST as SHORT

TINY = SHORT.replace("max_position_embeddings=256", "max_position_embeddings=1024")
# Sizes stay where a machine of this size can follow; what is too large for it is no question of manners.
WHOLE = [1, 2, 2, 3, 3, 4, 7, 7, 40, 0, -1, 300]
NUMBERS = [0.1, 0.3, 0.5, 0.9, 1.0, 2.0, 5.0, 0.0, 1e-9, -1.0, 1e30, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "x", "{", "{prompt}", "{prompt} {question}: {answer}", "antonym", "\u00e9\U0001f600", "[a-z", "None"]
ANYTHING = [None, True, "x", 3, 2.5, [], {}, [1, 2], {"a": 1}, {"class_path": "Nothing"}, {"init_args": {}}]
DATA = [
    "Antonyms",
    "Addition",
    "SymbolicSum",
    "ModularProduct",
    "LetterReversal",
    "LastLetters",
    "WordPairs",
    "Hyperbaton",
    "Navigate",
    "QuestionAnswer",
]
FIXED = [
    "--trainer.max_steps",
    "2",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
]
SMALL = {"max_train_examples": 32, "batch_size": 4, "eval_batch_size": 4}  # unless other sizes are drawn
UNTRAINED = ("FixedPrompt", "FewShot", "ChainOfThought")
ENDS: Counter[str] = Counter()
COUNT = int(os.environ.get("RANDOM_CONFIGS", "30"))


def classes(base: type) -> list[type]:
    """What can be named where this base is wanted."""
    found = [] if abstract(base) else [base]
    for child in base.__subclasses__():
        found += classes(child)
    return sorted(
        (kind for kind in set(found) if not kind.__name__.startswith("_") and "test" not in kind.__module__),
        key=lambda kind: kind.__name__,
    )


def configurable(hint: Any) -> bool:
    return inspect.isclass(hint) and any(issubclass(hint, base) for base in CONFIGURABLE)


@st.composite
def value(draw: st.DrawFn, hint: Any, depth: int) -> Any:
    """Something for a setting of this type; of another type now and then."""
    if draw(st.integers(0, 49)) == 0:
        return draw(st.sampled_from(ANYTHING))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        chosen = draw(st.sampled_from(inner))
        return None if chosen is type(None) else draw(value(chosen, depth))
    if origin is typing.Literal:
        return draw(st.sampled_from([*inner, "nonsense"]))
    if origin in (list, tuple) or origin is typing.get_origin(typing.Sequence[int]):
        element = next((part for part in inner if part is not Ellipsis), str)
        return draw(st.lists(value(element, depth), max_size=3))
    for kind, pool in ((bool, [True, False]), (int, WHOLE), (float, NUMBERS), (str, TEXTS)):
        if hint is kind:
            return draw(st.sampled_from(pool))
    if hint is LMConfig:
        return {"name": TINY, "dtype": draw(st.sampled_from(["float32", "bfloat16", "float64"]))}
    if configurable(hint):
        return draw(node(draw(st.sampled_from(classes(hint))), depth + 1))
    if dataclasses.is_dataclass(hint):
        return draw(node(hint, depth + 1))["init_args"]
    return draw(st.sampled_from(ANYTHING))


@st.composite
def node(draw: st.DrawFn, kind: type, depth: int = 0) -> dict[str, Any]:
    """A class with some of its settings."""
    hints = {
        name: hint
        for owner in reversed(inspect.getmro(kind))
        for name, hint in typing.get_type_hints(owner.__init__).items()
    }
    arguments: dict[str, Any] = {}
    for name, parameter in settings_of(kind).items():
        if name in ("lm", "optimizer", "scheduler", "kwargs", "max_new_tokens"):
            continue
        needed = parameter.default is inspect.Parameter.empty
        if (needed and draw(st.integers(0, 29))) or (depth < 3 and draw(st.integers(0, 9)) == 0):
            arguments[name] = draw(value(hints.get(name, str), depth))
    if draw(st.integers(0, 99)) == 0:
        arguments["no_such_setting"] = 1
    return {"class_path": kind.__name__, "init_args": arguments}


@st.composite
def config(draw: st.DrawFn) -> dict[str, Any]:
    model = draw(node(draw(st.sampled_from(classes(methods.PromptMethod)))))
    model["init_args"]["lm"] = {"name": TINY, "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16"]))}
    model["init_args"]["max_new_tokens"] = 1
    if model["class_path"] == "ReinforceRefiner":  # the tiny model has no 500 tokens
        model["init_args"].setdefault("support", {"class_path": "TopK", "init_args": {"count": 20}})
    data = draw(node(getattr(datamodules, draw(st.sampled_from(DATA)))))
    data["init_args"] = {**SMALL, **data["init_args"]}
    trainer: dict[str, Any] = {}
    for name, pool in (
        ("accumulate_grad_batches", [1, 2, 0]),
        ("gradient_clip_val", [None, *NUMBERS]),
        ("limit_train_batches", [4, 0.5]),
        ("precision", ["32-true", "bf16-mixed", "16-true", "no such"]),
        ("val_check_interval", [1, 2, 0, 1.0]),
    ):
        if draw(st.integers(0, 15)) == 0:
            trainer[name] = draw(st.sampled_from(pool))
    return {"model": model, "data": data, "trainer": trainer}


def outcome(chosen: dict[str, Any]) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(20)))
        if chosen["data"]["class_path"] == "QuestionAnswer":
            chosen["data"]["init_args"]["train"] = str(rows)
        path.write_text(yaml.safe_dump(chosen))
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            try:
                command = "test" if chosen["model"]["class_path"] in UNTRAINED else "fit"
                limits = FIXED if command == "fit" else [*FIXED, "--trainer.limit_test_batches", "2"]
                code = run([command, "-c", str(path), *limits, "--trainer.default_root_dir", f"{folder}/run"])
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        if code == 0 and command == "fit":
            assert (Path(folder) / "run" / "checkpoints" / "last.ckpt").exists()
        return code, said.getvalue()


@settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(config())
def check_config(chosen: dict[str, Any]) -> None:
    code, said = outcome(chosen)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    ENDS["trained" if code == 0 else "refused"] += 1
    assert "Traceback" not in said, said
    assert "LIGHTNING_PROMPTS_DEBUG" not in said, f"nobody had thought of it: {errors}"
    if code:
        assert code in (1, 2), said
        assert len(errors) == 1, said
    else:
        assert not errors, said


@pytest.mark.timeout(1800)
def test_random_configs() -> None:
    check_config()
    assert ENDS["trained"] >= COUNT // 5, ENDS
    assert ENDS["refused"] >= COUNT // 5, ENDS
