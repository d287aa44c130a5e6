"""Subcommands beside Lightning's: each in a file of its own, imported when it is asked for and not before."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prompts.errors import DEBUG, UserError


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        module: The module with its ``main(args) -> int``, which gives the exit code.
        help: What it does, in one line.
    """

    module: str
    help: str


TRAINER = {
    "fit": "train a prompt",
    "validate": "score a prompt on the validation set",
    "test": "score a prompt on the test sets: metrics.json, predictions.jsonl",
    "predict": "write answers: generations.jsonl",
}
COMMANDS: dict[str, Command] = {
    "report": Command("lightning_prompts.report.command", "compare runs on one page, as HTML and as Markdown"),
    "export": Command("lightning_prompts.export.command", "write a run's prompt for PEFT, vLLM and others, checked"),
    "sweep": Command("lightning_prompts.studies.sweep", "seeds x methods x settings on Ray Tune, and a table"),
    "plan": Command("lightning_prompts.memory_plan", "say how much memory a run would need, before it loads anything"),
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
        "those of a method and of a dataset."
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
        return fail(f"{type(error).__name__}: {error}", unexpected=True)


def fail(message: str, unexpected: bool = False) -> int:
    """Tell an error in one line; with the debug variable set, raise it instead."""
    if os.environ.get(DEBUG):
        raise
    line = " ".join(message.split())
    print(f"error: {line}" + (f" (set {DEBUG}=1 to see where)" if unexpected else ""), file=sys.stderr)
    return 1
