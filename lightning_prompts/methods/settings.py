"""Conversion of a method's settings to plain data, which checkpoints hold, and back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from lightning_prompts.errors import UserError

CLASS, SETTINGS = "class_path", "init_args"  # as in a config
NOT_SAID = "not_said"  # names of settings that are not plain data


def as_plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to numbers, strings, lists and dictionaries; ``not_said`` lists the names of all others.

    >>> as_plain({"length": 3, "reward": len})
    {'length': 3, 'not_said': ['reward']}
    """
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        try:
            plain[name] = _plain(value)
        except (TypeError, ValueError):  # ValueError: a class without a signature
            plain.setdefault(NOT_SAID, []).append(name)
    return plain


def _plain(value: object) -> object:
    """Convert a value to plain data.

    Raises:
        TypeError: The value is not plain data, and its attributes do not include its constructor's arguments.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    kind = type(value)
    names = _parameters(kind)
    if inspect.isroutine(value) or not all(hasattr(value, name) for name in names):
        raise TypeError(f"{value!r} is no plain data")
    path = f"{kind.__module__}.{kind.__qualname__}"
    return {CLASS: path, SETTINGS: {name: _plain(getattr(value, name)) for name in names}}


def _parameters(kind: type) -> list[str]:
    """Return the names of a class's constructor arguments.

    Raises:
        TypeError: The constructor takes arbitrary arguments.
    """
    parameters = inspect.signature(kind).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        raise TypeError(f"{kind} takes any settings")
    return [parameter.name for parameter in parameters]


def from_plain(plain: Mapping[str, Any], kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Restore the settings of a class from plain data; the inverse of `as_plain`.

    It imports nothing, and creates an object only if the constructor's type hint allows its class.

    Args:
        plain: Settings from a checkpoint.
        kind: The class that the settings are for.
        given: Settings that replace the saved ones.

    Raises:
        UserError: A setting is neither saved nor given, or its class is not imported.
    """
    missing = [name for name in plain.get(NOT_SAID, []) if name not in given]
    if missing:
        raise UserError(
            f"the checkpoint does not record {', '.join(missing)}; pass it: "
            f"{kind.__name__}.load_from_checkpoint(path, {missing[0]}=...)"
        )
    hints = get_type_hints(inspect.getattr_static(kind, "__init__"))
    said = {name: value for name, value in plain.items() if name not in given and name != NOT_SAID}
    made = {name: _made(value, hints.get(name), name) for name, value in said.items()}
    return {**made, **given}


def _made(value: object, hint: object, name: str) -> object:
    """Convert plain data to a value."""
    if isinstance(value, list):
        items = [_made(item, hint, name) for item in value]
        return tuple(items) if tuple in _kinds(hint) else items
    if not isinstance(value, dict):
        return value
    if CLASS not in value:
        return {key: _made(item, hint, name) for key, item in value.items()}
    module, _, attribute = str(value[CLASS]).rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    if not isinstance(kind, type):
        raise UserError(f"{name} of the checkpoint is a {value[CLASS]}, which is not known here; import {module} first")
    if not any(issubclass(kind, allowed) for allowed in _kinds(hint) if allowed.__module__ != "builtins"):
        raise UserError(f"{name} of the checkpoint cannot be a {value[CLASS]}")
    hints = get_type_hints(inspect.getattr_static(kind, "__init__"))
    return kind(**{key: _made(item, hints.get(key), f"{name}.{key}") for key, item in value[SETTINGS].items()})


def _kinds(hint: object) -> Iterator[type]:
    """Yield the classes that occur anywhere in a type hint."""
    origin = getattr(hint, "__origin__", None)
    for kind in (hint, origin):
        if isinstance(kind, type):
            yield kind
    for part in get_args(hint):
        yield from _kinds(part)
