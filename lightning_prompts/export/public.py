"""Remove local paths and addresses of servers from exports for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lightning_prompts.lm.loading import RANDOM

LEFT_OUT = "(left out)"


def without_places(value: Any) -> Any:  # noqa: ANN401 - YAML
    """Remove local paths and addresses of servers from a part of a config.

    >>> without_places({"files": ["/home/me/rows.csv"], "server": {"base_url": "http://host/v1", "chat": True}})
    {'files': ['(left out)'], 'server': {'base_url': '(left out)', 'chat': True}}
    >>> without_places(["/no_think", "a/b", "random:llama,hidden_size=64", "random:/home/me/model,num_layers=2", ""])
    ['/no_think', 'a/b', 'random:llama,hidden_size=64', '(left out)', '']
    """
    if isinstance(value, Mapping):
        return {name: LEFT_OUT if name == "base_url" else without_places(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    return LEFT_OUT if isinstance(value, str) and _is_place(value) else value


def _is_place(text: str) -> bool:
    """Whether a text is an absolute path, or the path of an existing file."""
    path = text.removeprefix(RANDOM).partition(",")[0] if text.startswith(RANDOM) else text
    if not path.strip() or "\n" in path:
        return False
    deep = PurePosixPath(path).is_absolute() and len(PurePosixPath(path).parts) > 2
    if deep or path.startswith(("~/", "file:")) or PureWindowsPath(path).is_absolute():
        return True
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with invalid characters
        return False
