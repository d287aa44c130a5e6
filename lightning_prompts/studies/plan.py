"""What a ``sweep.yaml`` asks for: its keys, checked, and the runs that follow from it."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError, check_finite, nearest
from lightning_prompts.files import load_yaml
from lightning_prompts.studies.runs import Run, trains
from lightning_prompts.studies.spaces import Variant, check_value, variants, words
from lightning_prompts.studies.tables import Key

RESERVED = ("seed_everything", "ckpt_path", "overwrite", "trainer.default_root_dir")  # options that a sweep sets itself


@dataclass(frozen=True)
class SweepConfig:
    """The keys of a ``sweep.yaml``.

    Attributes:
        methods: YAML files (or patterns with ``*``), or for settings of one method alone ``{config: FILE, settings:
            {...}}``, with ``name: NAME`` for another name than the file's.
        folder: Where everything goes: FOLDER/[TASK/]METHOD[-SETTING]/seed-K.
        tasks: YAML files of the data alone; every method runs on each of them.
        seeds: One run for each.
        settings: By the options' dotted names, as on the command line: one value, a list of values (all combinations
            are run), or a search space of Ray: ``{uniform: [LOW, HIGH]}``, ``{loguniform: [LOW, HIGH]}``, ``{randint:
            [LOW, HIGH]}`` (HIGH is never drawn) or ``{choice: [VALUES]}``. A list of such mappings is run one after the
            other. Those of a method stand above those of all.
        options: Options of every run, by their dotted names; not part of the runs' names.
        metric: What the table is sorted by; ``val/nll`` and others that begin so are measured on the validation set.
        mode: ``min`` or ``max``: which way is better.
        samples: How many times search spaces are drawn from; each draw is combined with all lists.
        draw_seed: Seed of these draws.
        time_limit: Seconds after which the sweep ends, or ``null``; the same command goes on later.
        at_once: How many runs at most run at once; ``null`` for as many as the machine has room for.
        cpus: CPU cores of each run.
        gpus: GPUs of each run, or a share of one; ``null`` for one where the machine has any.
        checkpoint: ``best`` on validation or ``last``: which prompt is tested.
    """

    methods: list[Any]
    folder: str = "runs/sweep"
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Any = None
    options: Any = None
    metric: str = "val/nll"
    mode: str = "min"
    samples: int | None = None
    draw_seed: int = 0
    time_limit: float | None = None
    at_once: int | None = None
    cpus: float = 1
    gpus: float | None = None
    checkpoint: str = "best"


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep.

    Attributes:
        config: What was asked for.
        folder: Where everything goes.
        runs: By task (empty without tasks) and name of method and setting, one run for each seed.
        tasks: The task files.
    """

    config: SweepConfig
    folder: Path
    runs: dict[Key, list[Run]]
    tasks: tuple[Path, ...]


def read_plan(path: Path, folder: str | None = None) -> SweepPlan:
    """Read a ``sweep.yaml`` and make its runs.

    Args:
        path: The file.
        folder: In place of the file's own.

    Raises:
        UserError: Something in it is wrong, or a run folder holds a run of other settings.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the key methods")
    config = _checked(content, path)
    target = Path(folder or config.folder).absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"{path}: folder {target} is a file; give another folder")
    tasks = _files(config.tasks, "tasks", path)
    runs: dict[Key, list[Run]] = {}
    alone: list[Path | None] = [None]
    for file, name, variants_ in _methods(config, path):
        trains(file)  # or it names no method
        for task in tasks or alone:
            for variant in variants_:
                key = (task.stem if task else "", f"{name}-{variant.label}" if variant.label else name)
                if key in runs:
                    raise UserError(
                        f"{path}: two different runs would both be called {'/'.join(filter(None, key))}; give the "
                        "methods, task files or values names of their own"
                    )
                place = target.joinpath(*filter(None, key))
                runs[key] = [
                    Run(
                        str(place / f"seed-{seed}"),
                        (str(file), str(task)) if task else (str(file),),
                        seed,
                        (*words(config.options or {}), *words(variant.options), "--trainer.enable_progress_bar=false"),
                        checkpoint=config.checkpoint,
                        validated=config.metric.startswith("val/"),
                    )
                    for seed in config.seeds
                ]
    for run in (run for group in runs.values() for run in group):
        for word in run.options:
            if (name := word.lstrip("-").partition("=")[0]) in RESERVED:
                raise UserError(f"{path}: {name} is the sweep's own to set; leave it out, and name seeds in seeds")
        run.check_record()
    return SweepPlan(config, target, runs, tuple(tasks))


def _methods(config: SweepConfig, path: Path) -> list[tuple[Path, str, list[Variant]]]:
    """Each method's file, its name in folders and tables, and its settings."""
    found: list[tuple[Path, str, list[Variant]]] = []
    for entry in config.methods:
        own = {"config": entry} if isinstance(entry, str) else entry
        if not isinstance(own, dict) or not isinstance(own.get("config"), str):
            raise UserError(f"{path}: methods: expected a file or {{config: FILE, settings: ...}}, got {entry!r}")
        for key in own:
            if key not in ("config", "name", "settings"):
                raise UserError(f"{path}: methods: unknown key {key!r}; {nearest(key, ['config', 'name', 'settings'])}")
        files = _files([own["config"]], "methods", path)
        if "name" in own and (len(files) > 1 or not _plain(own["name"])):
            raise UserError(f"{path}: methods: name {own['name']!r} must be one word, for one file")
        for file in files:
            settings = variants(own.get("settings"), config.settings, config.samples, config.draw_seed, path)
            found.append((file, own.get("name", file.stem), settings))
    names = [name for _, name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: methods: several are called {name!r}; give each a name of its own")
    return found


def _plain(name: object) -> bool:
    return isinstance(name, str) and bool(name) and not set(name) & set("/\\ ") and name not in (".", "..")


def _files(patterns: Sequence[str], key: str, path: Path) -> list[Path]:
    """The files, in order; a pattern's by name."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        missing = [match for match in matches if not Path(match).is_file()]
        if missing or not matches:
            raise UserError(f"{path}: {key}: {(missing or [pattern])[0]} does not exist (below {Path.cwd()})")
        found += [Path(match).absolute() for match in matches]
    for file in found:
        load_yaml(file)
    return found


def _checked(content: Mapping[str, Any], path: Path) -> SweepConfig:
    """The keys with their values, or what is wrong with the first that is wrong."""
    known = [field.name for field in fields(SweepConfig)]
    for key in content:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), known)}")
    given: dict[str, Any] = {name: value for name, value in content.items() if value is not None}
    if "methods" not in given:
        raise UserError(f"{path}: methods is missing; give a list of the methods' YAML files")
    for key, kind in (("methods", (str, dict)), ("tasks", (str,)), ("seeds", (int,))):
        if key in given:
            given[key] = _list(given[key], key, kind, path)
    for key in ("folder", "metric"):
        if not isinstance(given.get(key, ""), str):
            raise UserError(f"{path}: {key} must be a text, got {given[key]!r}")
    for key, choices in (("mode", ("min", "max")), ("checkpoint", ("best", "last"))):
        if given.get(key, choices[0]) not in choices:
            raise UserError(f"{path}: {key}: {given[key]!r} is not one of {', '.join(choices)}")
    for key in ("samples", "at_once", "draw_seed"):
        value = given.get(key, 1)
        least = 0 if key == "draw_seed" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{path}: {key} must be a whole number of at least {least}, got {value!r}")
    for key, above in (("time_limit", True), ("cpus", True), ("gpus", False)):
        value = given.get(key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{path}: {key} must be a number, got {value!r}")
        check_finite(f"{path}: {key}", value, above=above)
    if not isinstance(given.get("options", {}), dict):
        raise UserError(f"{path}: options must be a mapping from options to values, got {given['options']!r}")
    for name, value in given.get("options", {}).items():
        check_value(value, f"{path}: options: {name}")
    for seed in given.get("seeds", ()):
        if not 0 <= seed < 2**32:
            raise UserError(f"{path}: seeds: {seed} must be at least 0 and below 2**32")
    if len(set(given.get("seeds", ()))) < len(given.get("seeds", ())):
        raise UserError(f"{path}: seeds: {given['seeds']} names a seed twice")
    given |= {key: tuple(given[key]) for key in ("tasks", "seeds") if key in given}
    return SweepConfig(**given)


def _list(value: object, key: str, kinds: tuple[type, ...], path: Path) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    wrong = [item for item in items if not isinstance(item, kinds) or isinstance(item, bool)]
    if wrong or not (items or key == "tasks"):
        what = "whole numbers" if kinds == (int,) else "files"
        raise UserError(f"{path}: {key} must be a list of {what}, got {wrong[0] if wrong else 'an empty list'!r}")
    return items
