"""Run jobs in this process, or in worker processes, so that a crash or a hang does not affect other jobs."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from gpu_check_parts import compare, memory, methods, packed, speed
from gpu_check_parts.base import clean, describe_error, prepare
from gpu_check_parts.rows import Job, Row, Settings

PARTS = {"packed": packed, "cpu": compare, "memory": memory, "speed": speed, "methods": methods}
START_SECONDS = 120  # time limit for the start of a worker

Report = Callable[[list[Row]], None]


def jobs_of(part: str, settings: Settings) -> list[Job]:
    """List the jobs of a part."""
    return [Job(part, name) for name in PARTS[part].jobs(settings)]


def execute(job: Job, settings: Settings) -> list[Row]:
    """Run a job; turn an exception into a row."""
    start = time.perf_counter()
    try:
        rows = PARTS[job.part].run(job.name, settings)
    except Exception as error:  # noqa: BLE001 - report it, and continue with other jobs
        rows = [Row(job.part, job.name, ok=False, error=describe_error(error))]
    clean(settings.device)
    if len(rows) == 1:
        rows[0].seconds = time.perf_counter() - start
    return rows


def run_here(jobs: Sequence[Job], settings: Settings, deadline: float, report: Report) -> None:
    """Run jobs in this process."""
    prepare(settings.device)
    waiting = deque(jobs)
    while waiting and time.monotonic() < deadline:
        report(execute(waiting.popleft(), settings))
    report(_out_of_time(waiting))


def run_in_workers(jobs: Sequence[Job], settings: Settings, workers: int, deadline: float, report: Report) -> None:
    """Run jobs in worker processes. A job whose process dies or exceeds its time is reported, and a worker replaced."""
    waiting = deque(jobs)
    pool: list[_Worker] = []
    try:
        failed = _hand_out(waiting, pool, settings, workers, deadline, report)
        waiting.extendleft(worker.job for worker in pool if worker.job is not None)
    finally:
        for worker in pool:
            worker.end()
    if failed:
        report(
            [Row(job.part, job.name, ok=False, error=f"worker processes fail to start: {failed}") for job in waiting]
        )
    else:
        report(_out_of_time(waiting))


def _hand_out(
    waiting: deque[Job], pool: list[_Worker], settings: Settings, workers: int, deadline: float, report: Report
) -> str:
    """Give jobs to workers until no jobs or no time remain; return an error if workers fail to start."""
    failures: list[str] = []
    while (waiting or any(worker.job for worker in pool)) and time.monotonic() < deadline:
        while len(pool) < min(workers, len(waiting) + sum(worker.job is not None for worker in pool)):
            pool.append(_Worker(settings))
        for worker in list(pool):
            job, outcome = worker.poll()
            if not worker.alive:
                pool.remove(worker)
            if outcome is not None and job is not None:
                report(outcome)
            elif outcome is not None:  # the worker died before its first job
                failures += [row.error for row in outcome]
            elif worker.ready and worker.job is None and waiting:
                worker.give(waiting.popleft())
        if len(failures) >= 3:
            return failures[-1]
        wait([worker.connection for worker in pool], timeout=0.2)
    return ""


def _out_of_time(jobs: Sequence[Job]) -> list[Row]:
    """Make a row for each part with jobs that were not run."""
    rows = []
    for part in dict.fromkeys(job.part for job in jobs):
        names = [job.name for job in jobs if job.part == part]
        rows.append(Row(part, f"{len(names)} more", "not run: out of time", ok=None, figures={"jobs": names}))
    return rows


class _Worker:
    """A process that takes jobs."""

    def __init__(self, settings: Settings) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(other, settings))
        self.process.start()
        other.close()
        self.ready, self.alive = False, True
        self.job: Job | None = None
        self.since, self.limit = time.monotonic(), float(START_SECONDS)

    def give(self, job: Job) -> None:
        """Send a job to the process."""
        self.job, self.since, self.limit = job, time.monotonic(), float(PARTS[job.part].SECONDS)
        with contextlib.suppress(OSError):  # the process has died; `poll` reports this
            self.connection.send(job)

    def poll(self) -> tuple[Job | None, list[Row] | None]:
        """Return the current job and its rows if it has finished, or an error row if the process failed."""
        job = self.job
        name = ("start", "a worker process") if job is None else (job.part, job.name)
        try:
            if self.connection.poll():
                rows, broken = self.connection.recv()
                self.ready, self.job = True, None
                if broken:
                    self.end()
                return (job, rows) if job is not None else (None, None)
        except (EOFError, OSError):
            self.end()
            return job, [Row(*name, ok=False, error=f"the process died with exit code {self.process.exitcode}")]
        if (job is not None or not self.ready) and time.monotonic() - self.since > self.limit:
            self.end()
            return job, [Row(*name, ok=False, error=f"killed after {self.limit:.0f} seconds")]
        return job, None

    def end(self) -> None:
        """Kill the process, because the project catches SIGTERM."""
        self.alive = False
        self.process.kill()
        self.process.join(10)
        self.connection.close()


def _serve(connection: Connection, settings: Settings) -> None:
    """Run jobs until the connection closes."""
    faulthandler.enable()
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // 8)))
    prepare(settings.device)
    connection.send(([], False))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        rows = execute(job, settings)
        gc.collect()
        connection.send((rows, _broken(settings.device)))


def _broken(device: str) -> bool:
    """Whether an error has made the GPU unusable for this process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
