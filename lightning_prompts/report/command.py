"""The subcommand ``report``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.progress import track

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import write_atomic
from lightning_prompts.report.data import Task, group
from lightning_prompts.report.page import Pictures, html, markdown
from lightning_prompts.report.sections import report
from lightning_prompts.runs.reader import Run, find, method_folder

RUNS = "run folders, or folders that hold run folders; runs that differ only in the seed are one method"
OUT = (
    "where to write (default: report.html in RUN, or in the folder that contains all RUNs); the Markdown is written "
    "beside it"
)
BASELINE = (
    "the run, or the folder of its seeds, that the others are compared with (default: the first one that was not "
    "trained, or else the first one)"
)


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        "lightning-prompts report",
        description="Compare runs on one page: HTML, and the same as Markdown.",
        allow_abbrev=False,
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUNS)
    made.add_argument("--out", type=Path, metavar="FILE.html", help=OUT)
    made.add_argument("--baseline", type=Path, metavar="RUN", help=BASELINE)
    return made


def main(args: Sequence[str]) -> int:
    """Write the report of some runs, and print where it is.

    Args:
        args: The words after ``report``.

    Returns:
        The exit code.

    Raises:
        UserError: There is no run, a file of a run is broken, or the page cannot be written.
    """
    given = parser().parse_args(list(args))
    runs: dict[Path, Run] = {}
    for run in (run for place in given.runs for run in find(place)):
        runs.setdefault(run.folder.resolve(), run)  # one run, even if two paths lead to it
    tasks = group(list(runs.values()), given.baseline)
    out: Path = given.out or _home(given.runs) / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out} must end in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file in it")
    title = ", ".join(dict.fromkeys(method_folder(place.resolve()).name for place in given.runs))
    blocks = report(tasks, title if len(title) <= 60 else f"{len(given.runs)} runs", _progress)
    pictures = out.with_name(f"{out.stem}_files")
    beside = quote(pictures.name)
    try:
        for block in blocks:
            for picture in block.items if isinstance(block, Pictures) else ():
                write_atomic(pictures / f"{picture.name}.svg", picture.svg)
        write_atomic(out.with_suffix(".md"), markdown(blocks, beside))
        write_atomic(out, html(title, blocks))
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}; give another --out") from error
    text = f"The report is in {out} (the same as Markdown: {out.with_suffix('.md')})"
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
    return 0


def _progress(tasks: Sequence[Task]) -> Iterator[Task]:
    """Show a bar where someone is watching."""
    screen = Console(stderr=True)
    yield from track(tasks, "Writing the report", disable=not sys.stderr.isatty(), transient=True, console=screen)


def _home(places: Sequence[Path]) -> Path:
    """The only place, or the folder that contains all places."""
    if len(places) == 1:
        return places[0]
    common = Path(os.path.commonpath([place.absolute() for place in places]))
    return Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common
