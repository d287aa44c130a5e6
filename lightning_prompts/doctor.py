"""``lightning-prompts doctor``: what this machine has, what is missing, and the command that puts it right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import shutil
import subprocess
import sys
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

from lightning_prompts.accelerators import accelerator_here, device_type, train_two_steps
from lightning_prompts.commands import CommandParser, size
from lightning_prompts.errors import UserError, in_one_line
from lightning_prompts.files import cache_root

DISTRIBUTION = "lightning-prompts"
ROOM = 600_000_000  # bytes that the converted weights of the embedded model take
State = Literal["ok", "optional", "bad"]
MARKS: dict[State, str] = {"ok": "[green]ok[/green]", "optional": "[yellow]-[/yellow]", "bad": "[red]missing[/red]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: ``ok``; ``optional``: not there, and only needed for some things; ``bad``: not as it has to be.
        said: What was found.
        remedy: The command that puts it right, or what to do; empty where nothing is to be done.
    """

    what: str
    state: State
    said: str
    remedy: str = ""


def parser() -> CommandParser:
    """The arguments."""
    return CommandParser(
        prog="lightning-prompts doctor",
        description="What this machine has, what is missing, and the command that puts it right. The exit code is 1 if "
        "something is missing that every run needs; extras are not.",
    )


def main(args: Sequence[str]) -> int:
    """Look at everything and print it.

    Args:
        args: The command line's words.

    Returns:
        0 if all that every run needs is there, else 1.
    """
    parser().parse_args(list(args))
    table = Table("", "", "found", "what to do", title="lightning-prompts doctor", title_justify="left")
    findings = []
    for finding in examine():
        findings.append(finding)
        table.add_row(MARKS[finding.state], *map(escape, (finding.what, finding.said, finding.remedy)))
    console = Console()
    if not console.is_terminal:  # a log or a bug report: nothing is cut off
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
    """Look at one thing after the other; a look that fails is a finding too."""
    looks: list[Callable[[], Iterable[Finding]]] = [
        python, packages, extras, accelerator, training, precision, weights, cache,
    ]  # fmt: skip
    for look in looks:
        try:
            yield from look()
        except Exception as error:  # noqa: BLE001 - the doctor must not fall ill
            yield Finding(look.__name__, "bad", in_one_line(error))


def python() -> Iterator[Finding]:
    """Python's version."""
    wanted = str(_metadata()["Requires-Python"] or "")
    mine = platform.python_version()
    good = SpecifierSet(wanted).contains(mine, prereleases=True)
    yield Finding(
        "Python", "ok" if good else "bad", f"{mine}, needs {wanted}", "" if good else f"install Python {wanted}"
    )


def packages() -> Iterator[Finding]:
    """The packages that every run needs: one row if all are well, else those that are not."""
    required = [need for need in _requirements() if _applies(need)]
    wrong = [(need, lacks) for need in required if (lacks := _lacks(need))]
    for need, lacks in wrong:
        without = f" without {', '.join(lacks)}" if lacks != [need.name] else ""
        yield Finding(need.name, "bad", f"{_version(need.name) or 'not installed'}{without}, needs {_plain(need)}",
                      f"pip install '{_plain(need)}'")  # fmt: skip
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "lightning", "transformers"))
        yield Finding("packages", "ok", f"all {len(required)} as required ({shown})")


def extras() -> Iterator[Finding]:
    """What only some things need."""
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
    """GPUs, and whether torch can use what is there."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding(f"GPU {index}", "ok", f"{name}, {size(free)} of {size(total)} free")
    elif shutil.which("nvidia-smi") and _has_gpu():
        yield Finding("GPU", "bad", f"there is one, but torch {torch.__version__} does not use it",
                      "pip install --force-reinstall torch  # a build for CUDA: see pytorch.org")  # fmt: skip
    else:
        threads = torch.get_num_threads()
        yield Finding("GPU", "optional", f"none; torch uses {threads} CPU thread{'s' * (threads > 1)}")


def training() -> Iterator[Finding]:
    """Whether a run works on the accelerator, if there is one."""
    kind = accelerator_here()
    if kind is None:
        return
    try:
        seconds = train_two_steps(kind)
    except Exception as error:  # noqa: BLE001 - whatever it is, this is what a run would meet
        said = f"two steps on {kind} failed: {in_one_line(error)}"
        yield Finding("training", "bad", said, "run on the CPU until that is mended: --trainer.accelerator cpu")
    else:
        yield Finding("training", "ok", f"two steps on {kind} work ({seconds:.1f} s)")


def precision() -> Iterator[Finding]:
    """What ``--model.lm.dtype auto`` takes on the device that a run takes."""
    from lightning_prompts.lm.precision import fast_dtype

    name = str(fast_dtype(device_type("auto"))).removeprefix("torch.")
    slower = "faster than float32" if name == "bfloat16" else "bfloat16 is no faster"
    yield Finding("fast dtype", "ok", f"{name} ({slower}); --model.lm.dtype auto takes it")


def weights() -> Iterator[Finding]:
    """The models that come as packages."""
    from lightning_prompts.lm import LMConfig
    from lightning_prompts.lm.embedded import EMBEDDED, converted_folder, find_gguf
    from lightning_prompts.objectives.rewards import EMBEDDED_SCORER, embedded_scorer

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
    """The cache folder, its size, and the room on its disk."""
    from lightning_prompts.lm import LMConfig
    from lightning_prompts.lm.embedded import converted_folder

    folder = cache_root()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        yield Finding("cache", "bad", f"{folder} cannot be written",
                      "export LIGHTNING_PROMPTS_CACHE=FOLDER  # one that you may write to")  # fmt: skip
        return
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    yield Finding("cache", "ok", f"{folder}, {size(used)}; safe to delete")
    free = shutil.disk_usage(existing).free
    needed = 0 if _converted(converted_folder, LMConfig().name) else ROOM
    low = free < needed + ROOM // 6
    remedy = f"make room, or export LIGHTNING_PROMPTS_CACHE=FOLDER  # one with {size(ROOM)} free" if low else ""
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
    """What the installed project says of itself.

    Raises:
        UserError: It is run without being installed.
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
    """The names of the packages that a requirement lacks: itself, or what its extras ask for; empty if all is there."""
    if not _satisfied(need, _version(need.name)):
        return [need.name]
    if str(need) in within or not need.extras:
        return []
    inner = [Requirement(text) for text in importlib.metadata.requires(need.name) or []]
    asked = [one for one in inner if not _applies(one) and any(_applies(one, extra) for extra in need.extras)]
    return list(dict.fromkeys(name for one in asked for name in _lacks(one, (*within, str(need)))))


def _plain(need: Requirement) -> str:
    """A requirement as pip wants it, without the marker."""
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"{need.name}{extras}{need.specifier}"


def _command(error: UserError) -> str:
    """The command that an error about missing weights names."""
    return str(error).partition("install them with: ")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
