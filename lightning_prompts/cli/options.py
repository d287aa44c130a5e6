"""All options of the command line with their choices."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lightning_prompts.cli.classes import CONFIGURABLE, subclasses
from lightning_prompts.cli.commands import COMMANDS
from lightning_prompts.cli.main import PromptCLI
from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.methods import PromptMethod

Options = dict[str, list[str]]  # by option its choices; none if it takes anything


def all_options() -> dict[str, Options]:
    """The options of each subcommand; those of Lightning's include the settings of all methods and datasets."""
    classes: Options = {}
    for key, base in (("model", PromptMethod), ("data", TextDataModule)):
        classes[f"--{key}"] = sorted(kind.__name__ for kind in subclasses(base))
        for kind in subclasses(base):
            classes |= {option: choices for option, choices in _settings(key, kind) if choices or option not in classes}
    found = {name: _of_parser(parser) | classes for name, parser in Parsers()._subcommand_parsers.items()}
    for name, command in COMMANDS.items():
        own = importlib.import_module(command.module).parser()
        found[name] = found.get(command.takes, {}) | _of_parser(own)
    return found


class Parsers(PromptCLI):
    """The parsers of Lightning's subcommands; nothing is parsed, built or run."""

    def __init__(self) -> None:
        """Build the parsers."""
        super().__init__([])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - Lightning's
        """Parse nothing."""
        self.config = {"subcommand": None}

    def _set_seed(self) -> None:
        """Seed nothing."""

    def before_instantiate_classes(self) -> None:
        """Check nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def _of_parser(parser: argparse.ArgumentParser) -> Options:
    options: Options = {}
    for action in parser._actions:
        word = next((word for word in action.option_strings if word.startswith("--")), action.dest)
        if not word.endswith(("help", "+")) and not word.startswith(("--print_", "--model", "--data")):
            options[word] = list(map(str, action.choices or _choices(getattr(action, "_typehint", None))))
    return options


def _settings(key: str, kind: type) -> Iterator[tuple[str, list[str]]]:
    """The settings of a class as options, with those of its dataclasses below them."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, key, fail_untyped=False)
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and not action.dest.endswith(".help"):
            yield f"--{action.dest}", _choices(hint)
            for part in _parts(hint):
                if dataclasses.is_dataclass(part) and inspect.isclass(part) and not issubclass(part, CONFIGURABLE):
                    yield from _settings(action.dest, part)


def _choices(hint: Any) -> list[str]:  # noqa: ANN401 - any annotation
    """The values of a type, if they can be listed."""
    found: list[str] = []
    for part in _parts(hint):
        if typing.get_origin(part) is Literal:
            found += map(str, typing.get_args(part))
        elif part is bool:
            found += ["true", "false"]
        elif inspect.isclass(part) and issubclass(part, CONFIGURABLE):
            found += [child.__name__ for child in subclasses(part)]
    return found


def _parts(hint: Any) -> list[Any]:  # noqa: ANN401 - any annotation
    """The members of a union, or the one type."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in _parts(part)]
    return [hint]
