"""Comparability: whether methods ran with the same model, data type, data and templates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from lightning_prompts.report.data import Task
from lightning_prompts.runs.configs import Settings

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
        return os.path.abspath(value)
    if isinstance(value, str) and name == "stop":
        value = value.replace("\n", r"\n")  # the same as a regular expression
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False)[1:-1]
