"""A method on some data, as the command line takes it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import yaml

from lightning_prompts.api.data import Data, data_settings, with_files
from lightning_prompts.api.given_trainer import trainer_settings
from lightning_prompts.api.plain import is_yaml, path_of, plain_value
from lightning_prompts.cli.classes import settings_of, subclasses
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import find_config
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import FixedPrompt, PromptMethod
from lightning_prompts.methods.settings import CLASS, SETTINGS
from lightning_prompts.runs.launcher import method_of, words

Method: TypeAlias = str | Path | PromptMethod

# Short names beside those of the classes.
METHODS = {
    "static": "FixedPrompt",
    "few_shot": "FewShot",
    "chain_of_thought": "ChainOfThought",
    "soft_prompt": "SoftPromptTuning",
    "prefix": "PrefixTuning",
    "latent_seek": "LatentSeek",
    "distillation": "PromptDistillation",
    "relaxed": "RelaxedPromptTuning",
    "hard_search": "HardPromptSearch",
    "refiner": "RefinerTuning",
    "reinforce": "ReinforceRefiner",
    "ape": "Ape",
    "gepa": "Gepa",
    "capo": "Capo",
    "demonstration_search": "DemonstrationSearch",
    "dln": "DeepLanguageNetwork",
    "lora": "LoraTuning",
    "scratch": "ScratchTransformer",
}

# Settings of the trainer that are arguments of `fit`.
ARGUMENTS = {"callbacks": "callbacks", "default_root_dir": "folder", "logger": "logger"}


@dataclass(frozen=True)
class Job:
    """A method on some data, as the command line takes it."""

    name: str
    configs: tuple[str, ...]
    config: dict[str, Any]
    options: dict[str, Any]
    trains: bool

    @classmethod
    def of(
        cls,
        method: Method,
        data: Data,
        lm: str | LMConfig | None,
        settings: Mapping[str, Any],
        trainer: L.Trainer | Mapping[str, Any] | None = None,
    ) -> Job:
        """Sort settings by what they belong to, and write objects as plain data.

        Raises:
            UserError: A name is unknown, or an object cannot be written as plain data.
        """
        kind, configs, config = method_settings(method)
        data_config, data_files = data_settings(data)
        options: dict[str, Any] = {}
        if lm is not None:
            options |= {"model.lm.name": lm} if isinstance(lm, str) else {"model.lm": asdict(lm)}
        own, known = settings_of(kind), settings_of(L.Trainer)
        if isinstance(trainer, L.Trainer):
            options |= {f"trainer.{name}": value for name, value in trainer_settings(trainer).items()}
        elif trainer is not None:
            options |= _trainer_options(trainer)
        for name, value in settings.items():
            if name == "budget":
                if not isinstance(value, Mapping):
                    raise UserError(f"budget must be a dict such as {{'tokens': 20_000}}, got {value!r}")
                options |= {f"budget.{key}": number for key, number in value.items()}
            elif name in own:
                options[f"model.{name}"] = plain_value(name, value)
            elif name in known and isinstance(trainer, L.Trainer):
                raise UserError(f"{name} is a setting of the trainer; give it to your Trainer")
            elif name in known:
                options |= _trainer_options({name: value})
            else:
                raise UserError(f"unknown setting {name!r}; {nearest(name, [*own, *known, 'budget'])}")
        if options.get("trainer.fast_dev_run"):
            raise UserError("fast_dev_run leaves no run; set max_steps=1 instead")
        trains = not issubclass(kind, FixedPrompt)
        return cls(kind.__name__, (*configs, *data_files), {**config, **data_config}, options, trains)

    @property
    def words(self) -> list[str]:
        """The settings as arguments of the command line."""
        return words(self.options)

    def write(self, path: Path, folder: Path) -> Path:
        """Write the config to a file, and rows in Python below a folder, each table under a name of its own."""
        config = dict(self.config)
        if "data" in config:
            config["data"] = with_files(config["data"], (folder / "data").absolute())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    @contextmanager
    def files(self, folder: Path) -> Iterator[list[str]]:
        """The configs as arguments of the command line, while the block runs."""
        with tempfile.TemporaryDirectory() as name:
            config = self.write(Path(name) / "settings.yaml", folder)
            yield [word for file in (*self.configs, str(config)) for word in ("-c", file)]


def _trainer_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the trainer as options of the command line.

    Raises:
        UserError: A name is unknown, or has an argument of its own.
    """
    known = settings_of(L.Trainer)
    options: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"unknown setting of the trainer {name!r}; {nearest(name, known)}")
        if name in ARGUMENTS and not (name == "logger" and isinstance(value, bool | str | dict | list)):
            raise UserError(f"trainer: {name} cannot be given here; use the argument {ARGUMENTS[name]}")
        options[f"trainer.{name}"] = plain_value(name, value)
    return options


def method_settings(method: Method) -> tuple[type[PromptMethod], list[str], dict[str, Any]]:
    """The class of a method, the files and the config that name it."""
    if isinstance(method, PromptMethod):
        kind = type(method)
        defaults = settings_of(kind)
        for name in ("optimizer", "scheduler"):
            if name in defaults and getattr(method, name) not in (None, defaults[name].default):
                raise UserError(
                    f"the {name} of a method object cannot be recorded; give it as a setting, such as "
                    f"{name}={{'class_path': 'torch.optim.SGD', 'init_args': {{'lr': 0.1}}}}"
                )
        written = {name: plain_value(name, value) for name, value in method.hparams.items() if name in defaults}
        return kind, [], {"model": {CLASS: path_of(kind), SETTINGS: written}}
    kinds = {kind.__name__: kind for kind in subclasses(PromptMethod)}
    if is_yaml(method):
        method = find_config(method)
        name = (method_of(method) or "").rpartition(".")[2]
        if name not in kinds:
            raise UserError(f"{method} names no method; give it a model with a class_path")
        return kinds[name], [str(method)], {}
    name = METHODS.get(str(method), str(method))
    if name not in kinds:
        raise UserError(f"unknown method {str(method)!r}; {nearest(str(method), [*METHODS, *kinds])}")
    return kinds[name], [], {"model": {CLASS: path_of(kinds[name]), SETTINGS: {}}}
