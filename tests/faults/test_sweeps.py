"""An interrupted sweep, in one process and on a real local Ray, against an independent calculation of its table."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.faults import Run
from support.project import ROOT
from support.sweeps import write_methods


def independent(folder: Path) -> tuple[float, float, list[float]]:
    """Mean and deviation of the NLL, and exact matches, from the single answers."""
    runs = [[json.loads(line) for line in (seed / "predictions.jsonl").read_text().splitlines()]
            for seed in sorted(folder.glob("seed-*"))]  # fmt: skip
    nll = [sum(row["nll"] for row in rows) / len(rows) for rows in runs]
    mean = sum(nll) / len(nll)
    deviation = (sum((value - mean) ** 2 for value in nll) / (len(nll) - 1)) ** 0.5
    return mean, deviation, [sum(row["correct"] for row in rows) / len(rows) for rows in runs]


@pytest.mark.timeout(1500)  # Ray starts twice, and each of its runs imports everything: minutes on a busy machine
@pytest.mark.parametrize(("workers", "shots", "lengths"), [(1, (1, 2), (1, 3)), (2, (1,), (1,))])
def test_an_interrupted_sweep_continues_and_makes_its_table(
    workers: int, shots: Sequence[int], lengths: Sequence[int], tmp_path: Path
) -> None:
    """Some settings with 2 seeds, and one that cannot run; in one process, and on Ray."""
    methods, path, runs = tmp_path, tmp_path / "sweep.yaml", tmp_path / "runs"
    write_methods(methods)
    (methods / "noted.py").write_text(
        "import os, pathlib\nfrom lightning_prompts.datamodules import Antonyms\nclass Noted(Antonyms):\n"
        "    def setup(self, stage):\n        super().setup(stage)\n"
        f"        with open({str(methods / 'processes')!r}, 'a') as file:\n"
        "            print(os.getpid(), self.trainer.default_root_dir, file=file)\n"
    )
    for file in methods.glob("*.yaml"):
        file.write_text(file.read_text().replace("Antonyms", "noted.Noted"))
    path.write_text(
        f"folder: {runs}\nseeds: [0, 1]\nworkers: {workers}\nmethods:\n"
        f"  - {{config: {methods}/few.yaml, settings: {{model.shots: {[*shots]}}}}}\n"
        f"  - {{config: {methods}/soft.yaml, settings: {{model.length: {[*lengths, -1]}}}}}\n"
    )

    def sweep(name: str, *more: str) -> tuple[Run, Path]:
        variables = {"PYTHONPATH": f"{ROOT}:{methods}"}
        words = ["sweep", "-c", str(path), *more]
        errors = methods / f"{name}.err"
        return Run(words, methods / f"{name}.out", None, errors, methods, variables), errors

    first, errors = sweep("first")
    first.send(signal.SIGINT, when=lambda: any(runs.rglob("metrics.json")))
    done = {file: file.stat().st_mtime_ns for file in runs.rglob("metrics.json")}
    code, err = first.wait(), errors.read_text()
    assert code == 130, err
    assert done, (first.output, err)
    left = [file for file in runs.rglob("metrics.json") if file not in done]
    good_runs = 2 * (len(shots) + len(lengths))
    assert len(done) + len(left) < good_runs
    assert f"of {good_runs + 2} runs are not done" in err
    assert "Traceback" not in err
    assert first.output.startswith("| config |")

    second, errors = sweep("second")
    code, err = second.wait(1000), errors.read_text()
    assert code == 1, err
    assert {file: file.stat().st_mtime_ns for file in done} == done, "done is done"
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.output.splitlines()]
    assert lines[0][-1] == "val/nll"
    good = lines[2 : 2 + good_runs // 2]
    names = {f"few-shots={shot}" for shot in shots} | {f"soft-length={length}" for length in lengths}
    assert {row[0] for row in good} == names
    assert [float(row[-1].split()[0]) for row in good] == sorted(float(row[-1].split()[0]) for row in good)
    for row in good:
        mean, deviation, matches = independent(runs / row[0])
        assert [float(part) for part in row[1].split(" ± ")] == pytest.approx([mean, deviation], abs=1e-3)
        assert float(row[2].split()[0]) == pytest.approx(sum(matches) / 2, abs=1e-3)
    assert [row[:2] for row in lines[2 + good_runs // 2 :]] == [
        ["soft-length=-1", f"seed {seed}: length must be at least 1, got -1"] for seed in (0, 1)
    ]
    assert (runs / "table.md").read_text() == second.output
    noise = [line for line in err.splitlines() if line.strip()]
    assert len(noise) < 12, err
    assert not list(runs.glob(".ray*"))
    ran = {tuple(line.split()) for line in (methods / "processes").read_text().splitlines()}
    assert len({folder for _, folder in ran}) == good_runs
    processes = {process for process, _ in ran}
    assert len(processes) == (2 if workers == 1 else len(ran)), "one for each command, or one for each run on Ray"

    again, errors = sweep("again", "--table")
    again.wait()
    shown = [line for line in again.output.splitlines() if "seed" not in line]
    assert shown == second.output.splitlines()[: 2 + good_runs // 2]
