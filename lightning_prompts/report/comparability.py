"""Comparability: whether methods ran with the same model, data and templates, other settings, and environments."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from lightning_prompts.report.data import Method, Task
from lightning_prompts.report.page import NONE, Block, Heading, Table, Text, lacking, side_by_side
from lightning_prompts.runs.configs import Settings, without_place, without_seeds
from lightning_prompts.runs.names import CONFIG, ENVIRONMENT

# The LM that answers, and those of a network's layers. An LM that proposes or judges is part of the method.
LM = re.compile(
    r"model(\.layers\.[^.]+)?\.lm\.(name|revision|dtype|quantization|calibrate_labels|server\.parameters\..+)"
)
# Data settings that are part of the method (its batches), or whose effect is compared instead (the test questions).
OWN = ("batch_size", "eval_batch_size", "balanced", "seed", "test", "predict")
TEMPLATE = ("template", "stop", "chat", "system")  # members of a mixture use the mixture's own
FILES = ("train", "val")
MOST = 60  # characters of a value
UNSET = "not set"
DTYPE = "the dtype that ran"


def unequal_settings(task: Task) -> list[str]:
    """Write a sentence about each setting that should be the same for all methods of a task, and is not."""
    found = []
    for method in task.methods:
        run = next((run for run in method.runs if run.settings), None)
        if run is not None and run.settings is not None:
            ran = (run.environment or {}).get("dtype")  # what "auto" stood for
            found.append((method.name, run.settings if ran is None else {**run.settings, DTYPE: ran}))
    keys = list(dict.fromkeys(key for _, settings in found for key in settings))
    # Datamodules of two classes differ in all settings; naming the classes is enough.
    lines = _difference("data", found) or [line for key in keys if _of_data(key) for line in _difference(key, found)]
    lines += [line for key in keys if LM.fullmatch(key) for line in _difference(key, found)]
    return lines if any(".dtype is " in line for line in lines) else lines + _difference(DTYPE, found)


def _of_data(key: str) -> bool:
    place, _, name = key.rpartition(".")
    return place.split(".")[0] == "data" and name not in OWN and not (".members." in key and name in TEMPLATE)


def _difference(key: str, found: Sequence[tuple[str, Settings]]) -> list[str]:
    """Write a sentence about which methods have which value; none where all have the same."""
    users: dict[str, list[str]] = {}
    for name, settings in found:
        users.setdefault(_value(key, settings.get(key)), []).append(name)
    if len(users) < 2:
        return []
    parts = [
        f"{value if len(value) <= MOST else value[: MOST - 1] + '…'} for {', '.join(names)}"
        for value, names in users.items()
    ]
    # Long values are cut, so two that begin alike would look the same.
    alike = len({part.partition(" for ")[0] for part in parts}) < len(parts)
    return [f"{key} is {'; '.join(parts)}{' (these begin alike)' if alike else ''}."]


def _value(key: str, value: object) -> str:
    """Write a value in one line, values of the same meaning in the same way."""
    name = key.rpartition(".")[2]
    if value is None or value is False or value in ("", [], {}) or (name == "quantization" and value == "none"):
        return UNSET
    if isinstance(value, str) and name in FILES:
        return str(without_place(os.path.abspath(value)))
    if isinstance(value, str) and name == "stop":
        value = value.replace("\n", r"\n")  # the same as a regular expression
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False)[1:-1]


def config_differences(tasks: Sequence[Task]) -> list[Block]:
    """The settings that differ, task by task."""
    blocks: list[Block] = []
    for task in tasks:
        known = [(method, found) for method in task.methods if (found := _settings(method))]
        without = lacking(CONFIG, task.lacking(lambda run: run.settings is not None))
        keys = list(dict.fromkeys(key for _, settings in known for key in settings))
        differing = [key for key in keys if _differs([settings for _, settings in known], key)]
        if len(tasks) > 1 and (differing or without):
            blocks.append(Heading(task.name, 3))
        for part in side_by_side(known) if differing else ():
            rows = [[key, *(_cell(settings, key) for _, settings in part)] for key in differing]
            rows = [row for row in rows if set(row[1:]) != {NONE}]
            blocks.append(Table(["setting", *(method.name for method, _ in part)], rows, texts=1 + len(part)))
        blocks += without
        if not without and not differing and len(known) > 1:
            blocks.append(Text(f"{task.name}: the configs are the same.", "note"))
    intro = (
        "Settings in which the methods' configs differ. Seeds and folders are left out, and so are settings that one "
        "method lacks and the others have switched off."
    )
    return [Text(intro), *blocks] if blocks else []


def _settings(method: Method) -> Settings | None:
    """The settings, and whether something was trained: a config can be tested without training, too."""
    run = next((run for run in method.runs if run.settings), None)
    return {"trained": run.trained, **without_seeds(run.settings or {})} if run else None


def _differs(configs: Sequence[Settings], key: str) -> bool:
    """Whether configs differ in a setting; one that is missing equals one that is off."""
    found = {_cell(settings, key) for settings in configs if settings.get(key) not in (None, False, "", 0)}
    return len(found) > 1 or (len(found) == 1 and any(not settings.get(key) for settings in configs))


def _cell(settings: Settings, key: str) -> str:
    """Write a setting, its numbers with at most six digits."""
    value = settings.get(key, NONE)
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False, default=str)
    short = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return json.dumps(short, ensure_ascii=False)


def environments(methods: Sequence[Method]) -> list[Block]:
    """Each different environment once, and the methods that ran in it."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    without = []
    for name, run in [(method.name, run) for method in methods for run in method.runs]:
        if run.environment is None:
            without.append(name)
        else:
            found.setdefault(json.dumps(run.environment, sort_keys=True), (run.environment, []))[1].append(name)
    blocks: list[Block] = []
    keys = list(dict.fromkeys(key for environment, _ in found.values() for key in environment))
    for part in side_by_side(list(found.values())):
        alone = len(found) == 1 and not without
        header = ["", *("all" if alone else ", ".join(dict.fromkeys(names)) for _, names in part)]
        rows = [[key, *(_cell(environment, key) for environment, _ in part)] for key in keys]
        blocks.append(Table(header, rows, texts=len(header)))
    blocks += lacking(ENVIRONMENT, list(dict.fromkeys(without)))
    return blocks
