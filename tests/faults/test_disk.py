"""A disk without room, caches cut in half, two starts at once: one clear line, and what was there is still whole."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors import safe_open

from lightning_prompts.checkpoints import check_readable
from lightning_prompts.lm import FrozenLM, LMConfig, embedded
from lightning_prompts.lm.embedded import embedded_folder
from support.checkpoint_state import same
from support.commands import SMALL
from support.faults import Fault, Run, command, dies_in, environment, last, result, resume
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


def test_no_room_for_a_file(whole: Path, tmp_path: Path) -> None:
    """Checkpoints grow, so the first, some or the last of them find no room."""
    folder, log = tmp_path / "run", tmp_path / "log"
    for share in (0.05, 0.6, 0.99):
        log.unlink(missing_ok=True)
        run = resume("soft prompt", folder, log, small_files(int(share * last(whole).stat().st_size)))
        assert run.wait() == 1, run.output
        assert len(run.errors) == 1, run.output
        assert "no space left on the disk" in run.errors[0]
        assert "Traceback" not in run.output
        for path in folder.glob("checkpoints/*.ckpt"):
            check_readable(path)
    assert resume("soft prompt", folder, log).wait() == 0, log.read_text()
    assert same(result(folder), result(whole))


NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # <linux/sched.h>: CLONE_NEWUSER, CLONE_NEWNS


def small_disk(folder: str) -> None:
    """A file system of a few kilobytes in a folder, where one can be mounted; else a limit on files.

    The mount is this process's own: the command goes on in a child, and what it leaves is copied to FOLDER.copy.
    """
    library, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    mounted = library.unshare(NEW_USER | NEW_MOUNTS) == 0
    if mounted:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        mounted = library.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=96k") == 0
    if not mounted:
        small_files(20_000)()
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        shutil.copytree(folder, f"{folder}.copy")
        os._exit(os.waitstatus_to_exitcode(status))


def test_a_disk_that_fills_up(whole: Path, tmp_path: Path) -> None:
    """A real file system of a few kilobytes where one can be mounted, else the limit on files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = Run(command("soft prompt", disk / "run"), tmp_path / "full", partial(small_disk, str(disk)))
    assert run.wait() == 1, run.output
    assert len(run.errors) == 1, run.output
    assert "no space left on the disk" in run.errors[0]
    assert "Traceback" not in run.output
    copy = Path(f"{disk}.copy") / "run"
    assert last(copy).exists()
    for path in copy.glob("checkpoints/*.ckpt"):
        check_readable(path)
    assert resume("soft prompt", copy, tmp_path / "log").wait() == 0
    assert same(result(copy), result(whole))


REFINER = [
    "fit",
    "--model",
    "RefinerTuning",
    "--model.lm.name",
    SMALLEST,
    "--model.length",
    "2",
    "--model.refiner",
    "MLPRefiner",
    *SMALL,
    "--trainer.max_steps",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.enable_progress_bar",
    "false",
    "--model.max_new_tokens",
    "1",
]


def test_hidden_states_that_are_cut_off(tmp_path: Path) -> None:
    """A start that is killed while it keeps them leaves none; what was cut in half later is computed again."""
    elsewhere, states = environment("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "cache")), tmp_path / "cache" / "states"

    def start(name: str, fault: Fault = elsewhere) -> Run:
        return Run([*REFINER, "--trainer.default_root_dir", str(tmp_path / name)], tmp_path / f"log-{name}", fault)

    for name in ("os.fsync", "os.replace"):
        assert start(name, partial(_both, elsewhere, dies_in(name, 1))).wait() == -signal.SIGKILL
        assert not list(states.glob("*.safetensors"))
    results = []
    for name in ("first", "second"):
        run = start(name)
        assert run.wait() == 0, run.output
        assert not list(states.glob("*.part"))
        results.append(result(tmp_path / name)["state_dict"])
        for path in (kept := list(states.glob("*.safetensors"))):
            os.truncate(path, path.stat().st_size // 2)
        assert kept
    assert same(*results)


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
    words = [
        "test",
        "--model",
        "FixedPrompt",
        *SMALL,
        "--trainer.limit_test_batches",
        "2",
        "--model.lm.dtype",
        "float32",
        "--model.max_new_tokens",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
    ]

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


def cut(source: Path, target: Path, tokens: int) -> None:
    """Write a GGUF file with the first layer and the first tokens of another."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    known: set[str] = set()
    for name, field in reader.fields.items():
        kind, *inner = field.types
        content = field.contents()
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name.endswith(".block_count"):
            content = 1
        elif name.endswith(".vocab_size"):
            content = tokens
        elif name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            content = content[:tokens]
            known |= set(content) if name == "tokenizer.ggml.tokens" else set()
        elif name == "tokenizer.ggml.merges":
            content = [pair for pair in content if pair.replace(" ", "") in known]
        writer.add_key_value(name, content, kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.name.startswith("blk.0."):
            data = tensor.data[:tokens] if tensor.name == "token_embd.weight" else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_embedded_model_is_converted_the_same_each_time(tmp_path: Path) -> None:
    """Its first layer and first tokens; the whole of it takes a minute."""
    tokens = 500
    (source,) = embedded.find_gguf(LMConfig().name, embedded.EMBEDDED[LMConfig().name])
    cut(source, tmp_path / "cut.gguf", tokens)
    embedded._convert([tmp_path / "cut.gguf"], tmp_path / "cut")
    assert embedded._whole(tmp_path / "cut")
    with (
        safe_open(tmp_path / "cut" / "model.safetensors", "pt") as again,
        safe_open(embedded_folder(LMConfig().name) / "model.safetensors", "pt") as before,
    ):
        names = set(again.keys())
        assert {name for name in before.keys() if ".layers." not in name or ".layers.0." in name} == names  # noqa: SIM118
        for name in names:
            assert torch.equal(again.get_tensor(name), before.get_slice(name)[: again.get_tensor(name).shape[0]]), name


def _both(first: Fault, second: Fault) -> None:
    first()
    second()
