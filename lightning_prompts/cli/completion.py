"""``lightning-prompts completion``: print a script for tab completion in bash or zsh.

The script is static, so that TAB answers without starting Python. `shtab` writes it from plain parsers that have the
options of the real ones. (jsonargparse can also call shtab, but then offers classes by their full paths only, and
thousands of options of Lightning's and torch's own classes: 1.4 MB.)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from lightning_prompts.cli.commands import COMMANDS, TRAINER, CommandParser
from lightning_prompts.errors import UserError
from lightning_prompts.files import packaged_configs

FILES = ("--out", "--baseline", "--folder", "--base", "run", "runs")
CONFIG_OPTIONS = ("--config", "--tasks", "methods")  # they take files or names of installed configs


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        prog="lightning-prompts completion",
        description="Print a script for tab completion. Write it to a file that the shell reads, and again after an "
        "update: lightning-prompts completion bash > ~/.local/share/bash-completion/completions/lightning-prompts, or "
        "lightning-prompts completion zsh > FOLDER/_lightning-prompts with a FOLDER of zsh's $fpath.",
    )
    made.add_argument("shell", choices=("bash", "zsh"))
    return made


def main(args: Sequence[str]) -> int:
    """Print the script.

    Args:
        args: The words after ``completion``.

    Returns:
        The exit code.

    Raises:
        UserError: shtab is not installed.
    """
    shell = parser().parse_args(list(args)).shell
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab; install it with: pip install shtab") from error
    print(shtab.complete(plain_parser(), shell=shell))
    return 0


def plain_parser() -> argparse.ArgumentParser:
    """A parser with all subcommands, options and choices, and no types."""
    from lightning_prompts.cli.options import all_options

    made = argparse.ArgumentParser("lightning-prompts")
    subparsers = made.add_subparsers()
    for name, options in all_options().items():
        text = TRAINER[name] if name in TRAINER else COMMANDS[name].help
        _fill(subparsers.add_parser(name, help=text), options)
    return made


def _fill(made: argparse.ArgumentParser, options: Mapping[str, Sequence[str]]) -> None:
    """Add options with their choices; those without choices take a file name or anything."""
    import shtab

    names = " ".join(packaged_configs())
    config = {
        "bash": "_lightning_prompts_configs",
        "zsh": "_lightning_prompts_configs",
        "preamble": {
            "bash": f'_lightning_prompts_configs() {{ _shtab_compgen_files "$1"; compgen -W "{names}" -- "$1"; }}',
            "zsh": f"_lightning_prompts_configs() {{ _alternative files:file:_files 'configs:config:({names})'; }}",
        },
    }
    for option, choices in options.items():
        words = ["-c", "--config"] if option == "--config" else [option]
        nargs = None if option.startswith("-") else "*"
        action = made.add_argument(*words, nargs=nargs, choices=choices or None)
        if option in (*FILES, *CONFIG_OPTIONS):
            action.complete = shtab.FILE if option in FILES else config  # type: ignore[attr-defined]
