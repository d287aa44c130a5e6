"""Write settings as plain data: numbers, texts, lists and dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.methods.settings import as_plain


def plain_value(name: str, value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    """A setting as numbers, texts, lists and dicts.

    Raises:
        UserError: It is an object that does not say how it was made.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {plain_value(name, key): plain_value(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(name, item) for item in value]
    found = as_plain({name: value})
    if name not in found:
        raise UserError(f"{name}: {value!r} cannot be recorded; give it as {{'class_path': ..., 'init_args': {{...}}}}")
    return found[name]


def path_of(kind: type) -> str:
    """How a config names a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_yaml(name: str | Path) -> bool:
    """Whether a name is that of a YAML file."""
    return isinstance(name, Path) or name.endswith((".yaml", ".yml"))
