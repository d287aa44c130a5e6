"""The classes that a config can name, and their settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prompts.cli.checks import ROLES
from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.dln.messages import MessageChoice
from lightning_prompts.dln.posterior import PosteriorTemplate
from lightning_prompts.dln.proposals import Proposals
from lightning_prompts.dln.sharpening import Sharpening
from lightning_prompts.estimators.baselines import Baseline
from lightning_prompts.estimators.reinforce import Shaping, Support
from lightning_prompts.estimators.relaxations import GradientEstimator
from lightning_prompts.methods import PromptMethod
from lightning_prompts.objectives import Objective
from lightning_prompts.objectives.rewards import Reward
from lightning_prompts.parallel import LMParallel
from lightning_prompts.prompts.initializers import Initializer
from lightning_prompts.refiners.heads import Head
from lightning_prompts.refiners.networks import RefinerNetwork

CONFIGURABLE: tuple[type, ...] = (
    PromptMethod,
    TextDataModule,
    Initializer,
    GradientEstimator,
    RefinerNetwork,
    Head,
    Objective,
    Reward,
    Baseline,
    Support,
    Shaping,
    Proposals,
    MessageChoice,
    PosteriorTemplate,
    Sharpening,
    L.Callback,
    LMParallel,
)


def abstract(kind: type) -> bool:
    """Whether a class leaves something for its subclasses to write, with or without ``ABCMeta``."""
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def subclasses(base: type) -> Iterator[type]:
    """The classes below a base class that a config can name."""
    child: type
    for child in base.__subclasses__():
        if not abstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from subclasses(child)


def role(key: str) -> type | None:
    """The base class of what a key such as ``model.init_args.init`` holds; ``None`` where no part of it says so.

    >>> role("model.init_args.init").__name__
    'Initializer'
    """
    name = next((ROLES[part] for part in reversed(key.split(".")) if part in ROLES), None)
    return next((base for base in (*CONFIGURABLE, Optimizer, LRScheduler) if base.__name__ == name), None)


def class_names(key: str) -> list[str]:
    """The names of the classes that a key can hold; of all classes where the key does not say which."""
    base = role(key)
    return sorted({child.__name__ for each in ([base] if base else CONFIGURABLE) for child in subclasses(each)})


def settings_of(kind: type) -> dict[str, inspect.Parameter]:
    """The settings of a class, including those that it forwards to its base class by ``**kwargs``."""
    found: dict[str, inspect.Parameter] = {}
    for owner in inspect.getmro(kind):
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        named = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        found = {**named, **found}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return found
