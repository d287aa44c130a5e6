"""Reading tables: JSON, JSON Lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError, nearest

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, by its ending.

    Raises:
        UserError: The file is missing, of another kind, or not readable as its ending says.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None and _looks_like_json(path):
        kind = "json"
    if kind is None:
        raise UserError(f"{path}: the ending must be one of {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return _read_json(path) if kind == "json" else _read_with_datasets(path, kind)


def _looks_like_json(path: Path) -> bool:
    """Whether a file of an unknown ending starts as JSON does."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def _read_json(path: Path) -> list[dict[str, Any]]:
    """JSON by the standard library, which leaves every value as it stands; table readers turn dates into timestamps."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    rows: Any = None
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except RecursionError as error:
            raise UserError(f"{path} is nested too deeply to be a table") from error
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                raise UserError(f"{path}: line {error.lineno} is not valid JSON ({error.msg})") from error
        if isinstance(rows, dict):  # {"examples": [...]}, as benchmarks have it; or one row
            lists = [value for value in rows.values() if isinstance(value, list)]
            tables = [value for value in lists if value and isinstance(value[0], dict)]  # and not {"keywords": [...]}
            rows = next(iter(tables or lists), [rows])
        if rows is not None and not isinstance(rows, list):
            raise UserError(f"{path} holds a {type(rows).__name__}, not rows")
    if rows is None:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number} is not valid JSON ({error.msg})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is a {type(row).__name__}, not an object with fields")
    return list(rows)


def _read_with_datasets(path: Path, kind: str) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    options: dict[str, Any] = {}
    if kind == "csv":  # every field as it stands: no number parsing, "NA" is a word
        mark = "\t" if path.suffix.lower() == ".tsv" else ","
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file, delimiter=mark)
            names = next(reader, [])
            if next(reader, None) is None:
                return []
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options = {"features": features, "keep_default_na": False, "sep": mark, "encoding": "utf-8-sig"}
    try:
        return list(datasets.load_dataset(kind, data_files=str(path), split="train", **options))
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{path} is not readable as {kind}: {' '.join(str(cause).split())[:200]}") from error


def blank(value: object) -> bool:
    """Whether a field has nothing in it."""
    return value is None or not str(value).strip()


def check_fields(where: str, raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise unless a row has these fields, with a text or a number in each.

    Args:
        where: The row, for the error message.
        raw: Its fields.
        names: Those that it must have.

    Raises:
        UserError: One is missing, empty, or a list.
    """
    for name in names:
        if name not in raw:
            raise UserError(f"{where} has no field {name!r}; {nearest(name, list(raw))}")
        if blank(raw[name]):
            raise UserError(f"{where}: field {name!r} is empty")
        if isinstance(raw[name], list | dict):
            raise UserError(f"{where}: field {name!r} is a {type(raw[name]).__name__}, not a text")


def read_header(path: Path) -> dict[str, Any]:
    """What a JSON file says beside its rows (``{"task_prefix": ..., "examples": [...]}``); nothing in other files."""
    if path.suffix.lower() != ".json":
        return {}
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig", errors="replace"))
    except json.JSONDecodeError:  # JSON Lines, as `read_table` found
        return {}
    return document if isinstance(document, dict) else {}
