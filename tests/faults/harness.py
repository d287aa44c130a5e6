"""The command line as processes of their own that can be killed.

They are forked from a server that has everything imported, so each starts in a moment and not in seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_prompts.cli import run

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["lightning_prompts.cli", "transformers.models.llama.modeling_llama", "numpy"])

Fault = Callable[[], None]  # done in the process, ahead of the command
PATIENCE = 120  # seconds until a process counts as hanging


class Run:
    """A command in a process of its own.

    Args:
        arguments: The command line's words.
        log: Where its output goes.
        fault: What goes wrong in it.
    """

    def __init__(self, arguments: Sequence[str], log: Path, fault: Fault | None = None) -> None:
        self.log = log
        self.process = context.Process(target=_main, args=(list(arguments), str(log), fault))
        self.process.start()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.output}")
        return self.process.exitcode

    def send(self, number: int, when: Callable[[], bool] = lambda: True) -> None:
        """Send a signal as soon as something holds."""
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert time.monotonic() < deadline, f"nothing to interrupt: {self.output}"
            assert self.process.is_alive(), f"ended before it could be interrupted: {self.output}"
            time.sleep(0.005)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.output.splitlines() if line.startswith("error:")]


def _main(arguments: list[str], log: str, fault: Fault | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    # The streams of the server may be anything.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    sys.argv = ["lightning-prompts", *arguments]
    torch.set_num_threads(1)
    if fault is not None:
        fault()
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


def environment(name: str, value: str) -> Fault:
    """An environment variable."""
    return partial(_set_variable, name, value)


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def fails_in(name: str, call: int, error: Exception) -> Fault:
    """A function raises from its ``call``-th time on."""
    return partial(_wrapped, name, partial(_raises, call, error))
