"""Run folders: what a run has left, and where runs are."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import read_json, read_text
from lightning_prompts.report.configs import Settings, flat, seeds
from lightning_prompts.report.reading import number, read_csv, read_rows, read_yaml

SIGNS = ("config.yaml", "metrics.json", "predictions.jsonl", "budget.json")  # one of them makes a folder a run folder
SEED_FOLDER = re.compile(r"seed-(\d+)")
PASSED_BY = {"checkpoints", "logs", "states"}


def method_folder(folder: Path) -> Path:
    """The folder that stands for a method, absolute: that of a run, or the one that the runs of its seeds are in."""
    place = folder.absolute()
    return place.parent if SEED_FOLDER.fullmatch(place.name) else place


@dataclass(frozen=True)
class Prediction:
    """A row of ``predictions.jsonl``.

    Args:
        split: The test set.
        question: The question.
        answer: The reference answer.
        generated: What the LM has answered.
        nll: In nats per answer token; ``None`` without a reference.
        correct: 1 or 0; ``None`` without a reference.
        prompt: The question's own prompt, where the method has written one.
    """

    split: str
    question: str
    answer: str
    generated: str
    nll: float | None
    correct: float | None
    prompt: str | None = None


@dataclass(frozen=True)
class Run:
    """A run folder. Files are read when they are asked for; what is not there is ``None`` or empty.

    Args:
        folder: Where it is.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """What was run."""
        return read_yaml(self.folder / "config.yaml")

    @cached_property
    def settings(self) -> Settings | None:
        """The config as a flat list of settings."""
        return None if self.config is None else flat(self.config, str(self.folder / "config.yaml"))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """``test/NAME`` and ``test/SET/NAME``; made from the predictions where there is no ``metrics.json``."""
        path = self.folder / "metrics.json"
        found = read_json(path)
        if found is not None:
            values = {name: number(found, name, path) for name in found}
            return {name: value for name, value in values.items() if value is not None}
        return _metrics(self.predictions or [])

    @cached_property
    def predictions(self) -> list[Prediction] | None:
        """What was answered on the test sets."""
        path = self.folder / "predictions.jsonl"
        rows = read_rows(path)
        if rows is None:
            return None
        return [_prediction(row, path) for row in rows]

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """What was logged in training: a value for each name by how many steps were done."""
        found: dict[str, dict[int, float]] = {}
        for path in sorted((self.folder / "logs").glob("version_*/metrics.csv"), key=_version):
            rows = [{**row, "step": row["step"] + 1} for row in read_csv(path) if "step" in row]  # counted from 0 there
            first = min((row["step"] for row in rows), default=math.inf)
            for points in found.values():  # a resumed run has done these again
                for step in [step for step in points if step >= first]:
                    del points[step]
            for row in rows:
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        found.setdefault(name, {})[int(row["step"])] = value
        return {name: points for name, points in found.items() if points}

    @cached_property
    def budget(self) -> dict[str, float]:
        """What training has cost."""
        path = self.folder / "budget.json"
        found = read_json(path) or {}
        values = {name: number(found, name, path) for name in found}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Answers to the same few validation questions as training went on."""
        return read_rows(self.folder / "samples.jsonl") or []

    @cached_property
    def readout(self) -> list[dict[str, Any]]:
        """The tokens nearest to the prompt at every validation."""
        return read_rows(self.folder / "prompt.jsonl") or []

    @cached_property
    def path(self) -> list[dict[str, Any]]:
        """Where the prompt's vectors were at every validation."""
        return read_rows(self.folder / "prompt_path.jsonl") or []

    @cached_property
    def text(self) -> str | None:
        """The prompt, where it is text."""
        return read_text(self.folder / "prompt.txt")

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """The prompts that were tried."""
        return read_rows(self.folder / "prompts.jsonl") or []

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        """What it was run with."""
        return read_json(self.folder / "environment.json")

    @property
    def home(self) -> Path:
        """See `method_folder`."""
        return method_folder(self.folder)

    @property
    def trained(self) -> bool:
        """Whether anything was trained, or only tested."""
        return bool(self.budget) or (self.folder / "logs").is_dir() or (self.folder / "checkpoints").is_dir()

    @cached_property
    def seed(self) -> str | None:
        """The seed: of the config, or else of the folder's name; ``None`` where neither says it."""
        if self.settings is not None and (found := seeds(self.settings)):
            return "/".join(found)
        named = SEED_FOLDER.fullmatch(self.folder.name)
        return named[1] if named else None

    @cached_property
    def monitor(self) -> tuple[str, bool]:
        """By what the best checkpoint was chosen, and whether more is better; NLL where the config does not say."""
        settings = self.settings or {}
        for name, metric in settings.items():
            place = name.removesuffix(".monitor")
            if place != name and settings.get(place) == "ModelCheckpoint" and isinstance(metric, str):
                return metric, settings.get(f"{place}.mode") == "max"
        return "val/nll", False

    @property
    def class_name(self) -> str | None:
        """The method's class."""
        return self._setting("model")

    @property
    def data_name(self) -> str | None:
        """The datamodule's class."""
        return self._setting("data")

    def _setting(self, name: str) -> str | None:
        value = (self.settings or {}).get(name)
        return value if isinstance(value, str) else None


def find(given: Path) -> list[Run]:
    """The run folders at and below a place.

    Raises:
        UserError: There are none.
    """
    if not given.is_dir():
        raise UserError(f"{given} is no folder; give run folders, or folders that hold run folders")
    found = []
    for place, folders, files in os.walk(given):
        folders[:] = sorted(name for name in folders if name not in PASSED_BY and not name.startswith("."))
        if any(name in files for name in SIGNS):
            found.append(Run(Path(place)))
    if not found:
        raise UserError(f"{given} holds no run: no folder in it has a {' or a '.join(SIGNS)}")
    return found


def _version(path: Path) -> tuple[int, str]:
    digits = path.parent.name.removeprefix("version_")
    return (int(digits) if digits.isdigit() else 0, digits)


def _prediction(row: dict[str, Any], path: Path) -> Prediction:
    for name in ("question", "answer"):
        if name not in row:
            raise UserError(f"{path}: a row has no {name}; test the run again")
    prompt = row.get("prompt")
    return Prediction(
        str(row.get("split", "test")), str(row["question"]), str(row["answer"]), str(row.get("generated", "")),
        number(row, "nll", path), number(row, "correct", path), None if prompt is None else str(prompt),
    )  # fmt: skip


def _metrics(rows: Sequence[Prediction]) -> dict[str, float]:
    """The means that ``test`` would have written."""
    found: dict[str, float] = {}
    for split in dict.fromkeys(row.split for row in rows):
        mine = [row for row in rows if row.split == split]
        for name, values in (
            ("nll", [row.nll for row in mine if row.nll is not None]),
            ("exact_match", [row.correct for row in mine if row.correct is not None]),
        ):
            if values:
                found[f"{split}/{name}"] = sum(values) / len(values)
        found[f"{split}/examples"] = float(len(mine))
    return found
