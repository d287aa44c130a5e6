"""Several processes: when one dies, the others end, soon, and say why."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from support.faults import PATIENCE, Run
from support.models import SMALLEST
from support.project import ROOT

WORDS = [
    "fit",
    "--model",
    "SoftPromptTuning",
    "--model.lm.name",
    SMALLEST,
    "--model.length",
    "3",
    "--data",
    "Antonyms",
    "--data.batch_size",
    "4",
    "--data.max_train_examples",
    "64",
    "--trainer.max_steps",
    "100000",
    "--trainer.max_epochs",
    "-1",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.val_check_interval",
    "4",
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "2",
    "--trainer.strategy",
    "ddp",
    "--trainer.enable_progress_bar",
    "false",
    "--model.max_new_tokens",
    "1",
]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder: Path, log: Path) -> tuple[Run, int]:
    """A run whose two processes have written a checkpoint; its first process has the pid of the second."""
    run = Run([*WORDS, "--trainer.default_root_dir", str(folder)], log)
    deadline = time.monotonic() + PATIENCE
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < deadline, run.output
        assert run.process.is_alive(), run.output
        time.sleep(0.05)
    pid = run.process.pid
    (second,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return run, int(second)


@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_process_dies_the_other_ends(victim: str, tmp_path: Path) -> None:
    run, second = started(tmp_path / "run", tmp_path / "log")
    first = run.process.pid
    assert first is not None
    try:
        os.kill(first if victim == "first" else second, signal.SIGKILL)
        code = run.wait()
        deadline = time.monotonic() + PATIENCE
        while alive(second):
            assert time.monotonic() < deadline, f"process {second} still runs: {run.output}"
            time.sleep(0.05)
        assert code != 0
        assert len(run.errors) == 1, run.output
        assert "process" in run.errors[0]
        assert "--ckpt_path last" in run.errors[0]
    finally:
        for pid in (second, first):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_ctrl_c_stops_all_at_the_same_step(tmp_path: Path) -> None:
    run, second = started(tmp_path / "run", tmp_path / "log")
    try:
        run.send(signal.SIGINT)  # to one is enough
        assert run.wait() == 130, run.output
        assert "resume with --ckpt_path" in run.output
        assert "Traceback" not in run.output
        assert not alive(second)
    finally:
        if alive(second):
            os.kill(second, signal.SIGKILL)


FAULTY = '''
import pathlib

import lightning as L
import torch


class Nan(L.Callback):
    """Breaks the loss of the second process in its third step."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and trainer.fit_loop.total_batch_idx == 2:
            loss.mul_(float("nan"))

    def on_train_end(self, trainer, pl_module):
        prompt = pl_module.current_prompt().detach()
        assert torch.isfinite(prompt).all()
        everywhere = trainer.strategy.all_gather(prompt)
        assert torch.equal(everywhere[0], everywhere[1]), "both processes have the same prompt"
        pathlib.Path(trainer.default_root_dir, f"same-{trainer.global_rank}").write_text(str(trainer.global_step))
'''


def started_as_a_module() -> None:
    """As with ``python -m lightning_prompts``: Lightning starts the second process in the same way."""
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("lightning_prompts.__main__")


def test_a_fault_in_one_process_is_a_fault_in_all(tmp_path: Path) -> None:
    """The second process is a new interpreter, as Lightning starts it."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    place = WORDS.index("--trainer.strategy")
    words = [*WORDS[:place], "--trainer.strategy=ddp", *WORDS[place + 2 :]]  # in one word, and no fork takes its place
    run = Run(
        [
            *words,
            "--trainer.max_steps",
            "6",
            "--trainer.callbacks+",
            "faulty.Nan",
            "--trainer.default_root_dir",
            str(tmp_path / "run"),
        ],
        tmp_path / "log",
        started_as_a_module,
        environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert run.wait() == 0, run.output
    assert [(tmp_path / "run" / f"same-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    guard = next(value for name, value in state.items() if "NonFiniteGuard" in name)
    assert (guard["skipped"], guard["restores"]) == (1, 0)
