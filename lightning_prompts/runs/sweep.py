"""What a sweep runs: its configuration, checked, and the runs that follow from it."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError, check_finite, nearest
from lightning_prompts.files import find_config, load_yaml
from lightning_prompts.runs.launcher import RunSpec, method_of, short_name
from lightning_prompts.runs.spaces import Variant, check_value, variants
from lightning_prompts.runs.tables import Key

RESERVED = ("seed_everything", "ckpt_path", "overwrite", "trainer.default_root_dir")  # the sweep sets these


@dataclass(frozen=True)
class SweepConfig:
    """The configuration of a sweep: the keys of a sweep file.

    Attributes:
        methods: YAML files, or patterns with ``*``. ``{config: FILE, settings: {...}}`` adds settings to one method,
            and ``name: NAME`` replaces the file's name.
        folder: Runs are stored in FOLDER/[TASK/]METHOD[-SETTING]/seed-K.
        tasks: YAML files with data only; every method runs on each of them.
        seeds: One run for each seed.
        settings: By dotted names as on the command line: a value, a list of values (all combinations are run), or a
            search space: ``{uniform: [LOW, HIGH]}``, ``{loguniform: [LOW, HIGH]}``, ``{randint: [LOW, HIGH]}`` (without
            HIGH) or ``{choice: [VALUES]}``. A list of mappings runs one mapping after the other. Settings of a method
            override these.
        options: Settings of every run by dotted names, not part of the runs' names.
        metric: What sorts the table, ``val/...`` or ``test/...``; ``None`` keeps the order of the methods. Metrics of
            the validation set need one more pass over it in each run.
        mode: ``min`` or ``max``: which values of the metric are better.
        untrained: Whether to test the prompt before training as well.
        samples: How many times to draw from search spaces; each draw is combined with all lists.
        draw_seed: Seed of these draws.
        time_limit: After this many seconds no further run starts; runs on Ray are stopped.
        workers: How many runs at once. One worker runs them in this process, with the LM loaded once; more workers run
            on Ray, and 0 means as many as fit the machine or cluster.
        cpus: CPU cores of each run on Ray.
        gpus: GPUs of each run on Ray, or a fraction of one; ``None`` for one if there are any.
        checkpoint: Which prompt to test: ``best`` on validation, or ``last``.

    Raises:
        UserError: A value is not valid.
    """

    methods: Sequence[Any]
    folder: str = "runs/sweep"
    tasks: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    settings: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = "val/nll"
    mode: str = "min"
    untrained: bool = False
    samples: int | None = None
    draw_seed: int = 0
    time_limit: float | None = None
    workers: int = 1
    cpus: float = 1
    gpus: float | None = None
    checkpoint: str = "best"

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> SweepConfig:
        """The configuration from the content of a sweep file; null values stand for the defaults.

        Raises:
            UserError: A key is unknown or missing, or a value is not valid.
        """
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                raise UserError(f"unknown key {key!r}; {nearest(str(key), known)}")
        given = {name: value for name, value in content.items() if value is not None or name == "metric"}
        if "methods" not in given:
            raise UserError("methods is missing; give a list of the methods' YAML files")
        for name in ("methods", "tasks", "seeds"):
            if name in given and not isinstance(given[name], list):
                given[name] = [given[name]]
        return cls(**given)

    def __post_init__(self) -> None:
        """Check the values."""
        for name, kinds, what in (
            ("methods", (str, dict), "files"),
            ("tasks", (str,), "files"),
            ("seeds", (int,), "whole numbers"),
        ):
            items = getattr(self, name)
            wrong = [item for item in items if not isinstance(item, kinds) or isinstance(item, bool)]
            if wrong or not (items or name == "tasks"):
                raise UserError(f"{name} must be a list of {what}, got {wrong[0] if wrong else []!r}")
        for name in ("folder", "metric"):
            if not isinstance(getattr(self, name) or "", str):
                raise UserError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name, choices in (("mode", ("min", "max")), ("checkpoint", ("best", "last")), ("untrained", (True, False))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(map(str, choices))}")
        for name, least in (("samples", 1), ("draw_seed", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, above in (("time_limit", True), ("cpus", True), ("gpus", False)):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UserError(f"{name} must be a number, got {value!r}")
            check_finite(name, value, above=above)
        if not isinstance(self.options, dict):
            raise UserError(f"options must be a mapping from options to values, got {self.options!r}")
        for name, value in self.options.items():
            check_value(value, f"options: {name}")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"seeds: {seed} must be at least 0 and below 2**32")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)} names a seed twice")


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep.

    Attributes:
        config: The configuration.
        folder: The folder of all runs, absolute.
        runs: One run for each seed, by task (empty without tasks) and name of method and setting.
        tasks: The task files.
    """

    config: SweepConfig
    folder: Path
    runs: dict[Key, list[RunSpec]]
    tasks: tuple[Path, ...]

    @property
    def all_runs(self) -> list[RunSpec]:
        """The runs in order."""
        return [run for group in self.runs.values() for run in group]


def read_plan(path: Path, keys: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> SweepPlan:
    """Read a sweep file and make its runs.

    Args:
        path: The file.
        keys: Keys that replace those of the file.
        options: Options of every run in addition to those of the file.

    Raises:
        UserError: The file is not valid, its settings set an option, or a run folder holds a run with other settings.
    """
    content = load_yaml(find_config(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the key methods")
    try:
        content = {**content, **(keys or {})}
        if options:
            content["options"] = {**(content.get("options") or {}), **options}
        return make_plan(SweepConfig.from_mapping(content), options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def make_plan(config: SweepConfig, given: Mapping[str, Any] | None = None) -> SweepPlan:
    """Make the runs of a sweep.

    Args:
        config: The configuration.
        given: Those of its options that must not be without effect.

    Raises:
        UserError: Files are missing, names are not distinct, settings set an option of ``given``, or a run folder holds
            a run with other settings.
    """
    target = Path(config.folder).absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"folder {target} is a file; give another folder")
    tasks = _files(config.tasks, "tasks")
    methods = _methods(config)
    runs: dict[Key, list[RunSpec]] = {}
    without: list[Path | None] = [None]
    for task in tasks or without:
        for file, name, settings in methods:
            for variant in settings:
                _check_effect(given or {}, variant.options)
                full = f"{name}-{variant.label}" if variant.label else name
                spec = RunSpec(
                    folder=str(target),
                    configs=(str(file), str(task)) if task else (str(file),),
                    settings={**config.options, **variant.options, "trainer.enable_progress_bar": False},
                    validate=(config.metric or "").startswith("val/"),
                    checkpoint=config.checkpoint,
                )
                if config.untrained and spec.trains:
                    _add(runs, (task.stem if task else "", f"{full}-untrained"), replace(spec, train=False), config)
                _add(runs, (task.stem if task else "", full), spec, config)
    return SweepPlan(config, target, runs, tuple(tasks))


def _check_effect(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise a `UserError` if settings, which name the run's folder, would replace a given option or a part of it."""
    for option, value in given.items():
        name = short_name(option)
        whole = isinstance(value, str) and not value.lstrip().startswith("{")  # a class, whose settings may follow
        for key in settings:
            within = f"{name}.".startswith(f"{short_name(key)}.")
            if within or (f"{short_name(key)}.".startswith(f"{name}.") and not whole):
                raise UserError(f"settings has {key}, which overrides --{option}; change it there, or leave one out")


def _add(runs: dict[Key, list[RunSpec]], key: Key, spec: RunSpec, config: SweepConfig) -> None:
    """Add a run for each seed."""
    if key in runs:
        raise UserError(
            f"two different runs would both be called {'/'.join(filter(None, key))}; give the methods, task files or "
            "values names of their own"
        )
    for name in spec.settings:
        if name in RESERVED:
            raise UserError(f"the sweep sets {name} itself; leave it out, and name seeds in seeds")
    place = Path(spec.folder).joinpath(*filter(None, key))
    runs[key] = [replace(spec, folder=str(place / f"seed-{seed}"), seed=seed) for seed in config.seeds]
    for run in runs[key]:
        run.check_record()


def _methods(config: SweepConfig) -> list[tuple[Path, str, list[Variant]]]:
    """Each method's file, its name in folders and tables, and its settings."""
    found: list[tuple[Path, str, list[Variant]]] = []
    known = ["config", "name", "settings"]
    for entry in config.methods:
        own = {"config": entry} if isinstance(entry, str) else entry
        if not isinstance(own.get("config"), str):
            raise UserError(f"methods: expected a file or {{config: FILE, settings: ...}}, got {entry!r}")
        for key in own:
            if key not in known:
                raise UserError(f"methods: unknown key {key!r}; {nearest(key, known)}")
        files = _files([own["config"]], "methods")
        if "name" in own and (len(files) > 1 or not _one_word(own["name"])):
            raise UserError(f"methods: name {own['name']!r} must be one word, for one file")
        for file in files:
            if method_of(file) is None:
                raise UserError(f"{file} names no method; give it a model with a class_path")
            settings = variants(own.get("settings"), config.settings, config.samples, config.draw_seed)
            found.append((file, own.get("name", file.stem), settings))
    names = [name for _, name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"methods: several are called {name!r}; give each a name of its own")
    return found


def _one_word(name: object) -> bool:
    return isinstance(name, str) and bool(name) and not set(name) & set("/\\ ") and name not in (".", "..")


def _files(patterns: Sequence[str], key: str) -> list[Path]:
    """The files, in order; those of a pattern by name."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise UserError(f"{key}: {pattern} does not exist (below {Path.cwd()})")
        try:
            found += [find_config(match).absolute() for match in matches]
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    for file in found:
        load_yaml(file)
    return found
