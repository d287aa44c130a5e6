"""An interrupted sweep, in one process and on a real local Ray, against an independent calculation of its table."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.faults import Run
from support.project import ROOT
from support.sweeps import write_methods


def independent(folder: Path) -> tuple[float, float, list[float]]:
    """Mean and deviation of the NLL, and exact matches, from the single answers."""
    runs = [
        [json.loads(line) for line in (seed / "predictions.jsonl").read_text().splitlines()]
        for seed in sorted(folder.glob("seed-*"))
    ]
    nll = [sum(row["nll"] for row in rows) / len(rows) for rows in runs]
    mean = sum(nll) / len(nll)
    deviation = (sum((value - mean) ** 2 for value in nll) / (len(nll) - 1)) ** 0.5
    return mean, deviation, [sum(row["correct"] for row in rows) / len(rows) for rows in runs]


def prepare(folder: Path, text: str) -> Callable[..., Run]:
    """Write a sweep file and its methods. What is returned starts a command on it.

    Each process that imports the class of the data leaves its number in the file ``processes``.
    """
    write_methods(folder)
    (folder / "noted.py").write_text(
        "import os\nfrom lightning_prompts.datamodules import Antonyms\nclass Noted(Antonyms):\n    pass\n"
        f"with open({str(folder / 'processes')!r}, 'a') as file:\n    print(os.getpid(), file=file)\n"
    )
    for file in folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("Antonyms", "noted.Noted"))
    path = folder / "sweep.yaml"
    path.write_text(f"folder: {folder / 'runs'}\n{text}")

    def start(name: str, *more: str) -> Run:
        words = ["sweep", "-c", str(path), *more]
        variables = {"PYTHONPATH": f"{ROOT}:{folder}"}
        return Run(words, folder / f"{name}.out", None, folder / f"{name}.err", folder, variables)

    return start


def processes(folder: Path) -> list[str]:
    file = folder / "processes"
    return file.read_text().split() if file.exists() else []


def cells(run: Run) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.output.splitlines()]


def test_an_interrupted_sweep_continues_and_makes_its_table(tmp_path: Path) -> None:
    """In one process: two methods with 2 seeds, and a setting that cannot run."""
    runs = tmp_path / "runs"
    sweep = prepare(
        tmp_path,
        f"seeds: [0, 1]\nmethods:\n  - {{config: {tmp_path}/few.yaml, settings: {{model.shots: [1]}}}}\n"
        f"  - {{config: {tmp_path}/soft.yaml, settings: {{model.length: [1, -1]}}}}\n",
    )
    first = sweep("first")
    first.send(signal.SIGINT, when=lambda: any(runs.rglob("metrics.json")))
    done = {file: file.stat().st_mtime_ns for file in runs.rglob("metrics.json")}
    assert first.wait() == 130, first.whole_output
    assert done, first.whole_output
    left = [file for file in runs.rglob("metrics.json") if file not in done]
    assert len(done) + len(left) < 4
    assert "of 6 runs are not done" in first.whole_output
    assert "Traceback" not in first.whole_output
    assert first.output.startswith("| config |")

    second = sweep("second")
    assert second.wait() == 1, second.whole_output
    assert {file: file.stat().st_mtime_ns for file in done} == done, "done is done"
    lines = cells(second)
    assert lines[0][-1] == "val/nll"
    good = lines[2:4]
    assert {row[0] for row in good} == {"few-shots=1", "soft-length=1"}
    assert [float(row[-1].split()[0]) for row in good] == sorted(float(row[-1].split()[0]) for row in good)
    for row in good:
        mean, deviation, matches = independent(runs / row[0])
        assert [float(part) for part in row[1].split(" ± ")] == pytest.approx([mean, deviation], abs=1e-3)
        assert float(row[2].split()[0]) == pytest.approx(sum(matches) / 2, abs=1e-3)
    assert [row[:2] for row in lines[4:]] == [
        ["soft-length=-1", f"seed {seed}: length must be at least 1, got -1"] for seed in (0, 1)
    ]
    assert (runs / "table.md").read_text() == second.output
    check_quiet(second)
    assert len(processes(tmp_path)) == 2, "one for each command"

    again = sweep("again", "--table")
    again.wait()
    shown = [line for line in again.output.splitlines() if "seed" not in line]
    assert shown == second.output.splitlines()[:4]


def check_quiet(run: Run) -> None:
    assert run.error_log is not None
    noise = [line for line in run.error_log.read_text().splitlines() if line.strip()]
    assert len(noise) < 12, noise


@pytest.mark.timeout(1500)  # each run imports everything: minutes on a busy machine
def test_an_interrupted_sweep_continues_on_ray(tmp_path: Path) -> None:
    """Interrupted as soon as a worker has a run; one setting that runs, one that cannot."""
    runs = tmp_path / "runs"
    sweep = prepare(
        tmp_path,
        f"seeds: 0\nworkers: 2\nmethods:\n  - {{config: {tmp_path}/few.yaml, settings: {{model.shots: [1]}}}}\n"
        f"  - {{config: {tmp_path}/soft.yaml, settings: {{model.length: [-1]}}}}\n",
    )
    first = sweep("first")
    first.send(signal.SIGINT, when=lambda: any(runs.glob("*/seed-0")))
    assert first.wait() == 130, first.whole_output
    assert not list(runs.rglob("metrics.json"))
    assert "2 of 2 runs are not done" in first.whole_output
    assert "Traceback" not in first.whole_output

    before = processes(tmp_path)
    second = sweep("second")
    assert second.wait(1000) == 1, second.whole_output
    lines = cells(second)
    (name, nll, *_) = lines[2]
    assert name == "few-shots=1"
    rows = [json.loads(line) for line in (runs / name / "seed-0" / "predictions.jsonl").read_text().splitlines()]
    assert float(nll) == pytest.approx(sum(line["nll"] for line in rows) / len(rows), abs=1e-3)
    assert [row[:2] for row in lines[3:]] == [["soft-length=-1", "seed 0: length must be at least 1, got -1"]]
    check_quiet(second)
    assert not list(runs.glob(".ray*"))
    ran = processes(tmp_path)[len(before) :]
    assert len(set(ran)) == len(ran) == 2, "one for each run"
