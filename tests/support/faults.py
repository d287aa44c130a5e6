"""The command line as processes of their own that can be killed."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.strategies.launchers import subprocess_script

from lightning_prompts.cli import run
from support import forks
from support.checkpoint_state import state_of
from support.forks import Second
from support.models import SMALLEST

Fault = Callable[[], None]  # done in the process, ahead of the command
PATIENCE = 600  # seconds until a process counts as hanging


class Run:
    """A command in a process of its own.

    Args:
        arguments: The command line's words.
        log: Where its output goes.
        fault: What goes wrong in it.
        errors: Where its errors go; beside the output by default.
        folder: Its working directory; this process's by default.
        environment: Its variables beside this process's. Modules are found in its ``PYTHONPATH``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        fault: Fault | None = None,
        errors: Path | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log, self.error_log = log, errors
        variables = {**os.environ, **(environment or {})}
        self.process = forks.start(_main, list(arguments), log, fault, errors, variables, str(folder or Path.cwd()))

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.whole_output}")
        return self.process.exitcode

    def send(self, number: int, when: Callable[[], bool] = lambda: True) -> None:
        """Send a signal as soon as something holds."""
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert time.monotonic() < deadline, f"nothing to interrupt: {self.whole_output}"
            assert self.process.is_alive(), f"ended before it could be interrupted: {self.whole_output}"
            time.sleep(0.005)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def output(self) -> str:
        """What it has said so far, on its standard error too unless that has a file of its own."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @property
    def whole_output(self) -> str:
        """That, and its standard error's own file."""
        own = self.error_log.read_text(encoding="utf-8") if self.error_log and self.error_log.exists() else ""
        return self.output + own

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.output.splitlines() if line.startswith("error:")]


def _main(
    arguments: list[str],
    log: Path,
    fault: Fault | None,
    errors: Path | None,
    environment: dict[str, str],
    folder: str,
) -> None:
    forks.become(log, errors, environment, folder)
    sys.argv = ["lightning-prompts", *arguments]
    if fault is not None:
        fault()
    if "--trainer.strategy" in arguments:
        Second.waiting = Second(lambda: run(arguments))
        subprocess_script.subprocess = SimpleNamespace(Popen=Second.popen)
    sys.exit(run(arguments))


# --- faults -----------------------------------------------------------------------------------------------------------


def _wrapped(name: str, around: Callable[[Callable[..., Any], int], Callable[..., Any]]) -> None:
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, attribute)
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return around(original, calls)(*args, **kwargs)

    setattr(owner, attribute, replacement)


def _dies(call: int, original: Callable[..., Any], number: int) -> Callable[..., Any]:
    if number == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original


def _raises(call: int, error: Exception, original: Callable[..., Any], number: int) -> Callable[..., Any]:
    if number < call:
        return original

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


def dies_in(name: str, call: int) -> Fault:
    """The process is killed as it enters a function (its full name) for the ``call``-th time."""
    return partial(_wrapped, name, partial(_dies, call))


def signalled(number: int, saves: int, delay: float = 0.0) -> Fault:
    """The process gets a signal some seconds after it has written ``last.ckpt`` so many times, wherever it is then."""
    return partial(_signalled, number, saves, delay)


def _signalled(number: int, saves: int, delay: float) -> None:
    original, count = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        original(source, target)
        count += Path(target).name == "last.ckpt"
        if count == saves:
            count += 1
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()

    os.replace = replace  # type: ignore[assignment]


def environment(name: str, value: str) -> Fault:
    """An environment variable."""
    return partial(_set_variable, name, value)


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def fails_in(name: str, call: int, error: Exception) -> Fault:
    """A function raises from its ``call``-th time on."""
    return partial(_wrapped, name, partial(_raises, call, error))


COMMON = [
    "fit",
    "--model.lm.name",
    SMALLEST,
    "--model.max_new_tokens",
    "1",
    "--data",
    "Antonyms",
    "--data.batch_size",
    "8",
    "--data.max_train_examples",
    "50",
    "--data.val_fraction",
    "0.01",
    "--data.test_fraction",
    "0.01",
    "--trainer.max_steps",
    "14",
    "--trainer.max_epochs",
    "-1",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.val_check_interval",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--data.eval_batch_size",
    "4",
]


METHODS = {
    "soft prompt": ["--model", "SoftPromptTuning", "--model.length", "3"],
    "gumbel, two batches a step": [
        "--model",
        "RelaxedPromptTuning",
        "--model.length",
        "3",
        "--model.estimator",
        "GumbelSoftmax",
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.max_steps",
        "7",
    ],
    "hard search": ["--model", "HardPromptSearch", "--model.length", "3", "--model.candidates", "8"],
    "reinforce, moving average": [
        "--model",
        "ReinforceRefiner",
        "--model.length",
        "2",
        "--model.samples",
        "2",
        "--model.refiner",
        "MLPRefiner",
        "--model.refiner.hidden",
        "8",
        "--model.baseline",
        "MovingAverage",
        "--model.support",
        "TopK",
        "--model.support.count",
        "20",
    ],
}


def command(method: str, folder: Path) -> list[str]:
    return [
        COMMON[0],
        *METHODS[method][:2],
        *COMMON[1:],
        *METHODS[method][2:],
        "--trainer.default_root_dir",
        str(folder),
    ]


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def result(folder: Path) -> dict[str, Any]:
    """All that decides how a run goes on, and what it has found."""
    return state_of(last(folder))


def resume(method: str, folder: Path, log: Path, fault: Fault | None = None) -> Run:
    """Go on from the last checkpoint; begin anew where there is none yet."""
    words = ["--ckpt_path", "last"] if last(folder).exists() else ["--overwrite", "true"]
    return Run([*command(method, folder), *words], log, fault)
