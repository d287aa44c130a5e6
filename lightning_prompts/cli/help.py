"""The help of Lightning's subcommands, kept in the cache folder, as making it imports Lightning."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

from lightning_prompts import __version__
from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic

# In a checkout the last two are links, which `rglob` does not follow.
FOLDERS = (".", "datamodules", "callbacks")


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line only asks for the help of a subcommand, or of a class of this project."""
    return (len(words) == 2 and words[1] in ("-h", "--help")) or (
        len(words) == 3 and words[1] in ("--model.help", "--data.help") and words[2].isidentifier()
    )


def print_help(words: Sequence[str], make: Callable[[Sequence[str]], int]) -> int:
    """Print the help that is kept, or else make it and keep it.

    Args:
        words: The command line; see `asks_for_help`.
        make: Prints the help of a command line, and exits.

    Returns:
        The exit code.
    """
    path = cache_root() / "help.json"
    state = _state()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        pages = dict(kept["pages"]) if kept["of"] == state else {}
    except (OSError, ValueError, KeyError, TypeError):
        pages = {}
    line = " ".join(words)
    if line not in pages:
        page = io.StringIO()
        try:
            with redirect_stdout(page):
                make(words)
        except SystemExit as end:
            if end.code:
                raise
        pages[line] = page.getvalue()
        with suppress(OSError, UserError):  # without a cache, the help is made every time
            write_atomic(path, json.dumps({"of": state, "pages": pages}))
    print(pages[line], end="")
    return 0


def _state() -> str:
    """What the help depends on: versions, the age of this project's code, and the width of the terminal."""
    folder = Path(__file__).parents[1]
    newest = max(path.stat().st_mtime_ns for name in FOLDERS for path in (folder / name).rglob("*.py"))
    versions = [importlib.metadata.version(name) for name in ("lightning", "jsonargparse", "torch")]
    width = shutil.get_terminal_size().columns
    return " ".join(map(str, (__version__, *versions, platform.python_version(), folder, newest, width)))
