"""Whether methods were compared on equal terms: the same model, data and templates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from lightning_prompts.report.blocks import Block, Text
from lightning_prompts.report.methods import Task
from lightning_prompts.runs.configs import Settings

# The LM that answers, and those of a network's layers; who proposes or judges is a method's own affair.
LM = re.compile(r"model(\.layers\.[^.]+)?\.lm\.(name|revision|quantization|calibrate_labels|server\.parameters\..+)")
# Settings of data that are a method's own affair (its batches), or are compared by what they lead to (test questions).
OWN = ("batch_size", "eval_batch_size", "balanced", "seed", "test", "predict")
TEMPLATE = ("template", "stop", "chat", "system")  # of a mixture's members, which have the mixture's own instead
FILES = ("train", "val")
MOST = 60  # characters of a value
UNSET = "not set"


def terms(task: Task) -> list[Block]:
    """A line about each setting in which methods of a task ought not to differ, and do; nothing where none does."""
    found: list[tuple[str, Settings]] = []
    for method in task.methods:
        settings = next((run.settings for run in method.runs if run.settings), None)
        if settings is not None:
            found.append((method.name, settings))
    keys = list(dict.fromkeys(key for _, settings in found for key in settings))
    # Datamodules of two classes differ in all settings, and that in one word.
    lines = _difference("data", found) or [line for key in keys if _of_data(key) for line in _difference(key, found)]
    lines += [line for key in keys if LM.fullmatch(key) for line in _difference(key, found)]
    return [Text(f"Mind that these methods were not compared on equal terms. {' '.join(lines)}")] if lines else []


def _of_data(key: str) -> bool:
    place, _, name = key.rpartition(".")
    return place.split(".")[0] == "data" and name not in OWN and not (".members." in key and name in TEMPLATE)


def _difference(key: str, found: Sequence[tuple[str, Settings]]) -> list[str]:
    """A sentence about who has which value; none where all have the same."""
    users: dict[str, list[str]] = {}
    for name, settings in found:
        users.setdefault(_value(key, settings.get(key)), []).append(name)
    if len(users) < 2:
        return []
    parts = [f"{value if len(value) <= MOST else value[: MOST - 1] + '…'} for {', '.join(names)}"
             for value, names in users.items()]  # fmt: skip
    # Where long values begin alike, what is shown of them would seem the same.
    alike = len({part.partition(" for ")[0] for part in parts}) < len(parts)
    return [f"{key} is {'; '.join(parts)}{' (these begin alike)' if alike else ''}."]


def _value(key: str, value: object) -> str:
    """A value in one line; what means the same is the same."""
    name = key.rpartition(".")[2]
    if value is None or value is False or value in ("", [], {}) or (name == "quantization" and value == "none"):
        return UNSET
    if isinstance(value, str) and name in FILES:
        return os.path.abspath(value)
    if isinstance(value, str) and name == "stop":
        value = value.replace("\n", r"\n")  # the same as a regular expression
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False)[1:-1]
