"""Reads run folders and finds them."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import FAST_LOADER, as_mapping, parse_json, parse_yaml, read_json, read_text
from lightning_prompts.runs import names
from lightning_prompts.runs.configs import Settings, flat, seeds

# A folder with one of them is a run folder. Others write a config.yaml, too.
SIGNS = (names.ENVIRONMENT, names.METRICS, names.PREDICTIONS, names.BUDGET)
SEED_FOLDER = re.compile(r"seed-(\d+)")
INSIDE = {names.CHECKPOINTS, names.LOGS, "wandb"}  # folders in a run folder that hold no run


def method_folder(folder: Path) -> Path:
    """The absolute folder of a method: the run's own folder, or its parent if the run is one of several seeds."""
    place = folder.absolute()
    return place.parent if SEED_FOLDER.fullmatch(place.name) else place


def check_run_folder(folder: Path) -> None:
    """Raise a `UserError` if a folder has no config, so that it is no run folder."""
    if not (folder / names.CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml; give the folder that fit or test wrote")


def saved_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run folder holds: the best one, else the last one; ``None`` without any."""
    saved = folder / names.CHECKPOINTS
    return next((path for path in (saved / names.BEST, saved / names.LAST) if path.exists()), None)


@dataclass(frozen=True)
class Prediction:
    """A row of ``predictions.jsonl``.

    Args:
        split: The test set.
        question: The question.
        answer: The reference answer.
        generated: The LM's answer.
        nll: In nats per answer token; ``None`` without a reference.
        correct: 1 or 0; ``None`` without a reference.
        prompt: The question's own prompt, for methods that write one for each question.
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
    """A run folder. Each file is read on first use; a missing file gives ``None`` or an empty value.

    Every property raises a `UserError` that names the file if the file is damaged.

    Args:
        folder: The run folder.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """``config.yaml``."""
        return read_yaml(self.folder / names.CONFIG)

    @cached_property
    def settings(self) -> Settings | None:
        """The config as a flat list of settings."""
        return None if self.config is None else flat(self.config, str(self.folder / names.CONFIG))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Test metrics, ``test/NAME`` and ``test/SET/NAME``; computed from the predictions without a metrics.json."""
        found = self._numbers(names.METRICS)
        return _metrics(self.predictions or []) if found is None else found

    @cached_property
    def validation(self) -> dict[str, float]:
        """Metrics that ``validate`` measured, ``val/NAME``."""
        return self._numbers(names.VALIDATION) or {}

    @cached_property
    def predictions(self) -> list[Prediction] | None:
        """Answers on the test sets."""
        path = self.folder / names.PREDICTIONS
        rows = read_rows(path)
        return None if rows is None else [_prediction(row, path) for row in rows]

    @cached_property
    def tested(self) -> dict[str, Any] | None:
        """``checkpoint`` and ``step`` that ``test`` measured, both ``None`` for a prompt without a checkpoint."""
        return read_json(self.folder / names.TESTED)

    @property
    def tested_checkpoint(self) -> Path | None:
        """The file in ``checkpoints/`` that ``test`` measured; ``None`` for none, or one of another place."""
        place = Path(str((self.tested or {}).get("checkpoint")))
        return self.folder / place if place.parent == Path(names.CHECKPOINTS) else None

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Metrics logged during training: by name, the value after each number of steps."""
        found: dict[str, dict[int, float]] = {}
        for path in sorted((self.folder / names.LOGS).glob(f"version_*/{names.CURVES}"), key=_version):
            # Lightning counts steps from 0.
            rows = [{**row, "step": row["step"] + 1} for row in read_csv(path) if "step" in row]
            first = min((row["step"] for row in rows), default=math.inf)
            for points in found.values():  # a resumed run repeats the steps after its checkpoint
                for step in [step for step in points if step >= first]:
                    del points[step]
            for row in rows:
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        found.setdefault(name, {})[int(row["step"])] = value
        return {name: points for name, points in found.items() if points}

    @cached_property
    def budget(self) -> dict[str, float]:
        """What training cost: tokens, calls, seconds and more, see `lightning_prompts.callbacks.Budget`."""
        return self._numbers(names.BUDGET) or {}

    @property
    def results(self) -> dict[str, float]:
        """All metrics in one mapping: ``val/...``, ``test/...``, ``budget/...`` and ``seconds`` of the training."""
        costs = self.budget or ({} if self.trained else {"tokens": 0.0, "steps": 0.0})
        return {
            **self.validation,
            **self.metrics,
            **{f"budget/{name}": value for name, value in costs.items()},
            **(self._numbers(names.SECONDS) or {}),
        }

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Answers to the same few validation questions at each validation of the training."""
        return read_rows(self.folder / names.SAMPLES) or []

    @cached_property
    def readout(self) -> list[dict[str, Any]]:
        """The tokens nearest to the prompt at each validation."""
        return read_rows(self.folder / names.READOUT) or []

    @cached_property
    def path(self) -> list[dict[str, Any]]:
        """Projections of the prompt's vectors at each validation."""
        return read_rows(self.folder / names.PROMPT_PATH) or []

    @cached_property
    def text(self) -> str | None:
        """The prompt, where it is text."""
        return read_text(self.folder / names.PROMPT_TEXT)

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """The prompts that the method tried."""
        return read_rows(self.folder / names.CANDIDATES) or []

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        """Versions, machine and precision."""
        return read_json(self.folder / names.ENVIRONMENT)

    @property
    def home(self) -> Path:
        """See `method_folder`."""
        return method_folder(self.folder)

    @property
    def trained(self) -> bool:
        """Whether the run trained something, and did not only test it."""
        written = any((self.folder / name).is_dir() for name in (names.LOGS, names.CHECKPOINTS))
        return bool(self.budget) or written or (self.tested or {}).get("checkpoint") is not None

    @cached_property
    def seed(self) -> str | None:
        """The seed from the config, or else from the folder's name."""
        if self.settings is not None and (found := seeds(self.settings)):
            return "/".join(found)
        named = SEED_FOLDER.fullmatch(self.folder.name)
        return named[1] if named else None

    @cached_property
    def monitor(self) -> tuple[str, bool]:
        """The metric that chose the best checkpoint, and whether higher is better; NLL if the config names none."""
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

    def _numbers(self, name: str) -> dict[str, float] | None:
        """A JSON object of numbers."""
        path = self.folder / name
        found = read_json(path)
        if found is None:
            return None
        values = {key: number(found, key, path) for key in found}
        return {key: value for key, value in values.items() if value is not None}


def find(given: Path) -> list[Run]:
    """The run folders at and below a place.

    Raises:
        UserError: There are none.
    """
    if not given.is_dir():
        raise UserError(f"{given} is no folder; give run folders, or folders that hold run folders")
    found = []
    for place, folders, files in os.walk(given):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name in files for name in SIGNS):
            found.append(Run(Path(place)))
            folders[:] = [name for name in folders if name not in INSIDE]
    if not found:
        raise UserError(f"{given} holds no run: no folder in it has a {' or a '.join(SIGNS)}")
    return found


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; ``None`` if there is no file.

    Raises:
        UserError: The file holds no mapping.
    """
    text = read_text(path)
    return None if text is None else as_mapping(parse_yaml(text, path, FAST_LOADER), str(path))


def read_rows(path: Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON Lines file; ``None`` if there is no file.

    Raises:
        UserError: A line holds no object.
    """
    text = read_text(path)
    if text is None:
        return None
    # Not splitlines: generated text may hold Unicode line separators, which JSON does not escape.
    return [
        parse_json(line, f"{path} line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a table that Lightning's CSVLogger wrote, without empty cells.

    Raises:
        UserError: A cell is not a number.
    """
    rows = []
    for number, row in enumerate(csv.DictReader((read_text(path) or "").splitlines()), 2):
        try:
            cells = {name: float(cell) for name, cell in row.items() if name and cell}
            cells |= {name: int(cells[name]) for name in ("step",) if name in cells}
            rows.append(cells)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{path} line {number} is not a row of numbers: {error}") from error
    return rows


def number(row: dict[str, Any], name: str, where: Path) -> float | None:
    """A number of a row; ``None`` if the row does not have it.

    Raises:
        UserError: The value is not a number.
    """
    value = row.get(name)
    if value is None or isinstance(value, int | float):  # true and false are numbers, too
        return None if value is None else float(value)
    raise UserError(f"{where}: {name} must be a number, got {value!r}")


def _version(path: Path) -> tuple[int, str]:
    digits = path.parent.name.removeprefix("version_")
    return (int(digits) if digits.isdigit() else 0, digits)


def _prediction(row: dict[str, Any], path: Path) -> Prediction:
    for name in ("question", "answer"):
        if name not in row:
            raise UserError(f"{path}: a row has no {name}; test the run again")
    prompt = row.get("prompt")
    return Prediction(
        str(row.get("split", "test")),
        str(row["question"]),
        str(row["answer"]),
        str(row.get("generated", "")),
        number(row, "nll", path),
        number(row, "correct", path),
        None if prompt is None else str(prompt),
    )


def _metrics(rows: Sequence[Prediction]) -> dict[str, float]:
    """The means that ``test`` writes to ``metrics.json``."""
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
