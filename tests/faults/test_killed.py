"""Processes that are killed or interrupted at any moment: nothing is lost but time."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lightning_prompts.checkpoints import check_readable
from lightning_prompts.methods import PromptMethod
from support.checkpoint_state import same
from support.faults import COMMON, METHODS, Run, command, dies_in, last, result, resume, signalled


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of a method's run without a fault; each is done once."""

    @cache
    def whole(method: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        run = Run(command(method, folder / "run"), folder / "log")
        assert run.wait() == 0, run.output
        return result(folder / "run")

    return whole


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_moment(method: str, wholes: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Killed twice, some time after one of the first four checkpoints of seven: in a step, a validation or the next."""
    draw = random.Random(method)
    folder, log = tmp_path / "run", tmp_path / "log"
    expected = wholes(method)
    for _ in range(2):
        saves, delay = draw.randint(1, 2), draw.uniform(0, 0.08)
        said = f"to be killed {delay:.3f} s after checkpoint {saves}"
        assert resume(method, folder, log, signalled(signal.SIGKILL, saves, delay)).wait() == -signal.SIGKILL, said
        assert 0 < result(folder)["global_step"] < expected["global_step"], said
        for path in folder.glob("checkpoints/*.ckpt"):
            check_readable(path)
    assert resume(method, folder, log).wait() == 0, log.read_text()
    assert same(result(folder), expected)


def test_killed_while_a_file_is_written(wholes: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Killed again and again, at the first, second, third, ... file of a start."""
    folder, log = tmp_path / "run", tmp_path / "log"
    for name, call in [("os.fsync", 1), ("os.replace", 2), ("os.fsync", 3), ("os.replace", 6), ("os.fsync", 11)]:
        run = resume("soft prompt", folder, log, dies_in(name, call))
        assert run.wait() == -signal.SIGKILL, f"{name} was not called {call} times: {run.output}"
        for path in folder.glob("checkpoints/*.ckpt"):
            check_readable(path)
    assert resume("soft prompt", folder, log).wait() == 0, log.read_text()
    assert same(result(folder), wholes("soft prompt"))


@pytest.mark.parametrize(
    ("method", "number", "code", "saves"),
    [
        ("soft prompt", signal.SIGINT, 130, 1),
        ("gumbel, two batches a step", signal.SIGTERM, 143, 4),
    ],
)
def test_interrupted(
    method: str, number: int, code: int, saves: int, wholes: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command(method, folder), log, signalled(number, saves))
    assert run.wait() == code, run.output
    assert "Traceback" not in run.output
    assert f"resume with --ckpt_path {last(folder)}" in run.output
    stopped, expected = result(folder)["global_step"], wholes(method)
    assert 0 < stopped < expected["global_step"]
    assert resume(method, folder, log).wait() == 0, log.read_text()
    assert same(result(folder), expected), f"stopped after step {stopped}"


def interrupted_in_a_long_step() -> None:
    """The third step gets a signal, and would take two minutes."""
    original, steps = PromptMethod.on_train_batch_start, iter(range(1000))

    def start(*args: Any) -> Any:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(120)
        return original(*args)

    PromptMethod.on_train_batch_start = start  # type: ignore[method-assign]


def test_interrupted_twice_ends_at_once(tmp_path: Path) -> None:
    """The second signal does not wait for the step."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command("soft prompt", folder), log, interrupted_in_a_long_step)
    run.send(signal.SIGINT, when=lambda: "send it again" in run.output)
    assert run.wait(60) == 130, run.output
    check_readable(last(folder), resume=True)


def slowly() -> None:
    """Every batch of a test takes its time, and says so."""
    original = PromptMethod.test_step

    def step(*args: Any, **kwargs: Any) -> Any:
        print("a batch", flush=True)
        time.sleep(0.05)
        return original(*args, **kwargs)

    PromptMethod.test_step = step  # type: ignore[method-assign]


def test_interrupted_while_testing(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [
        "test",
        "--model",
        "FixedPrompt",
        *COMMON[1:3],
        "--data",
        "Antonyms",
        "--data.eval_batch_size",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        str(folder),
        "--trainer.enable_progress_bar",
        "false",
    ]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = Run(words, log, slowly)
        run.send(number, when=lambda: "a batch" in log.read_text() if log.exists() else False)
        assert run.wait() == code, run.output
        log.unlink()
        assert not (folder / "metrics.json").exists()
