"""Processes that are killed or interrupted at any moment: nothing is lost but time."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_prompts.checkpoints import check_readable
from lightning_prompts.methods import PromptMethod
from support.checkpoint_state import same
from support.faults import COMMON, METHODS, Run, command, dies_in, last, result, resume


def written(run: Run, folder: Path, times: int) -> None:
    """Wait until a checkpoint has been written so many times."""
    seen, before = 0, 0
    while seen < times:
        assert run.process.is_alive(), f"ended after {seen} checkpoints: {run.output}"
        now = last(folder).stat().st_mtime_ns if last(folder).exists() else before
        seen, before = seen + (now != before), now
        time.sleep(0.001)


@pytest.fixture(scope="module", params=METHODS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A run without a fault: its method and result."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(command(request.param, folder / "run"), folder / "log")
    assert run.wait() == 0, run.output
    return request.param, result(folder / "run")


@pytest.mark.parametrize("number", range(5))
def test_killed_at_any_moment(whole: tuple[str, dict[str, Any]], number: int, tmp_path: Path) -> None:
    """Some time after one of the first nine checkpoints of twelve, within a step, a validation or the next of them."""
    method, expected = whole
    draw = random.Random(f"{method} {number}")
    saves, delay = draw.randint(1, 9), draw.uniform(0, 0.1)
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command(method, folder), log)
    written(run, folder, saves)
    time.sleep(delay)
    run.process.kill()
    run.process.join()
    assert run.process.exitcode == -signal.SIGKILL
    assert 0 < result(folder)["global_step"] < expected["global_step"]
    for path in folder.glob("checkpoints/*.ckpt"):
        check_readable(path)
    assert resume(method, folder, log).wait() == 0, log.read_text()
    assert same(result(folder), expected), f"killed {delay:.3f} s after checkpoint {saves}"


@pytest.mark.parametrize("name", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("call", [1, 2, 3, 6, 11])
def test_killed_while_a_file_is_written(name: str, call: int, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert Run(command("soft prompt", folder), log, dies_in(name, call)).wait() == -signal.SIGKILL
    for path in folder.glob("checkpoints/*.ckpt"):
        check_readable(path)
    assert resume("soft prompt", folder, log).wait() == 0, log.read_text()
    whole = tmp_path / "whole"
    assert Run(command("soft prompt", whole), log).wait() == 0
    assert same(result(folder), result(whole))


@pytest.mark.parametrize(("number", "code", "saves"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 4)])
def test_interrupted(whole: tuple[str, dict[str, Any]], number: int, code: int, saves: int, tmp_path: Path) -> None:
    method, expected = whole
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command(method, folder), log)
    written(run, folder, saves)
    run.send(number)
    assert run.wait() == code, run.output
    assert "Traceback" not in run.output
    assert f"resume with --ckpt_path {last(folder)}" in run.output
    stopped = result(folder)["global_step"]
    assert 0 < stopped < expected["global_step"]
    assert resume(method, folder, log).wait() == 0, log.read_text()
    assert same(result(folder), expected), f"stopped after step {stopped}"


def test_interrupted_twice_ends_at_once(tmp_path: Path) -> None:
    """The second signal does not wait for the step."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command("soft prompt", folder), log)
    run.send(signal.SIGINT, when=last(folder).exists)
    run.send(signal.SIGINT, when=lambda: "send it again" in run.output)
    assert run.wait() == 130, run.output
    assert resume("soft prompt", folder, log).wait() == 0, log.read_text()


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
    words = ["test", "--model", "FixedPrompt", *COMMON[1:3], "--data", "Antonyms", "--data.eval_batch_size", "1",
             "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder),
             "--trainer.enable_progress_bar", "false"]  # fmt: skip
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = Run(words, log, slowly)
        run.send(number, when=lambda: "a batch" in log.read_text() if log.exists() else False)
        assert run.wait() == code, run.output
        log.unlink()
        assert not (folder / "metrics.json").exists()
