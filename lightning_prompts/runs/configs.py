"""Configs as flat lists of settings, named as on the command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lightning_prompts.errors import UserError

SEEDS = ("seed_everything", "data.seed")  # datasets of a mixture keep their own seeds
PLACES = ("trainer.default_root_dir", "ckpt_path", "overwrite", "config")  # where a run is stored, not what it does
ROWS = re.compile(r"[/\\]data[/\\]\w+-[0-9a-f]{12}\.jsonl$")  # rows in Python, as `lightning_prompts.api` writes them
MAX_SETTINGS = 20_000
MAX_DEPTH = 50

Settings = dict[str, Any]


def flat(config: Mapping[str, Any], where: str) -> Settings:
    """All settings of a config, by their names on the command line (``model.lm.dtype``).

    Args:
        config: The config.
        where: The file, for error messages.

    Returns:
        Values without further settings inside; a class appears as its short name under its own key.

    Raises:
        UserError: It is too large or too deep to be a config; a few lines of YAML can expand without end.
    """
    found: Settings = {}
    for name, value in _leaves(config, "", 0, where):
        found[name] = value
        if len(found) > MAX_SETTINGS:
            raise UserError(f"{where} has more than {MAX_SETTINGS:,} settings and is no config of a run")
    return found


def without_seeds(settings: Settings) -> Settings:
    """Everything but seeds and places: two runs with equal values use the same method."""
    return {name: without_place(value) for name, value in settings.items() if name not in (*SEEDS, *PLACES)}


def without_place(value: Any) -> Any:  # noqa: ANN401 - any setting
    """Return a setting without the folder, if it is a file of rows in Python.

    Each run has its own copy of such a file. The name has a hash of the rows.

    >>> without_place("/runs/soft/data/train-0a1b2c3d4e5f.jsonl"), without_place("/data/train.jsonl")
    ('train-0a1b2c3d4e5f.jsonl', '/data/train.jsonl')
    """
    return PurePath(value).name if isinstance(value, str) and ROWS.search(value) else value


def seeds(settings: Settings) -> list[str]:
    """The distinct seeds in a config."""
    found = [settings[name] for name in SEEDS if settings.get(name) is not None]
    return list(dict.fromkeys(map(str, found)))


def _leaves(node: Any, name: str, depth: int, where: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - of YAML
    if depth > MAX_DEPTH:
        raise UserError(f"{where} is nested too deeply to be a config")
    if isinstance(node, Mapping) and node:
        if "class_path" in node:
            yield name, str(node["class_path"]).rpartition(".")[2]
        for key, value in node.items():
            inner = name if key in ("init_args", "dict_kwargs") and "class_path" in node else _join(name, str(key))
            if key != "class_path" and not (inner == name and not value):
                yield from _leaves(value, inner, depth + 1, where)
    elif isinstance(node, list) and any(isinstance(item, Mapping | list) for item in node):
        seen: Counter[str] = Counter()
        for item in node:
            path = item.get("class_path") if isinstance(item, Mapping) else None
            label = str(path).rpartition(".")[2] if path else "item"
            seen[label] += 1
            again = f"#{seen[label]}" if seen[label] > 1 or not path else ""
            yield from _leaves(item, _join(name, label + again), depth + 1, where)
    else:
        yield name, node


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
