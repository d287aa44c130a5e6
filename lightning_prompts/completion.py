"""``lightning-prompts completion``: tab completion for bash and zsh.

What TAB offers is collected once, which imports everything, and kept in the cache folder. TAB itself only reads that
file, so that it answers at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prompts import __version__
from lightning_prompts.commands import COMMANDS, TRAINER, CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic

Options = dict[str, list[str]]  # options and their choices; none where they are free
SHELLS = ("bash", "zsh")
# In a checkout the last two are links, which `rglob` does not follow.
PACKAGES = ("lightning_prompts", "lightning_prompts/datamodules", "lightning_prompts/callbacks")


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        prog="lightning-prompts completion",
        description='Tab completion: put  eval "$(lightning-prompts completion bash)"  into ~/.bashrc, or the same '
        "with zsh into ~/.zshrc. The first shell after an update collects the options, which takes some seconds.",
    )
    made.add_argument("shell", choices=SHELLS)
    return made


def main(args: Sequence[str]) -> int:
    """Print what the shell evaluates, and collect the options if that was not done for this version.

    Args:
        args: The command line's words.
    """
    shell = parser().parse_args(list(args)).shell
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise UserError("completion needs argcomplete; install it with: pip install argcomplete") from error
    if _kept().get("of") != _state():
        print("lightning-prompts: collecting the options for tab completion ...", file=sys.stderr)
        collect()
    print(shellcode(["lightning-prompts"], shell=shell))
    return 0


def collect() -> None:
    """Look up all options and keep them."""
    from lightning_prompts.options import all_options

    write_atomic(_path(), json.dumps({"of": _state(), **all_options()}))


def complete() -> None:
    """Answer TAB, and exit; the shell says in the environment what was typed."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 1 << 20))]
    argcomplete.autocomplete(light_parser(line.split()), always_complete_options=False)


def light_parser(typed: Sequence[str]) -> argparse.ArgumentParser:
    """A parser that knows names and choices, made without importing what they are names of.

    Args:
        typed: The words so far, which say what method and dataset there are options of.
    """
    kept = _kept()
    made = argparse.ArgumentParser(prog="lightning-prompts", allow_abbrev=False)
    subparsers = made.add_subparsers()
    for name, help_line in {**TRAINER, **{name: row.help for name, row in COMMANDS.items()}}.items():
        sub = subparsers.add_parser(name, help=help_line, allow_abbrev=False)
        options: Options = dict(kept.get("commands", {}).get(name, {}))
        trainer = COMMANDS[name].takes if name in COMMANDS else name
        if trainer:
            options = kept.get("trainer", {}).get(trainer, {}) | options
            for role in ("model", "data"):
                options |= _own(role, kept.get(role, {}), typed)
        _fill(sub, options)
    return made


def _own(role: str, by_class: Mapping[str, Options], typed: Sequence[str]) -> Options:
    """The options of the class that was named for a role, or of all where none was."""
    names = [word.partition("=")[2] for word in typed if word.startswith(f"--{role}=")]
    names += [after for word, after in itertools.pairwise(typed) if word == f"--{role}"]
    chosen = [by_class[name] for name in names if name in by_class] or list(by_class.values())
    merged = {option: choices for options in chosen for option, choices in options.items()}
    return {f"--{role}": sorted(by_class), **merged}


def _fill(made: argparse.ArgumentParser, options: Mapping[str, Iterable[str]]) -> None:
    from argcomplete.completers import ChoicesCompleter

    for option, choices in options.items():
        if option in ("-h", "--help"):
            continue
        words = ["-c", "--config"] if option in ("-c", "--config") else [option]
        if words[0] in made._option_string_actions:
            continue
        positional = not option.startswith("-")
        action: Any = made.add_argument(option, nargs="*") if positional else made.add_argument(*words, action="append")
        if choices:
            action.completer = ChoicesCompleter(dict.fromkeys(choices, ""))


def _path() -> Path:
    return cache_root() / "completion.json"


def _kept() -> dict[str, Any]:
    """What was collected; empty where nothing was."""
    try:
        kept = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _state() -> str:
    """The version and the age of the code that the options are of."""
    root = Path(__file__).parent.parent
    newest = max(path.stat().st_mtime_ns for package in PACKAGES for path in (root / package).rglob("*.py"))
    return f"{__version__} {newest} {root}"
