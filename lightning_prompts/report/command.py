"""The subcommand ``report``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import write_atomic
from lightning_prompts.report import html, markdown
from lightning_prompts.report.blocks import Pictures
from lightning_prompts.report.methods import group
from lightning_prompts.report.page import page
from lightning_prompts.runs.reader import Run, find, method_folder


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        "lightning-prompts report",
        description="Compare runs on one page: HTML, and the same as Markdown.",
        allow_abbrev=False,
    )
    made.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="run folders, or folders that hold run folders; runs that differ in nothing but the seed are one method",
    )  # fmt: skip
    made.add_argument(
        "--out", type=Path, metavar="FILE.html",
        help="where to write (default: report.html in RUN, or in the folder that all of several RUNs are in); the "
        "Markdown is written beside it",
    )  # fmt: skip
    made.add_argument(
        "--baseline", type=Path, metavar="RUN",
        help="the run, or the folder of its seeds, that others are compared with first (default: one "
        "that was not trained, or else the first one)",
    )  # fmt: skip
    return made


def main(args: Sequence[str]) -> int:
    """Write the report of some runs, and say where it is.

    Args:
        args: The words after ``report``.

    Returns:
        The exit code.

    Raises:
        UserError: There is no run, a file of one is broken, or the page cannot be written.
    """
    given = parser().parse_args(list(args))
    runs: dict[Path, Run] = {}
    for run in (run for place in given.runs for run in find(place)):
        runs.setdefault(run.folder.resolve(), run)  # by whatever paths it is named, it is one run
    tasks = group(list(runs.values()), given.baseline)
    out: Path = given.out or _home(given.runs) / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out} must end in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file in it")
    title = ", ".join(dict.fromkeys(method_folder(place.resolve()).name for place in given.runs))
    blocks = page(tasks, title if len(title) <= 60 else f"{len(given.runs)} runs", sys.stderr.isatty())
    pictures = out.with_name(f"{out.stem}_files")
    beside = quote(pictures.name)
    try:
        for block in blocks:
            for picture in block.items if isinstance(block, Pictures) else ():
                write_atomic(pictures / f"{picture.name}.svg", picture.svg)
        write_atomic(out.with_suffix(".md"), markdown.write(blocks, beside))
        write_atomic(out, html.write(title, blocks))
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}; give another --out") from error
    Console().print(f"The report is in {out} (the same as Markdown: {out.with_suffix('.md')})", highlight=False,
                    soft_wrap=True, markup=False)  # fmt: skip
    return 0


def _home(places: Sequence[Path]) -> Path:
    """The one place, or the folder that all are in."""
    if len(places) == 1:
        return places[0]
    common = Path(os.path.commonpath([place.absolute() for place in places]))
    return Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common
