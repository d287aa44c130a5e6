"""Configs as flat lists of settings, named as on the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_prompts.errors import UserError

SEEDS = ("seed_everything", "data.seed")  # members of a mixture keep theirs
PLACES = ("trainer.default_root_dir", "ckpt_path", "overwrite", "config")  # where a run lies, and not what it is
MOST = 20_000
DEEPEST = 50

Settings = dict[str, Any]


def flat(config: Mapping[str, Any], where: str) -> Settings:
    """All settings of a config, by their names on the command line (``model.lm.dtype``).

    Args:
        config: As it was read.
        where: The file, for errors.

    Returns:
        Values that hold no further settings; a class stands as its short name under its own key.

    Raises:
        UserError: It is too large or too deep to be a config (a few lines of YAML can be made to expand without end).
    """
    found: Settings = {}
    for name, value in _leaves(config, "", 0, where):
        found[name] = value
        if len(found) > MOST:
            raise UserError(f"{where} has more than {MOST:,} settings and is no config of a run")
    return found


def without_seeds(settings: Settings) -> Settings:
    """What makes two runs the same method: everything but seeds and places."""
    return {name: value for name, value in settings.items() if name not in (*SEEDS, *PLACES)}


def seeds(settings: Settings) -> list[str]:
    """The different seeds that a config names."""
    found = [settings[name] for name in SEEDS if settings.get(name) is not None]
    return list(dict.fromkeys(map(str, found)))


def _leaves(node: Any, name: str, depth: int, where: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - of YAML
    if depth > DEEPEST:
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
