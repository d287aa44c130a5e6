"""A disk without room, caches cut in half, two starts at once: one clear line, and what was there is still whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open

from lightning_prompts.checkpoints import check_readable
from support.checkpoint_state import same
from support.faults import Fault, Run, command, dies_in, environment, last, result, resume
from support.models import TINY


def small_files(limit: int) -> Fault:
    """No file may grow beyond so many bytes, whoever runs the tests."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had room."""
    folder = tmp_path_factory.mktemp("whole")
    assert Run(command("soft prompt", folder / "run"), folder / "log").wait() == 0
    return folder / "run"


@pytest.mark.parametrize("share", [0.05, 0.6, 0.99])
def test_no_room_for_a_file(whole: Path, share: float, tmp_path: Path) -> None:
    """Checkpoints grow, so the first, some or the last of them find no room."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = Run(command("soft prompt", folder), log, small_files(int(share * last(whole).stat().st_size)))
    assert run.wait() == 1, run.output
    assert len(run.errors) == 1, run.output
    assert "no space left on the disk" in run.errors[0]
    assert "Traceback" not in run.output
    for path in folder.glob("checkpoints/*.ckpt"):
        check_readable(path)
    assert resume("soft prompt", folder, log).wait() == 0, log.read_text()
    assert same(result(folder), result(whole))


def mounts() -> list[str]:
    """What makes a small disk here: a mount of its own where that is allowed."""
    words = ["unshare", "--user", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if allowed else []


def test_a_disk_that_fills_up(whole: Path, tmp_path: Path) -> None:
    """A real file system of a few kilobytes where one can be mounted, else the limit on files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [sys.executable, "-m", "lightning_prompts", *command("soft prompt", disk / "run")]
    if namespace := mounts():
        script = 'mount -t tmpfs -o size=96k tmpfs "$0" && "$@"; code=$?; cp -r "$0/run" "$0.copy"; exit $code'
        words = [*namespace, "sh", "-c", script, str(disk), *words]
        before = None
    else:
        before = small_files(20_000)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, preexec_fn=before,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "no space left on the disk" in errors[0]
    assert "Traceback" not in done.stderr
    copy = Path(f"{disk}.copy") if namespace else disk / "run"
    assert last(copy).exists()
    for path in copy.glob("checkpoints/*.ckpt"):
        check_readable(path)
    assert resume("soft prompt", copy, tmp_path / "log").wait() == 0
    assert same(result(copy), result(whole))


REFINER = [
    "fit", "--model", "RefinerTuning", "--model.lm.name", TINY, "--model.length", "2", "--model.refiner", "MLPRefiner",
    "--data", "Antonyms", "--data.max_train_examples", "40", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
    "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false", "--model.max_new_tokens", "1",
]  # fmt: skip


@pytest.mark.parametrize("name", ["os.fsync", "os.replace"])
def test_killed_while_hidden_states_are_kept(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = [*REFINER, "--trainer.default_root_dir", str(tmp_path / "run")]
    fault = partial(_both, environment("LIGHTNING_PROMPTS_CACHE", str(cache)), dies_in(name, 1))
    assert Run(words, tmp_path / "log", fault).wait() == -signal.SIGKILL
    assert not list(cache.glob("states/*.safetensors"))
    elsewhere = environment("LIGHTNING_PROMPTS_CACHE", str(cache))
    run = Run(words, tmp_path / "log2", elsewhere)
    assert run.wait() == 0, run.output
    assert list(cache.glob("states/*.safetensors"))
    assert not list(cache.glob("states/*.part"))


def test_hidden_states_cut_in_half(tmp_path: Path) -> None:
    elsewhere = environment("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "cache"))
    results = []
    for number in range(2):
        run = Run([*REFINER, "--trainer.default_root_dir", str(tmp_path / f"run{number}")], tmp_path / "log", elsewhere)
        assert run.wait() == 0, run.output
        results.append(result_after_fit(tmp_path / f"run{number}"))
        for path in (tmp_path / "cache" / "states").glob("*.safetensors"):
            whole = path.stat().st_size
            os.truncate(path, whole // 2)
    assert same(*results)


def result_after_fit(folder: Path) -> object:
    assert last(folder).exists()
    return result(folder)["state_dict"]


@pytest.mark.timeout(1200)
def test_two_starts_at_once_with_a_cold_cache_and_one_with_half_of_it(tmp_path: Path) -> None:
    """The embedded model: one of two converts it, both run; what was cut in half is converted again."""
    cache = tmp_path / "cache"
    elsewhere = environment("LIGHTNING_PROMPTS_CACHE", str(cache))
    words = ["test", "--model", "FixedPrompt", "--data", "Antonyms", "--trainer.limit_test_batches", "2",
             "--data.eval_batch_size", "2", "--model.max_new_tokens", "1", "--trainer.accelerator", "cpu",
             "--trainer.enable_progress_bar", "false"]  # fmt: skip

    def start(number: int) -> Run:
        folder = ["--trainer.default_root_dir", str(tmp_path / f"run{number}")]
        return Run([*words, *folder], tmp_path / f"log{number}", elsewhere)

    runs = [start(0), start(1)]
    for run in runs:
        assert run.wait(400) == 0, run.output
    (folder,) = (path for path in cache.iterdir() if path.is_dir() and path.name != "probes")
    weights = folder / "model.safetensors"
    converted = weights.stat().st_mtime_ns
    os.truncate(weights, weights.stat().st_size // 2)
    run = start(2)
    assert run.wait(400) == 0, run.output
    assert weights.stat().st_mtime_ns != converted
    with safe_open(weights, framework="pt") as file:
        assert list(file.keys())
    metrics = [(tmp_path / f"run{number}" / "metrics.json").read_text() for number in range(3)]
    assert metrics[0] == metrics[1] == metrics[2]


def _both(first: Fault, second: Fault) -> None:
    first()
    second()
