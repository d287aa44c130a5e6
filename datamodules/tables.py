"""Reading tables: JSON, JSON Lines, CSV, TSV or Parquet. A value is what the file has, or the file is refused."""

from __future__ import annotations

import csv
import io
import json
import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import read_text
from lightning_prompts.template import as_text, missing

log = logging.getLogger(__name__)

# How pandas and others write a missing value as text.
MISSING = {"<NA>", "#N/A", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null"}
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories of characters that leave no mark on paper
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # which count as letters and symbols, and leave none either
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, by its ending.

    Raises:
        UserError: The file is missing, of another kind, or not readable as its ending says; it names a column twice, or
            a row of it has more or fewer values than the header names.
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
        rows = _read_parquet(path)
    else:
        text = read_text(path) or ""
        rows = _read_json(text, path) if kind == "json" else _read_csv(text, path)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, bool):  # as JSON writes it, and not as Python does
                row[name] = str(value).lower()
    return rows


def _looks_like_json(path: Path) -> bool:
    """Whether a file of an unknown ending starts as JSON does."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


class _Number(float):
    """A number that is written as the file has it: 1.50 and 0.00001, not 1.5 and 1e-05."""

    written: str

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


def _integer(written: str) -> int | _Number:
    """Not 0 for -0; and Python reads no more than 4,300 digits."""
    return _Number(written) if written == "-0" or len(written) > 4000 else int(written)


def _read_json(text: str, path: Path) -> list[dict[str, Any]]:
    rows: Any = None
    if path.suffix.lower() == ".json":
        with suppress(_NotJsonError) if not text.lstrip().startswith("[") else nullcontext():
            rows = _rows_of(_parsed(text, path), path)
    if rows is None:
        rows = [
            _parsed(line, path, number)
            for number, line in enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028 and others
            if line.strip()
        ]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is a {type(row).__name__}, not an object with fields")
    return list(rows)


def _rows_of(document: object, path: Path) -> list[Any]:
    """The rows of a JSON document: a list; an object with a list of rows, as benchmarks have it; or one row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}, not rows")
    if isinstance(examples := document.get("examples"), list):
        return examples
    lists = {name: value for name, value in document.items() if isinstance(value, list) and value}
    tables = {name: value for name, value in lists.items() if isinstance(value[0], dict)}  # not {"keywords": ["x"]}
    if len(tables) > 1:
        raise UserError(f"{path} has rows under several keys ({', '.join(tables)}); write each into a file of its own")
    return next(iter(tables.values()), [document])


def _parsed(text: str, path: Path, line: int | None = None) -> Any:  # noqa: ANN401
    """What JSON text holds; ``line`` is its own, or else it is counted."""
    where = f"{path} line {line}" if line else str(path)
    try:
        return json.loads(text, parse_float=_Number, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{path}: line {line or error.lineno} is not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply to be a table") from error
    except UserError as error:  # a key twice
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from error


class _NotJsonError(UserError):
    """The text is no JSON; it may be JSON Lines."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must differ."""
    if (name := _twice([name for name, _ in pairs])) is not None:
        values = [short(value) for key, value in pairs if key == name]
        raise UserError(f"the key {name!r} comes twice in an object ({' and '.join(values)}); keep one")
    return dict(pairs)


def _twice(names: Sequence[str]) -> str | None:
    """A name that comes more than once."""
    return next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if (name := _twice([name for name in names if name])) is not None:  # columns without a name are nobody's
        raise UserError(f"{path} names the column {name!r} twice; rename or remove one")


def _read_csv(text: str, path: Path) -> list[dict[str, Any]]:
    """CSV or TSV, every field as it stands: no number parsing, "NA" is a word."""
    mark = "\t" if path.suffix.lower() == ".tsv" else ","
    source = io.StringIO(text.lstrip("\n"))
    rows: list[dict[str, Any]] = []
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        header = next(csv.reader(source, delimiter=mark, strict=True), [])
        names = [name.strip() for name in header]
        _check_columns(path, names)
        padded = names != header  # "question, answer" says that the values stand between spaces as well
        for values in csv.reader(source, delimiter=mark, strict=True, skipinitialspace=padded):
            where = f"{path} row {len(rows) + 1}"
            if not values or (len(values) == 1 < len(names) and not values[0].strip()):
                continue  # an empty line
            if len(values) != len(names):
                told = ", ".join(names if len(names) <= 8 else [*names[:8], "..."])
                raise UserError(
                    f"{where} has {len(values)} value{'s' if len(values) > 1 else ''}, but the header names "
                    f"{len(names)} ({told}); write a value that holds {'a tab' if mark != ',' else 'a comma'} in quotes"
                )
            if len(values) > 1 and [value.strip("\ufeff ") for value in values] == names:
                raise UserError(f"{where} repeats the header; if files were joined, remove it")
            if any("\n" in value and _holds_rows(value, mark, len(names)) for value in values):
                log.warning("%s has a value of several lines that look like rows: is a quote not closed?", where)
            if padded:
                values = [value.strip() for value in values]
            rows.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise UserError(
            f"{path} row {len(rows) + 1} is not readable as {path.suffix[1:].upper()} ({error}); write a value that "
            "starts with a quote in quotes, and each quote in it twice"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _holds_rows(value: str, mark: str, columns: int) -> bool:
    """Whether a quoted value seems to have swallowed rows, since a quote in an earlier one is not closed."""
    inner = value.split("\n")[1:-1]
    rows_in_csv = len(inner) > 1 and columns > 1 and all(line.count(mark) == columns - 1 for line in inner)
    return rows_in_csv or (mark == "\t" and mark in value)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        _check_columns(path, table.column_names)
        for index, field in enumerate(table.schema):
            if field.type == "float":  # of 32 bits: 0.1 is 0.1 there as well
                column = table[index].cast("string").cast("float64")
                table = table.set_column(index, field.name, column)
        return list(table.to_pylist())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not readable as parquet: {' '.join(str(error).split())[:200]}") from error


def blank(value: object) -> bool:
    """Whether a field has nothing in it."""
    return missing(value) or all(
        unicodedata.category(character) in UNSEEN or character in FILLERS for character in str(value)
    )


def check_fields(where: str, raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise unless a row has these fields, with a text or a number in each.

    Args:
        where: The row, for the error message.
        raw: Its fields.
        names: Those that it must have.

    Raises:
        UserError: One is missing, empty, or no text.
    """
    for name in names:
        if name not in raw:
            raise UserError(f"{where} has no field {name!r}; {nearest(name, list(raw))}")
        if blank(raw[name]):
            raise UserError(f"{where}: field {name!r} is empty")
        as_text(raw[name], name, where)


def read_header(path: Path) -> dict[str, Any]:
    """What a JSON file says beside its rows (``{"task_prefix": ..., "examples": [...]}``); nothing in other files."""
    if path.suffix.lower() != ".json":
        return {}
    try:
        document = _parsed(read_text(path) or "", path)
    except _NotJsonError:  # JSON Lines, as `read_table` found
        return {}
    return document if isinstance(document, dict) else {}
