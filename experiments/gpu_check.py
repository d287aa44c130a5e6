"""Run all checks that need a GPU, in one command and without a network.

    python experiments/gpu_check.py [--device cuda] [--parts methods,packed,cpu,speed,memory] [--out runs/gpu_check]

- packed: compare packed scores with scores of one text at a time, for all architectures and precisions;
- cpu: compare the GPU with the CPU, with the same weights;
- memory: provoke out-of-memory errors, and check that the run continues;
- speed: time training steps, generation and candidate grids against PEFT and Hugging Face, alone on the GPU;
- methods: train every method in every precision with the Trainer, and resume from its checkpoint.

The script prints each result, then a table for each part and a summary. It updates ``gpu_check.json`` after each
result. The exit code is 1 if a check fails. Checks that do not fit into ``--limit`` seconds are reported as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

for folder in (Path(__file__).parents[1], Path(__file__).parent):  # there may be no installation
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

if TYPE_CHECKING:
    from gpu_check_parts.rows import Row, Settings

PARTS = ("packed", "cpu", "memory", "speed", "methods")
SPEED_SHARE = 0.8  # fraction of the time limit
WORKERS = 8
PACKAGES = ("torch", "transformers", "lightning", "peft", "accelerate", "bitsandbytes", "tokenizers", "numpy")


class Result:
    """Collects rows, prints them, and writes them to a file.

    Args:
        out: Folder of the files.
        settings: Settings of the checks.
        begin: Start time, by ``time.monotonic``.
    """

    def __init__(self, out: Path, settings: Settings, begin: float) -> None:
        """Start without rows."""
        self.path = out / "gpu_check.json"
        self.start = begin
        self.rows: list[Row] = []
        self.machine = machine(settings)

    def add(self, rows: list[Row]) -> None:
        """Print and keep the rows of a job."""
        for row in rows:
            state = {True: "ok", False: "WRONG", None: "--"}[row.ok]
            what = f"{row.part}: {row.name}: {row.error or row.measured}"
            print(f"[{time.monotonic() - self.start:6.1f}] {state:5} {what} ({row.seconds:.1f} s)", flush=True)
        self.rows += rows
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        content = {
            "machine": self.machine,
            "seconds": time.monotonic() - self.start,
            "summary": self.summary(),
            "rows": [asdict(row) for row in self.rows],
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        part.replace(self.path)

    @property
    def wrong(self) -> list[Row]:
        """Rows of failed checks."""
        return [row for row in self.rows if row.ok is False]

    def summary(self) -> str:
        """Summarise all rows in one line."""
        skipped = sum(len(row.figures.get("jobs", [row])) for row in self.rows if row.ok is None)
        missed = [row for row in self.rows if (row.figures.get("ratio") or 1e9) < (row.figures.get("goal") or 0)]
        return (
            f"{len(self.rows)} checks: {len(self.wrong)} wrong, {skipped} not run, {len(missed)} below the target "
            f"speed, in {time.monotonic() - self.start:.0f} s"
        )

    def tables(self) -> None:
        """Print a table for each part, and the summary."""
        from rich.console import Console
        from rich.table import Table

        console = Console(width=200, record=True, highlight=False)
        for part in ("packed", "cpu", "methods", "memory", "speed"):
            rows = [row for row in self.rows if row.part == part]
            if not rows:
                continue
            table = Table("", "name", "measured", "expected", "s", title=part)
            for row in rows:
                state = {True: "ok", False: "[red]WRONG[/red]", None: "--"}[row.ok]
                text = (row.error or row.measured).replace("[", "\\[")
                table.add_row(state, row.name, text, row.expected.replace("[", "\\["), f"{row.seconds:.1f}")
            console.print(table)
        for row in self.wrong:
            console.print(f"WRONG {row.part}: {row.name}: {row.error or row.measured}", markup=False)
        console.print(self.summary())
        self.path.with_suffix(".txt").write_text(console.export_text(), encoding="utf-8")


def machine(settings: Settings) -> dict[str, Any]:
    """Describe the machine, the packages and the settings."""
    import torch

    from gpu_check_parts.base import methods_lm

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": settings.device,
        "small": settings.small,
        "lm": methods_lm(settings),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu", "pretend"), help="default: a GPU if there is one")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="tiny shapes; default: except on a GPU")
    parser.add_argument("--lm", help="the LM of the methods: a local folder, or random:TYPE,key=value,...")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names of jobs, with wildcards")
    parser.add_argument("--workers", type=int, help=f"worker processes; default: {WORKERS} on a GPU, otherwise none")
    parser.add_argument("--limit", type=float, default=330.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    given = parser.parse_args(arguments)
    given.parts = [part.strip() for part in given.parts.split(",") if part.strip()]
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if a check fails."""
    given = parsed(arguments)
    begin = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="gpu_check."))
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "LIGHTNING_PROMPTS_CACHE": str(scratch / "cache"),
    }
    try:
        return _run(given, scratch, begin)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(given: argparse.Namespace, scratch: Path, begin: float) -> int:
    import torch

    from gpu_check_parts.rows import Settings
    from gpu_check_parts.work import jobs_of, run_here, run_in_workers

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    small = device != "cuda" if given.small is None else given.small
    settings = Settings(device, small, given.lm, scratch)
    given.out.mkdir(parents=True, exist_ok=True)
    result = Result(given.out, settings, begin)
    print(json.dumps(result.machine), flush=True)
    workers = given.workers if given.workers is not None else WORKERS if device == "cuda" else 0

    def phase(parts: Sequence[str], processes: int, seconds: float) -> None:
        jobs = [
            job
            for part in PARTS
            if part in parts and part in given.parts
            for job in jobs_of(part, settings)
            if any(fnmatch(job.name, name) for name in given.only)
        ]
        if not jobs:
            return
        deadline = min(begin + given.limit, time.monotonic() + seconds)
        if processes:
            run_in_workers(jobs, settings, processes, deadline, result.add)
        else:
            run_here(jobs, settings, deadline, result.add)

    others = [part for part in PARTS if part != "speed"]
    phase(["speed"], min(workers, 1), given.limit * (SPEED_SHARE if set(given.parts) & set(others) else 1.0))
    phase(others, workers, given.limit)
    result.write()
    result.tables()
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
