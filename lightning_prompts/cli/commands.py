"""The subcommands: each is in a module of its own, which is imported when the subcommand is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from lightning_prompts.cli.checks import check
from lightning_prompts.cli.help import asks_for_help, print_help
from lightning_prompts.errors import DEBUG, UsageError, UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """The arguments of a subcommand; prints an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """A subcommand that is not one of Lightning's.

    Args:
        module: The module with its ``main(args) -> int``, which returns the exit code, and its ``parser()``.
        help: What it does, in one line.
        takes: The subcommand of Lightning's whose options it also takes, if any.
    """

    module: str
    help: str
    takes: str = ""


TRAINER = {
    "fit": "train a prompt",
    "validate": "score a prompt on the validation set",
    "test": "score a prompt on the test sets: metrics.json, predictions.jsonl",
    "predict": "write answers: generations.jsonl",
}
COMMANDS: dict[str, Command] = {
    "report": Command("lightning_prompts.report.command", "compare runs on one page, as HTML and as Markdown"),
    "export": Command("lightning_prompts.export.command", "write a run's prompt for PEFT, vLLM and others, checked"),
    "sweep": Command("lightning_prompts.runs.sweep_command", "methods x tasks x settings x seeds, and tables"),
    "plan": Command(
        "lightning_prompts.cli.plan", "estimate how much memory a run needs, without loading it", takes="fit"
    ),
    "demo": Command("lightning_prompts.cli.demo", "train a soft prompt on antonyms and compare it, in 2 minutes"),
    "configs": Command("lightning_prompts.cli.configs", "list the installed configs for -c, or print one"),
    "doctor": Command("lightning_prompts.cli.doctor", "check this machine, and give the command for what is missing"),
    "completion": Command("lightning_prompts.cli.completion", "print a script for tab completion in bash or zsh"),
}


def usage() -> str:
    """The text of ``lightning-prompts --help``."""
    rows = [*TRAINER.items(), *((name, command.help) for name, command in COMMANDS.items())]
    width = max(len(name) for name, _ in rows)
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        "usage: lightning-prompts SUBCOMMAND [-c FILE.yaml ...] [OPTIONS]\n\n"
        "Make a frozen language model better at a task by optimising the prompt, never the weights.\n\n"
        f"subcommands:\n{listed}\n\n"
        "lightning-prompts SUBCOMMAND --help lists its options; fit --model.help CLASS and fit --data.help CLASS list "
        "those of a method and of a dataset. lightning-prompts --version prints the version."
    )


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The subcommand's name and its arguments; those of ``sys.argv`` by default.

    Returns:
        The exit code: 0; 2 after an error in the arguments and 1 after another one, printed in one line.

    Raises:
        SystemExit: The parser of an own subcommand refused the arguments (code 2), or has printed its help (code 0).
    """
    words = sys.argv[1:] if args is None else list(args)
    name = words[0] if words else ""
    try:
        if name in COMMANDS:
            return int(importlib.import_module(COMMANDS[name].module).main(words[1:]))
        # Options may come before Lightning's subcommands; only Lightning knows which of them take a value.
        if not name.startswith("-") and (message := unknown(name)):
            print(f"error: {message}", file=sys.stderr)
            return 2
        if name in TRAINER and asks_for_help(words):
            return print_help(words, _run_trainer)
        return _run_trainer(check(words))  # checked before the slow imports
    except UserError as error:
        return fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the user gets one line; with the debug variable set, the traceback
        if known := _to_user_error(error):
            return fail(str(known))
        return fail(f"{type(error).__name__}: {error}", unexpected=True)


def _run_trainer(words: Sequence[str]) -> int:
    from lightning_prompts.cli.main import main

    return main(words)


def unknown(name: str) -> str:
    """The error for a missing subcommand or one that does not exist; empty for one that does.

    >>> unknown("reprot"), unknown("report")
    ("unknown command 'reprot'; did you mean report?", '')
    """
    known = [*TRAINER, *COMMANDS]
    what = f"unknown command {name!r}" if name else "no command given"
    return "" if name in known else f"{what}; {nearest(name, known, 1)}"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(640), size(512_300_000), size(63e9)
    ('640 B', '512.3 MB', '63.00 GB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _to_user_error(error: Exception) -> UserError | None:
    try:
        from lightning_prompts.cli.errors import to_user_error  # imports Lightning, so only after an error
    except ImportError:  # which may be the error itself
        return None
    return to_user_error(error)


def fail(message: str, code: int = 1, unexpected: bool = False) -> int:
    """Print an error in one line and return the exit code; with the debug variable set, raise it."""
    if os.environ.get(DEBUG):
        raise
    line = " ".join(message.split())
    print(f"error: {line}" + (f" (set {DEBUG}=1 to see where)" if unexpected else ""), file=sys.stderr)
    return code
