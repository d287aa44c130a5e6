"""A disk without room, caches cut in half, two starts at once: one clear line, and what was there is still whole."""

from __future__ import annotations

import filecmp
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from lightning_prompts.checkpoints import check_readable
from lightning_prompts.lm import FrozenLM, LMConfig, embedded
from lightning_prompts.lm.embedded import embedded_folder
from support import forks
from support.checkpoint_state import same
from support.commands import SMALL
from support.faults import PATIENCE, Fault, Run, command, dies_in, environment, last, result, resume
from support.models import SMALLEST


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
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=before,
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
    "fit", "--model", "RefinerTuning", "--model.lm.name", SMALLEST, "--model.length", "2", "--model.refiner",
    "MLPRefiner", *SMALL, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches",
    "2", "--trainer.enable_progress_bar", "false", "--model.max_new_tokens", "1",
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


def small_conversion(cache: str, folder: str) -> None:
    """A tiny model in place of the conversion of the embedded one; each conversion is noted."""

    def convert(parts: list[Path], target: Path) -> None:
        with (target.parent / "conversions").open("a") as file:
            file.write("x")
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(folder, target)

    os.environ["LIGHTNING_PROMPTS_CACHE"] = cache
    embedded._convert = convert


def test_two_starts_at_once_with_a_cold_cache_and_one_with_half_of_it(tmp_path: Path, tiny: FrozenLM) -> None:
    """One of two converts the embedded model, both run; what was cut in half is converted again."""
    cache, folder = tmp_path / "cache", tmp_path / "converted"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    words = ["test", "--model", "FixedPrompt", *SMALL, "--trainer.limit_test_batches", "2", "--model.lm.dtype",
             "float32", "--model.max_new_tokens", "1", "--trainer.accelerator", "cpu",
             "--trainer.enable_progress_bar", "false"]  # fmt: skip

    def start(number: int) -> Run:
        root = ["--trainer.default_root_dir", str(tmp_path / f"run{number}")]
        return Run([*words, *root], tmp_path / f"log{number}", partial(small_conversion, str(cache), str(folder)))

    runs = [start(0), start(1)]
    for run in runs:
        assert run.wait() == 0, run.output
    assert (cache / "conversions").read_text() == "x"
    (weights,) = cache.glob("smollm2*/model.safetensors")
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 2)
    run = start(2)
    assert run.wait() == 0, run.output
    assert (cache / "conversions").read_text() == "xx"
    assert weights.read_bytes() == whole
    metrics = [(tmp_path / f"run{number}" / "metrics.json").read_text() for number in range(3)]
    assert metrics[0] == metrics[1] == metrics[2]


def convert_elsewhere(cache: str) -> None:
    os.environ["LIGHTNING_PROMPTS_CACHE"] = cache
    embedded_folder(LMConfig().name)


@pytest.mark.timeout(900)
def test_the_embedded_model_is_converted_the_same_each_time(tmp_path: Path) -> None:
    process = forks.start(convert_elsewhere, str(tmp_path))
    process.join()
    assert process.exitcode == 0
    (again,) = tmp_path.glob("smollm2*/model.safetensors")
    assert filecmp.cmp(again, embedded_folder(LMConfig().name) / "model.safetensors", shallow=False)


def _both(first: Fault, second: Fault) -> None:
    first()
    second()
