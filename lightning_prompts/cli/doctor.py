"""``lightning-prompts doctor``: check this machine, and give the command for what is missing.

Lightning and transformers are not imported, unless a GPU is there to try a training on: their versions are looked up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prompts.cli.commands import CommandParser, size
from lightning_prompts.errors import UserError, in_one_line
from lightning_prompts.files import cache_root

DISTRIBUTION = "lightning-prompts"
ROOM = 600_000_000  # bytes that the converted weights of the embedded model take
State = Literal["ok", "optional", "bad"]
MARKS: dict[State, str] = {"ok": "[green]ok[/green]", "optional": "[yellow]-[/yellow]", "bad": "[red]missing[/red]"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        what: Its name.
        state: ``ok``; ``optional``: missing, and only some features need it; ``bad``: missing or wrong.
        said: What was found.
        remedy: The command that fixes it, or what to do; empty if there is nothing to do.
    """

    what: str
    state: State
    said: str
    remedy: str = ""


def parser() -> CommandParser:
    """The arguments."""
    return CommandParser(
        prog="lightning-prompts doctor",
        description="Check this machine, and give the command for what is missing. The exit code is 1 if something is "
        "missing that every run needs.",
    )


def main(args: Sequence[str]) -> int:
    """Run all checks and print the findings.

    Args:
        args: The words after ``doctor``.

    Returns:
        The exit code: 1 if something is missing that every run needs, else 0.
    """
    parser().parse_args(list(args))
    table = Table("", "", "found", "what to do", title="lightning-prompts doctor", title_justify="left")
    findings = []
    for finding in examine():
        findings.append(finding)
        table.add_row(MARKS[finding.state], *map(escape, (finding.what, finding.said, finding.remedy)))
    console = Console()
    if not console.is_terminal:  # do not cut anything off in a log or a bug report
        console.width = 200
    console.print(table)
    bad = [finding for finding in findings if finding.state == "bad"]
    console.print(
        f"{len(bad)} of {len(findings)} need something: {', '.join(finding.what for finding in bad)}"
        if bad
        else "Everything that a run needs is there.",
        highlight=False,
    )
    return int(bool(bad))


def examine() -> Iterator[Finding]:
    """Run one check after the other; a check that fails is a finding, too."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        python,
        packages,
        extras,
        accelerator,
        training,
        precision,
        weights,
        cache,
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - the other checks must go on
            yield Finding(check.__name__, "bad", in_one_line(error))


def python() -> Iterator[Finding]:
    """Python's version."""
    wanted = str(_metadata()["Requires-Python"] or "")
    mine = platform.python_version()
    good = SpecifierSet(wanted).contains(mine, prereleases=True)
    yield Finding(
        "Python", "ok" if good else "bad", f"{mine}, needs {wanted}", "" if good else f"install Python {wanted}"
    )


def packages() -> Iterator[Finding]:
    """The packages that every run needs: one finding if all are right, else one for each that is not."""
    required = [need for need in _requirements() if _applies(need)]
    wrong = [(need, lacks) for need in required if (lacks := _lacks(need))]
    for need, lacks in wrong:
        without = f" without {', '.join(lacks)}" if lacks != [need.name] else ""
        found = f"{_version(need.name) or 'not installed'}{without}, needs {_plain(need)}"
        yield Finding(need.name, "bad", found, f"pip install '{_plain(need)}'")
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "lightning", "transformers"))
        yield Finding("packages", "ok", f"all {len(required)} as required ({shown})")


def extras() -> Iterator[Finding]:
    """The packages that only some features need."""
    for extra in sorted(_metadata().get_all("Provides-Extra") or []):
        needs = [need for need in _requirements() if not _applies(need) and _applies(need, extra)]
        missing = {need: lacks for need in needs if (lacks := _lacks(need))}
        if missing:
            words = " ".join(f"'{_plain(need)}'" for need in missing)
            names = ", ".join(dict.fromkeys(itertools.chain(*missing.values())))
            yield Finding(f"extra {extra}", "optional", f"no {names}", f"pip install {words}")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{need.name} {_version(need.name)}" for need in needs))


def accelerator() -> Iterator[Finding]:
    """The GPUs, and whether torch can use them."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding(f"GPU {index}", "ok", f"{name}, {size(free)} of {size(total)} free")
    elif shutil.which("nvidia-smi") and _has_gpu():
        remedy = "pip install --force-reinstall torch  # a build for CUDA: see pytorch.org"
        yield Finding("GPU", "bad", f"there is one, but torch {torch.__version__} does not use it", remedy)
    else:
        threads = torch.get_num_threads()
        yield Finding("GPU", "optional", f"none; torch uses {threads} CPU thread{'s' * (threads > 1)}")


def training() -> Iterator[Finding]:
    """Whether training works on the accelerator, if there is one."""
    from lightning_prompts.accelerators import accelerator_here, train_two_steps

    kind = accelerator_here()
    if kind is None:
        return
    try:
        seconds = train_two_steps(kind)
    except Exception as error:  # noqa: BLE001 - a run would fail in the same way
        said = f"two steps on {kind} failed: {in_one_line(error)}"
        yield Finding("training", "bad", said, "run on the CPU until this is fixed: --trainer.accelerator cpu")
    else:
        yield Finding("training", "ok", f"two steps on {kind} work ({seconds:.1f} s)")


def precision() -> Iterator[Finding]:
    """The dtype that ``--model.lm.dtype auto`` stands for on the device of a run."""
    from lightning_prompts.accelerators import device_type
    from lightning_prompts.lm.precision import fast_dtype

    name = str(fast_dtype(device_type("auto"))).removeprefix("torch.")
    slower = "faster than float32" if name == "bfloat16" else "bfloat16 is no faster"
    yield Finding("fast dtype", "ok", f"{name} ({slower}); --model.lm.dtype auto takes it")


def weights() -> Iterator[Finding]:
    """The models that are installed as packages."""
    from lightning_prompts.lm.config import LMConfig
    from lightning_prompts.lm.embedded import EMBEDDED, EMBEDDED_SCORER, converted_folder, embedded_scorer, find_gguf

    for name, model in EMBEDDED.items():
        try:
            find_gguf(name, model)
        except UserError as error:
            state: Literal["optional", "bad"] = "bad" if name == LMConfig().name else "optional"
            yield Finding(f"weights of {name}", state, "not installed", _command(error))
            continue
        folder = converted_folder(name)
        said = f"converted: {folder}" if folder else "installed; the first run converts them, which takes 10 s"
        yield Finding(f"weights of {name}", "ok", said)
    try:
        yield Finding(f"weights of {EMBEDDED_SCORER}", "ok", str(embedded_scorer()))
    except UserError as error:
        yield Finding(f"weights of {EMBEDDED_SCORER}", "optional", "not installed; for BERTScore", _command(error))


def cache() -> Iterator[Finding]:
    """The cache folder: its size, and the free space on its disk."""
    from lightning_prompts.lm.config import LMConfig
    from lightning_prompts.lm.embedded import converted_folder

    folder = cache_root()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        remedy = "export LIGHTNING_PROMPTS_CACHE=FOLDER  # a folder that you can write to"
        yield Finding("cache", "bad", f"{folder} is not writable", remedy)
        return
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    yield Finding("cache", "ok", f"{folder}, {size(used)}; safe to delete")
    free = shutil.disk_usage(existing).free
    needed = 0 if _converted(converted_folder, LMConfig().name) else ROOM
    low = free < needed + ROOM // 6
    remedy = (
        f"free some space, or export LIGHTNING_PROMPTS_CACHE=FOLDER  # a folder with {size(ROOM)} free" if low else ""
    )
    yield Finding("disk", "bad" if low else "ok", f"{size(free)} free", remedy)


def _converted(look: Callable[[str], Path | None], name: str) -> bool:
    try:
        return look(name) is not None
    except UserError:
        return False


def _has_gpu() -> bool:
    """Whether the driver sees a GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def _metadata() -> importlib.metadata.PackageMetadata:
    """The metadata of the installed project.

    Raises:
        UserError: The project is not installed.
    """
    try:
        return importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{DISTRIBUTION} is not installed; run: pip install --editable .") from error


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in _metadata().get_all("Requires-Dist") or []]


def _applies(need: Requirement, extra: str = "") -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _satisfied(need: Requirement, version: str) -> bool:
    return bool(version) and need.specifier.contains(version, prereleases=True)


def _lacks(need: Requirement, within: tuple[str, ...] = ()) -> list[str]:
    """The packages that are missing for a requirement: its own, or those of its extras; empty if none is."""
    if not _satisfied(need, _version(need.name)):
        return [need.name]
    if str(need) in within or not need.extras:
        return []
    inner = [Requirement(text) for text in importlib.metadata.requires(need.name) or []]
    asked = [one for one in inner if not _applies(one) and any(_applies(one, extra) for extra in need.extras)]
    return list(dict.fromkeys(name for one in asked for name in _lacks(one, (*within, str(need)))))


def _plain(need: Requirement) -> str:
    """A requirement as an argument of pip, without the marker."""
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"{need.name}{extras}{need.specifier}"


def _command(error: UserError) -> str:
    """The command in an error about missing weights."""
    return str(error).partition("install them with: ")[2]
