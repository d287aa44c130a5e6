"""Settings of a sweep: lists become grids, search spaces become draws."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prompts.errors import UserError

Setting = dict[str, Any]  # options by their dotted names
SPACES = ("uniform", "loguniform", "randint", "choice")
DIGITS = 4  # of a drawn value, which is part of a folder's name
MAX_LABEL = 80


@dataclass(frozen=True)
class Variant:
    """One setting of a method.

    Attributes:
        options: The settings.
        label: The name in folders and tables, from settings that vary: lists, draws, and all settings of a list of
            mappings. Empty if nothing varies.
    """

    options: Setting
    label: str


def variants(own: object, shared: object, samples: int | None, seed: int) -> list[Variant]:
    """The settings that a method runs with.

    Args:
        own: Settings of the method, a mapping or a list of mappings; they override the shared ones.
        shared: Settings of all methods, likewise.
        samples: How many times to draw from search spaces.
        seed: Seed of the draws.

    Returns:
        Each combination once, in order; a single empty one without settings.

    Raises:
        UserError: A list is empty, a search space is not valid, or ``samples`` is missing.
    """
    methods, everyone = _mappings(own), _mappings(shared)
    found: dict[str, Variant] = {}
    for mine, others in itertools.product(methods, everyone):
        mapping = {**others, **mine}
        several = len(methods) * len(everyone) > 1
        shown = [key for key, value in mapping.items() if several or isinstance(value, list) or is_space(value)]
        for options in _combined(mapping, samples, seed):
            variant = Variant(options, label({key: options[key] for key in shown}))
            found.setdefault(json.dumps(options, sort_keys=True), variant)
    return list(found.values())


def _mappings(given: object) -> list[Mapping[str, Any]]:
    """One or several mappings, checked."""
    several: list[Any] = given if isinstance(given, list) else [{} if given is None else given]
    if not several:
        raise UserError("settings is an empty list; leave it out, or give it a mapping")
    for mapping in several:
        if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
            raise UserError(f"settings must be a mapping from options to values, got {mapping!r}")
        for key, value in mapping.items():
            check_value(value, f"settings: {key}")
            if value == []:
                raise UserError(f"settings: {key} is an empty list; give it at least one value")
            if isinstance(value, dict) and len(value) == 1 and not is_space(value):
                (name,) = value
                if close := difflib.get_close_matches(str(name), SPACES, n=1, cutoff=0.7):
                    raise UserError(f"settings: {key}: unknown search space {name!r}; did you mean {close[0]}?")
    return several


def check_value(value: object, where: str) -> None:
    """Raise a `UserError` for values that YAML has and settings have not, such as dates."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {value!r} is no value of an option ({error}); put a text in quotes") from error


def is_space(value: object) -> bool:
    """Whether a value is a search space.

    >>> is_space({"loguniform": [0.001, 0.1]}), is_space({"class_path": "Zeros"})
    (True, False)
    """
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in SPACES


def _combined(mapping: Mapping[str, Any], samples: int | None, seed: int) -> list[Setting]:
    """All combinations of the lists, with each draw from the spaces."""
    spaces = {key: value for key, value in mapping.items() if is_space(value)}
    if spaces and samples is None:
        raise UserError(f"settings: {next(iter(spaces))} is drawn; say how many times with samples")
    grids = [
        [(key, value) for value in (values if isinstance(values, list) else [values])]
        for key, values in mapping.items()
        if key not in spaces
    ]
    draws = [
        {key: _draw(space, f"{seed} {index} {key}", f"settings: {key}") for key, space in spaces.items()}
        for index in range(samples or 1 if spaces else 1)
    ]
    settings = [{**dict(pairs), **drawn} for drawn in draws for pairs in itertools.product(*grids)]
    return [{key: setting[key] for key in mapping} for setting in settings]


def _draw(space: Mapping[str, Any], seed: str, where: str) -> Any:  # noqa: ANN401 - whatever may be chosen
    """One value of a search space; equal seeds give equal values, so that a resumed sweep finds its runs."""
    ((name, limits),) = space.items()
    if not isinstance(limits, list) or not limits or (name != "choice" and len(limits) != 2):
        raise UserError(f"{where}: {name} needs {'a list of values' if name == 'choice' else '[LOW, HIGH]'}")
    import numpy as np  # only for sweeps that draw

    generator = np.random.RandomState(random.Random(seed).randrange(2**32))
    if name == "choice":
        return limits[int(generator.choice(len(limits)))]
    low, high = (_number(limit, where) for limit in limits)
    if name == "randint":
        low, high = math.floor(low), math.floor(high)
    if not low < high or (name == "loguniform" and low <= 0):
        raise UserError(f"{where}: {name} needs LOW below HIGH{' and above 0' if name == 'loguniform' else ''}")
    if name == "randint":
        return int(generator.randint(int(low), int(high)))
    if name == "loguniform":
        drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        drawn = generator.uniform(low, high)
    return float(f"{drawn:.{DIGITS}g}")


def _number(value: object, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # YAML reads 1e-3 as a text
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {value!r} is not a number") from error
    if not math.isfinite(number):
        raise UserError(f"{where}: {value!r} is not finite")
    return number


def label(setting: Mapping[str, Any]) -> str:
    """A short name for settings in folders and tables; different settings have different names.

    >>> label({"model.length": 4, "model.optimizer.init_args.lr": 0.02})
    'length=4,lr=0.02'
    >>> label({"model.init": {"class_path": "Zeros"}, "data.chat": True})
    'init=Zeros,chat=true'
    """
    names = [key.rpartition(".")[2] for key in setting]
    parts, exact = [], True
    for key, name, value in zip(setting, names, setting.values(), strict=True):
        shown = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, dict) and "class_path" in value:
            shown = str(value["class_path"]).rpartition(".")[2]
            exact = exact and len(value) == 1
        plain = re.sub(r"[^\w.+-]+", "_", shown)
        exact = exact and plain == shown
        parts.append(f"{name if names.count(name) == 1 else key}={plain}")
    text = ",".join(parts)
    if exact and len(text) <= MAX_LABEL:
        return text
    mark = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:6]
    return f"{text[:MAX_LABEL]}-{mark}"
