"""Settings that are texts: every word of the command line and every string of a YAML file stays as it is written.

jsonargparse reads a string as YAML before it looks at its type, and once more for each class around the setting.
``# x`` would become null and ``Answer: yes`` a dictionary, on the command line and within the quotes of a YAML file.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg

NULL = "null"  # on the command line: no text


class _Word(str):
    """A word of the command line, as opposed to a string of a config."""


class WordAction(ActionTypeHint):
    """An option whose texts are not read as YAML."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - jsonargparse's
        """Mark what comes from the command line."""
        if len(args) == 4 and isinstance(args[2], str):
            args = (*args[:2], _Word(args[2]), args[3])
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:  # noqa: ANN401
        """Read a value unless it is a text."""
        read = super()._check_type
        if isinstance(value, NestedArg):
            if not _holds_class(self._typehint):  # a class has a parser of its own, which reads the word
                value = NestedArg(value.key, str(value.val) if isinstance(value.val, _Word) else value.val)
            return read(value, append, cfg, mode)  # type: ignore[no-untyped-call]
        word = isinstance(value, _Word)
        value = str(value) if word else value
        if append or not isinstance(value, str) or not _takes_text(self._typehint):
            return read(value, append, cfg, mode)  # type: ignore[no-untyped-call]
        if not word:
            return value
        found = read(value, append, cfg, mode)  # type: ignore[no-untyped-call]
        return value if found is None and value != NULL else found


class GroupAction(_ActionConfigLoad):
    """An option for all settings of a dataclass, as YAML or JSON."""

    def _load_config(self, value: Any, parser: Any) -> Any:  # noqa: ANN401
        word = isinstance(value, _Word)
        return super()._load_config(str(value) if word else value, parser)  # type: ignore[no-untyped-call]


def keep_texts(parser: ArgumentParser) -> None:
    """Let the typed options of a parser keep texts."""
    ours = {ActionTypeHint: WordAction, _ActionConfigLoad: GroupAction}
    for action in parser._actions:  # jsonargparse makes them, and has no setting for their class
        action.__class__ = ours.get(type(action), type(action))


def _takes_text(hint: Any) -> bool:  # noqa: ANN401 - any annotation
    """Whether a type is a text or something else that is no number, truth value or class.

    >>> _takes_text(str | None), _takes_text(str | list[str]), _takes_text(str | int), _takes_text(list[str] | None)
    (True, True, False, False)
    """
    if get_origin(hint) not in (Union, UnionType):
        return False
    kinds = {get_origin(part) or part for part in get_args(hint)}
    return str in kinds and kinds <= {str, NoneType, list, dict}


def _holds_class(hint: Any) -> bool:  # noqa: ANN401 - any annotation
    """Whether a type is a class with settings of its own, or holds one."""
    return any(inspect.isclass(part) and part.__module__ not in ("builtins", "typing") for part in _parts(hint))


def _parts(hint: Any) -> Iterator[Any]:  # noqa: ANN401 - any annotation
    """A type and all types in it."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)
