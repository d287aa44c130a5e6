"""Subcommands beside Lightning's: each in a file of its own, imported when it is asked for and not before."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from lightning_prompts.errors import DEBUG, UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """The arguments of a subcommand; says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        module: The module with its ``main(args) -> int``, which gives the exit code, and its ``parser()``.
        help: What it does, in one line.
        takes: The subcommand of Lightning's whose options it takes beside its own, if any.
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
        "lightning_prompts.memory_plan", "say how much memory a run would need, before it loads anything", takes="fit"
    ),
    "doctor": Command("lightning_prompts.doctor", "what this machine has, what is missing, and the command for it"),
    "completion": Command("lightning_prompts.completion", "tab completion for bash and zsh"),
}


def usage() -> str:
    """What ``lightning-prompts --help`` says; it imports nothing, so it is there at once."""
    rows = [*TRAINER.items(), *((name, command.help) for name, command in COMMANDS.items())]
    width = max(len(name) for name, _ in rows)
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
    return (
        "usage: lightning-prompts SUBCOMMAND [-c FILE.yaml ...] [OPTIONS]\n\n"
        "Make a frozen language model better at a task by optimising the prompt, never the weights.\n\n"
        f"subcommands:\n{listed}\n\n"
        "lightning-prompts SUBCOMMAND --help lists its options; fit --model.help CLASS and fit --data.help CLASS list "
        "those of a method and of a dataset. lightning-prompts --version says which version it is."
    )


def run(args: Sequence[str]) -> int:
    """Run one of these subcommands.

    Args:
        args: The subcommand's name and its arguments.

    Returns:
        The exit code: 1 after an error, which was told in one line.
    """
    name, *rest = args
    try:
        return int(importlib.import_module(COMMANDS[name].module).main(rest))
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - a person reads this; the traceback is one variable away
        if known := _told(error):
            return fail(str(known))
        return fail(f"{type(error).__name__}: {error}", unexpected=True)


def unknown(name: str) -> str:
    """What is said of a subcommand that does not exist; empty of one that does.

    >>> unknown("reprot"), unknown("report")
    ("unknown command 'reprot'; did you mean report?", '')
    """
    known = [*TRAINER, *COMMANDS]
    return "" if name in known else f"unknown command {name!r}; {nearest(name, known, 1)}"


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


def _told(error: Exception) -> UserError | None:
    """An error of the parser or of torch in words for people, where it is a known one."""
    try:
        from lightning_prompts.cli import told  # imports everything, so not before something is wrong
    except ImportError:  # which may be what is wrong
        return None
    return told(error)


def fail(message: str, unexpected: bool = False) -> int:
    """Tell an error in one line; with the debug variable set, raise it instead."""
    if os.environ.get(DEBUG):
        raise
    line = " ".join(message.split())
    print(f"error: {line}" + (f" (set {DEBUG}=1 to see where)" if unexpected else ""), file=sys.stderr)
    return 1
