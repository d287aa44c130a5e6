"""All options of the command line with their choices, as plain names."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from lightning.pytorch.cli import LightningArgumentParser

from lightning_prompts import datamodules, methods
from lightning_prompts.cli import CONFIGURABLE, PromptCLI
from lightning_prompts.commands import COMMANDS
from lightning_prompts.config_errors import settings_of, subclasses

Options = dict[str, list[str]]


def all_options() -> dict[str, Any]:
    """What can be typed.

    Returns:
        ``trainer``: by subcommand, what does not depend on classes; ``model`` and ``data``: by class; ``commands``: by
        subcommand of our own. Each an option with its choices, without any where they are free.
    """
    return {
        "trainer": {name: _of_parser(parser) for name, parser in _parsers().items()},
        "model": {kind.__name__: dict(_of_class("--model", kind)) for kind in subclasses(methods.PromptMethod)},
        "data": {kind.__name__: dict(_of_class("--data", kind)) for kind in subclasses(datamodules.TextDataModule)},
        "commands": {name: _of_parser(importlib.import_module(row.module).parser()) for name, row in COMMANDS.items()},
    }


class _Made(Exception):  # noqa: N818 - no error: the way out of a constructor that would go on to run
    """The parsers are made."""


class _Parsers(PromptCLI):
    """Stops where the command line would be read."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - Lightning's
        """Not today."""
        raise _Made(self._subcommand_parsers)


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of Lightning's subcommands."""
    try:
        _Parsers([])
    except _Made as made:
        return dict(made.args[0])
    raise AssertionError("Lightning no longer asks for the arguments to be parsed")


def _of_parser(parser: argparse.ArgumentParser) -> Options:
    options: Options = {}
    for action in parser._actions:
        words = [word for word in action.option_strings if word.startswith("--")] or [action.dest]
        for word in words:
            skipped = word.endswith(".help") or word.startswith(("--print_", "--model", "--data"))
            if action.help != argparse.SUPPRESS and not skipped:
                kind = getattr(action, "_typehint", None)
                options[word] = list(map(str, action.choices)) if action.choices else _choices(kind)
    return options


def _of_class(prefix: str, kind: Any) -> Iterator[tuple[str, list[str]]]:  # noqa: ANN401 - a class or a dataclass
    """The settings of a class, and below them those of its dataclasses."""
    owners = [vars(base)["__init__"] for base in reversed(inspect.getmro(kind)) if "__init__" in vars(base)]
    owners = [kind] if dataclasses.is_dataclass(kind) else owners
    hints = {name: hint for owner in owners for name, hint in typing.get_type_hints(owner).items()}
    for name in settings_of(kind):
        hint = hints.get(name, str)
        yield f"{prefix}.{name}", _choices(hint)
        inner = next((part for part in _parts(hint) if dataclasses.is_dataclass(part) and not _role(part)), None)
        if inner is not None:
            yield from _of_class(f"{prefix}.{name}", inner)


def _choices(hint: Any) -> list[str]:  # noqa: ANN401 - any annotation
    """What a setting can be, where there are few things."""
    found: list[str] = []
    for part in _parts(hint):
        if typing.get_origin(part) is Literal:
            found += map(str, typing.get_args(part))
        elif part is bool:
            found += ["true", "false"]
        elif inspect.isclass(part) and _role(part):
            found += [child.__name__ for child in subclasses(part)]
    return found


def _role(part: Any) -> bool:  # noqa: ANN401
    """Whether a setting is one of several classes, named in the config."""
    return inspect.isclass(part) and issubclass(part, CONFIGURABLE)


def _parts(hint: Any) -> list[Any]:  # noqa: ANN401
    """The members of a union, or the one type."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in _parts(part)]
    return [hint]
