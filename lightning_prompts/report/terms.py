"""Whether methods were compared on equal terms: the same model, data and scoring."""

from __future__ import annotations

import json

from lightning_prompts.report.blocks import Block, Text
from lightning_prompts.report.configs import Settings
from lightning_prompts.report.methods import Task

MODEL = (
    "name", "revision", "dtype", "quantization", "calibrate_labels", "server.base_url", "server.chat",
    "server.parameters",
)  # fmt: skip
# Settings of data that are a method's own affair (its batches), or are compared by what they lead to (test questions).
OWN = ("batch_size", "eval_batch_size", "balanced", "seed", "test", "predict")
MOST = 60  # characters of a value


def terms(task: Task) -> list[Block]:
    """A line about each setting in which methods of a task ought not to differ, and do; nothing where none does."""
    found: list[tuple[str, Settings]] = []
    for method in task.methods:
        settings = next((run.settings for run in method.runs if run.settings), None)
        if settings is not None:
            found.append((method.name, settings))
    keys = [key for key in dict.fromkeys(key for _, settings in found for key in settings) if _is_term(key)]
    lines = []
    for key in keys:
        users: dict[str, list[str]] = {}
        for name, settings in found:
            users.setdefault(_value(settings.get(key)), []).append(name)
        if len(users) > 1:
            lines.append(f"{key} is " + "; ".join(f"{value} for {', '.join(names)}" for value, names in users.items()))
    if not lines:
        return []
    return [Text(f"Mind that these methods were not compared on equal terms. {'. '.join(lines)}.")]


def _is_term(key: str) -> bool:
    if key.startswith("data."):
        return key.rpartition(".")[2] not in OWN
    return key in [f"model.lm.{name}" for name in MODEL] or key == "model.max_new_tokens"


def _value(value: object) -> str:
    """A value as it would be given; what is off, empty or left out is all the same."""
    if value in (None, False, "", 0):
        return "off"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return line if len(line) <= MOST else f"{line[: MOST - 1]}…"
