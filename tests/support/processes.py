"""Jobs done by one process and by two, to be compared. The two are started once for all jobs."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from support import forks

Job = Callable[[int, Path], Any]  # of how many processes it is one, and where it may write; what comes of it is saved
PATIENCE = 1200  # seconds; a busy machine takes its time
ERROR = "what went wrong"


def together(jobs: Mapping[str, Job], folder: Path, count: int = 2) -> None:
    """Do jobs one after the other, each in ``count`` processes at once that find each other through gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forks.start(_work, dict(jobs), folder, rank, count, port) for rank in range(count)]
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break  # the others would wait for it
        time.sleep(0.1)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    logs = "\n".join(f"--- process {rank}\n{log(folder, rank).read_text()}" for rank in range(count))
    assert all(process.exitcode == 0 for process in processes), logs


def result(folder: Path, job: str, rank: int) -> Any:
    """What came of a job in one of the processes."""
    found = torch.load(folder / f"{job}-{rank}.pt", weights_only=True)
    assert ERROR not in found, found[ERROR]
    return found


def log(folder: Path, rank: int) -> Path:
    """What a process has said."""
    return folder / f"log-{rank}"


def _work(jobs: dict[str, Job], folder: Path, rank: int, count: int, port: int) -> None:
    variables = {
        **os.environ,
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LIGHTNING_PROMPTS_CACHE": str(folder / "cache"),
    }
    forks.become(log(folder, rank), None, variables, str(Path.cwd()))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    for name, job in jobs.items():
        start = time.perf_counter()
        try:
            found = job(count, folder / name)
        except Exception:  # noqa: BLE001 - told by whoever asks for the result; the other process fails alike, or waits
            found = {ERROR: traceback.format_exc()}
        torch.save(found, folder / f"{name}-{rank}.pt")
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    torch.distributed.destroy_process_group()
