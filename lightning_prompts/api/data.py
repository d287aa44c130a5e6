"""Data of the Python API as the command line takes it: a config, and files with the rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from lightning_prompts.api.plain import is_yaml, path_of, plain_value
from lightning_prompts.cli.classes import settings_of, subclasses
from lightning_prompts.datamodules import QuestionAnswer, TextDataModule
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import write_atomic
from lightning_prompts.methods.settings import CLASS, SETTINGS

Data: TypeAlias = Any  # a datamodule, the name of one, a YAML file, or rows: dicts, a DataFrame or a Dataset
ROWS = ("train", "val", "test", "predict")  # settings of `QuestionAnswer` that name a file, or hold rows in Python


def module_of(data: Data) -> Data:
    """Data with rows in Python as a datamodule."""
    return data if isinstance(data, str | Path | TextDataModule) else QuestionAnswer.from_rows(data)


def data_settings(data: Data) -> tuple[dict[str, Any], list[str]]:
    """The config and the files that name the data."""
    if isinstance(data, str | Path):
        if is_yaml(data):
            return {}, [str(data)]
        kinds = {kind.__name__: kind for kind in subclasses(TextDataModule)}
        if data not in kinds:
            raise UserError(f"unknown dataset {str(data)!r}; {nearest(str(data), kinds)}")
        return {"data": {CLASS: path_of(kinds[str(data)]), SETTINGS: {}}}, []
    return {"data": _config(module_of(data))}, []


def _config(module: TextDataModule) -> dict[str, Any]:
    """A datamodule as plain data, with all its settings, so that none of another config remains.

    Rows in Python stand under their split, for `with_files`.
    """
    known = settings_of(type(module))
    given = {name: value for name, value in module.settings.items() if name in known}
    if isinstance(module, QuestionAnswer):
        given |= module.tables()
    plain = {name: _members(value) if name == "members" else plain_value(name, value) for name, value in given.items()}
    return {CLASS: path_of(type(module)), SETTINGS: plain}


def _members(value: Any) -> dict[str, Any]:  # noqa: ANN401 - the datasets of a mixture by name
    return {name: _config(one) if isinstance(one, TextDataModule) else one for name, one in value.items()}


def with_files(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config of data with files in place of rows in Python. The same rows have the same file, and no other rows."""
    settings: dict[str, Any] = {}
    for name, value in config[SETTINGS].items():
        if name == "members":
            settings[name] = {
                key: with_files(one, folder) if isinstance(one, dict) else one for key, one in value.items()
            }
        elif name in ROWS and isinstance(value, list):
            text = "".join(json.dumps(row, default=str) + "\n" for row in value)
            file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
            if not file.exists():
                write_atomic(file, text)
            settings[name] = str(file)
        else:
            settings[name] = value
    return {**config, SETTINGS: settings}
