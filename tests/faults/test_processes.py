"""Several processes: when one dies, the others end, soon, and say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.models import TINY

WORDS = [
    "fit", "--model", "SoftPromptTuning", "--model.lm.name", TINY, "--model.length", "3", "--data", "Antonyms",
    "--data.batch_size", "4", "--data.max_train_examples", "64", "--trainer.max_steps", "100000",
    "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "4",
    "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp",
    "--trainer.enable_progress_bar", "false", "--model.max_new_tokens", "1",
]  # fmt: skip


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_prompts", *WORDS, "--trainer.default_root_dir", str(folder)],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_process_dies_the_other_ends(victim: str, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    first = start(folder, log)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < deadline, log.read_text()
            assert first.poll() is None, log.read_text()
            time.sleep(0.1)
        (second,) = (
            pid for pid in children(first.pid) if b"lightning_prompts" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        killed, other = (first.pid, second) if victim == "first" else (second, first.pid)
        os.kill(killed, signal.SIGKILL)
        code = first.wait(timeout=60)
        deadline = time.monotonic() + 30
        while alive(other):
            assert time.monotonic() < deadline, f"process {other} still runs: {log.read_text()}"
            time.sleep(0.1)
        assert code != 0
        errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
        assert len(errors) == 1, log.read_text()
        assert "process" in errors[0]
        assert "--ckpt_path last" in errors[0]
    finally:
        for pid in (*([second] if "second" in locals() else []), first.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        first.wait()


def test_ctrl_c_stops_all_at_the_same_step(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    first = start(folder, log)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        os.kill(first.pid, signal.SIGINT)  # of one is enough
        assert first.wait(timeout=60) == 130, log.read_text()
        assert "resume with --ckpt_path" in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)


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


def test_a_fault_in_one_process_is_a_fault_in_all(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    words = [*WORDS, "--trainer.max_steps", "6", "--trainer.callbacks+", "faulty.Nan"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prompts", *words, "--trainer.default_root_dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / "run" / f"same-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    guard = next(value for name, value in state.items() if "NonFiniteGuard" in name)
    assert (guard["skipped"], guard["restores"]) == (1, 0)
