"""Reading tables: JSON, JSON Lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import check_text

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
    if kind == "parquet":
        _check_parquet(path)
    else:
        check_text(path)
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
        with suppress(_NotJsonError) if not text.lstrip().startswith("[") else nullcontext():
            rows = _parsed(text, path)
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
                rows.append(_parsed(line, path, number))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is a {type(row).__name__}, not an object with fields")
    return list(rows)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:  # noqa: ANN401
    """What JSON text holds; ``line`` is its own, or else it is counted."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{path}: line {line or error.lineno} is not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{path}: {f'line {line}' if line else 'it'} is nested too deeply to be a table") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{path}: {f'line {line}: ' if line else ''}{' '.join(str(error).split())[:120]}") from error


class _NotJsonError(UserError):
    """The text is no JSON; it may be JSON Lines."""


def _check_parquet(path: Path) -> None:
    """Look at the marks at both ends, ahead of readers that log what they trip over."""
    with path.open("rb") as file:
        begins = file.read(4)
        file.seek(-min(4, path.stat().st_size), 2)
        if (begins, file.read(4)) != (b"PAR1", b"PAR1"):
            raise UserError(f"{path} is not readable as parquet: it is cut off, or of another kind")


def _read_with_datasets(path: Path, kind: str) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is told below
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
