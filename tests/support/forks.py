"""Processes that start in a moment: forks of a server that has imported everything and has done one short run.

A new interpreter takes several seconds to import Lightning. A fork is a process of its own all the same: it can be
killed, has its own signals, threads, environment and files, and nothing that it does reaches another process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["support.warm_up"])


def start_server() -> None:
    """Start the server if it does not run yet. It finds the modules of the tests, and opens no second thread."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    before = dict(os.environ)
    os.environ.update(own)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(work: Callable[..., object], *args: Any) -> multiprocessing.process.BaseProcess:
    """Call a function in a new process."""
    start_server()
    process = context.Process(target=work, args=args)
    process.start()
    return process


def become(log: Path, errors: Path | None, environment: Mapping[str, str], folder: str) -> None:
    """Make this process a fresh one: its output, environment, folder and signals."""
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (log, errors or log)]
    for file, stream in zip(files, (1, 2), strict=True):
        os.dup2(file, stream)
        os.close(file)
    # The streams of the server may be anything.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [
        path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path
    ]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for module in list(sys.modules.values()):  # a new process shows each warning once more
        vars(module).get("__warningregistry__", {}).clear()
    torch.set_num_threads(1)


class Second:
    """The second process of a command with two, in place of the ``subprocess.Popen`` that Lightning starts.

    It is forked ahead of the command and waits, so that nothing of the first process is in it.
    """

    waiting: Second

    def __init__(self, main: Callable[[], int]) -> None:
        read, self.write = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            return
        os.close(self.write)
        code = 1
        with os.fdopen(read, "rb") as pipe:
            environment = pipe.read()
        try:
            if environment:
                os.environ.clear()
                os.environ.update(pickle.loads(environment))
                code = main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @classmethod
    def popen(cls, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> Second:
        """Let it go."""
        assert cwd is None
        with os.fdopen(cls.waiting.write, "wb") as pipe:
            pipe.write(pickle.dumps(dict(env)))
        return cls.waiting

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)
