"""Checks of the command line that need neither torch nor Lightning, which take seconds to import."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from lightning_prompts.errors import UserError
from lightning_prompts.files import find_config, load_yaml

TOP = {"model", "data", "trainer", "budget", "checkpoint", "seed_everything", "ckpt_path", "config", "overwrite"}
# The base class of what each key of a config holds.
ROLES = {
    "model": "PromptMethod",
    "data": "TextDataModule",
    "members": "TextDataModule",
    "init": "Initializer",
    "callbacks": "Callback",
    "strategy": "LMParallel",
    "estimator": "GradientEstimator",
    "refiner": "RefinerNetwork",
    "head": "Head",
    "objective": "Objective",
    "objectives": "Objective",
    "reward": "Reward",
    "rewards": "Reward",
    "baseline": "Baseline",
    "support": "Support",
    "shaping": "Shaping",
    "proposals": "Proposals",
    "messages": "MessageChoice",
    "templates": "PosteriorTemplate",
    "sharpening": "Sharpening",
    "optimizer": "Optimizer",
    "scheduler": "LRScheduler",
}
PLACES = {*ROLES, "config", "trainer", "budget", "checkpoint", "lm"}  # keys whose value may be a file with the settings
ENDINGS = (".yaml", ".yml", ".json")
FILE = re.compile(r"[^\s{}\[\],:]*(?:/[^\s{}\[\],:]*|\.yaml|\.yml|\.json)")


def check(args: Sequence[str]) -> list[str]:
    """Find mistyped options and config files that are missing or not valid YAML.

    The parser does not name the line of a YAML error, and shows the contents of any file that a setting names. So this
    also checks the files that stand in place of settings, as in ``model: other.yaml``.

    Args:
        args: The words of the command line.

    Returns:
        The words with the paths of installed configs in place of their names.

    Raises:
        UserError: An option or a key at the top of a config is mistyped, or a file is missing or not valid.
    """
    found = list(args)
    for index, (word, following) in enumerate(zip(args, [*args[1:], ""], strict=True)):
        option, equals, value = word.partition("=")
        given = value if equals else following
        if option in ("-c", "--config"):
            path = _check_config(given)
            if equals:
                found[index] = f"{option}={path}"
            elif index + 1 < len(found):
                found[index + 1] = path
        elif option.startswith("--"):
            top, *rest = name = option.removeprefix("--").rstrip("+").split(".")
            _check_names({top: {rest[0]: None} if rest else None})
            _check_files({name[-1]: given}, Path(option))
    return found


def _check_config(given: str) -> str:
    """Check a value of ``--config``, which is a file, or the settings themselves; return the path of the file."""
    try:
        found = Path(given).is_file()
    except OSError:  # too long for the name of a file
        found = False
    if not found and (not given or ":" in given):
        return given
    path = find_config(given)
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it must be names with values, as in `model: ...`")
    _check_names(content, f"{path}: ")
    _check_files(content, path)
    return str(path)


def _check_names(content: Mapping[object, object], where: str = "") -> None:
    """Raise if a name at the top or in ``trainer`` is close to a valid one; the parser checks all other names."""
    for name in _tops(content) - TOP:
        place = f"trainer.{name}" if name in trainer_settings() else _closest(name, TOP)
        if place:
            raise UserError(f"{where}unknown setting {name!r}; did you mean {place}?")
    trainer = content.get("trainer")
    for name in _tops(trainer if isinstance(trainer, dict) else {}) - trainer_settings():
        if place := _closest(name, trainer_settings()):
            raise UserError(f"{where}unknown setting 'trainer.{name}'; did you mean trainer.{place}?")


def _tops(content: Mapping[object, object]) -> set[str]:
    """The first parts of the keys, without the ``+`` that appends to a list.

    >>> sorted(_tops({"callbacks+": [], "logger.save_dir": ""}))
    ['callbacks', 'logger']
    """
    return {str(name).partition(".")[0].rstrip("+") for name in content}


def _closest(name: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), "")


@cache
def trainer_settings() -> frozenset[str]:
    """The settings of Lightning's Trainer, read from its source; none if the source is not found."""
    spec = importlib.util.find_spec("lightning")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "pytorch", "trainer", "trainer.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
            if isinstance(node, ast.ClassDef) and node.name == "Trainer":
                functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                init = next(item for item in functions if item.name == "__init__")
                return frozenset(argument.arg for argument in init.args.kwonlyargs)
    return frozenset()


def _check_files(content: object, where: Path) -> None:
    """Check the files that stand in place of settings, and the files that these name.

    Args:
        content: The settings, or a part of them.
        where: The file or the option that they are from.
    """
    if isinstance(content, list):
        for item in content:
            _check_files(item, where)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key not in PLACES or not isinstance(value, str) or not FILE.fullmatch(value):
            _check_files(value, where)
            continue
        path = next((path for path in (where.parent / value, Path(value)) if path.is_file()), None)
        if path is None or not value.endswith(ENDINGS):
            kind = "does not exist" if path is None else f"is no config: its name must end in {', '.join(ENDINGS)}"
            raise UserError(f"{where}: {key}: {value} {kind}; name a class, or a YAML file with the settings")
        if path.resolve() != where.resolve():
            _check_files(load_yaml(path), path)
