r"""Where rows come from: files (JSON, JSON Lines, CSV, TSV, Parquet), Python, the hub, and the tables shipped with us.

A value is kept as the source has it, or the source is rejected with a `UserError`. In CSV and TSV, line breaks become
``\n``, and spaces after the separator are left out if the header has some, too.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import read_text
from lightning_prompts.template import as_text, missing

log = logging.getLogger(__name__)

# Texts that pandas and other programs write for a missing value.
MISSING = {"<NA>", "#N/A", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null"}
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories of invisible characters
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # invisible characters of other categories
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class RawRow:
    """A row as its source has it.

    Attributes:
        source: For error messages (``"train.jsonl row 12"``).
        fields: The fields by name.
        file: The local file of the row; ``None`` for rows from elsewhere.
    """

    source: str
    fields: Mapping[str, Any]
    file: Path | None = None


def file_path(name: str, value: object) -> Path | None:
    """Check the setting of a file.

    Args:
        name: The setting without ``data.``.
        value: A path; ``None`` or an empty text for no file.

    Raises:
        UserError: The value is something else, such as rows in Python.
    """
    if value is None or isinstance(value, str | os.PathLike):
        return Path(value) if value else None
    raise UserError(
        f"data.{name} must be the path of a file, got a {type(value).__name__}; give rows in Python to "
        "QuestionAnswer.from_rows"
    )


def read_rows(path: Path) -> list[RawRow]:
    """Read the rows of a local file.

    Raises:
        UserError: The file has no rows; see also `read_table`.
    """
    table = read_table(path)
    if not table:
        raise UserError(f"{path} has no rows")
    return [RawRow(f"{path} row {number}", fields, path) for number, fields in enumerate(table, start=1)]


def rows_in_python(rows: Any, split: str) -> list[RawRow]:
    """Take rows from Python, with the values that a file of the same rows gives.

    Args:
        rows: A list of dicts, a pandas DataFrame or a ``datasets.Dataset``.
        split: The split of the rows, for error messages.

    Raises:
        UserError: It is something else, has no rows, or names a column twice.
    """
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # loaded if ``rows`` is one of theirs
    table: list[Any]
    if pandas and isinstance(rows, pandas.DataFrame):
        _check_columns(f"{split} data", list(map(str, rows.columns)))
        columns = [_column(rows.iloc[:, index]) for index in range(rows.shape[1])]
        table = [dict(zip(rows.columns, values, strict=True)) for values in zip(*columns, strict=True)]
    elif datasets and isinstance(rows, datasets.Dataset):
        table = _rows_of_arrow(rows.with_format("arrow")[:])
    elif isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        table = list(rows)
    else:
        several = datasets and isinstance(rows, datasets.DatasetDict)
        advice = f"; give one of its splits: {', '.join(rows)}" if several else ""
        raise UserError(
            f"{split} rows must be a list of dicts, a pandas DataFrame or a datasets.Dataset, got a "
            f"{type(rows).__name__}{advice}"
        )
    if not table:
        raise UserError(f"{split} data has no rows")
    for number, row in enumerate(table, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"{split} row {number} is a {type(row).__name__}, not a dict with fields")
    return [
        RawRow(f"{split} row {number}", {str(name): _plain(value) for name, value in row.items()})
        for number, row in enumerate(table, start=1)
    ]


def _column(series: Any) -> list[Any]:
    """Return the values of a pandas column."""
    return list(series.to_numpy() if series.dtype == "float32" else series)


def _plain(value: object) -> object:
    """Return a value of NumPy, pandas or Python as a file of the same rows gives it."""
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas
        return None
    if isinstance(value, np.floating) and not isinstance(value, float):  # a float32 of 0.1 is 0.1
        return float(str(value))
    if isinstance(value, np.generic):
        value = value.item()
    return str(value).lower() if isinstance(value, bool) else value


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file by its ending.

    Raises:
        UserError: The file is missing, has another ending or does not match it; it names a column twice, or a row has
            more or fewer values than the header.
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
            if isinstance(value, bool):  # as JSON writes it
                row[name] = str(value).lower()
    return rows


def _looks_like_json(path: Path) -> bool:
    """Return whether a file of an unknown ending starts like JSON."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


class _Number(float):
    """A number whose text is that of the file: 1.50 and 0.00001, not 1.5 and 1e-05."""

    written: str

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


def _integer(written: str) -> int | _Number:
    """Keep -0, and integers beyond the 4,300 digits that Python reads, as they are written."""
    return _Number(written) if written == "-0" or len(written) > 4000 else int(written)


def _read_json(text: str, path: Path) -> list[dict[str, Any]]:
    lines = [  # not splitlines: JSON may hold U+2028 and others
        (number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not lines:
        return []
    kind, listed = path.suffix.lower(), text.lstrip().startswith("[")
    # A document in several lines has no first line that is JSON by itself, as the rows of JSON Lines are.
    if kind == ".json" and not listed:
        whole = len(lines) == 1 or not _is_json(lines[0][1], path)
    else:
        whole = listed and kind != ".jsonl"
    rows = _rows_of(_parsed(text, path), path) if whole else [_parsed(line, path, number) for number, line in lines]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is a {type(row).__name__}, not an object with fields")
    return list(rows)


def _rows_of(document: object, path: Path) -> list[Any]:
    """Find the rows of a JSON document: a list, an object with a list of rows (as in benchmarks), or one row."""
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


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Parse JSON; ``line`` is the line of the text in the file, for error messages."""
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
    """The text is not JSON."""


def _is_json(text: str, path: Path) -> bool:
    with suppress(_NotJsonError):
        _parsed(text, path)
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, whose keys must differ."""
    if (name := _twice([name for name, _ in pairs])) is not None:
        values = [short(value) for key, value in pairs if key == name]
        raise UserError(f"the key {name!r} comes twice in an object ({' and '.join(values)}); keep one")
    return dict(pairs)


def _twice(names: Sequence[str]) -> str | None:
    """Return a name that occurs more than once."""
    return next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None


def _check_columns(path: Path | str, names: Sequence[str]) -> None:
    if (name := _twice([name for name in names if name])) is not None:  # unnamed columns are not used
        raise UserError(f"{path} names the column {name!r} twice; rename or remove one")


def _read_csv(text: str, path: Path) -> list[dict[str, Any]]:
    """Read CSV or TSV; every field is text: numbers are not parsed, and "NA" is a word."""
    mark = "\t" if path.suffix.lower() == ".tsv" else ","
    source = io.StringIO(text.lstrip("\n"))
    rows: list[dict[str, Any]] = []
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        header = next(csv.reader(source, delimiter=mark, strict=True), [])
        names = [name.strip() for name in header]
        _check_columns(path, names)
        # A header "question, answer" or "question , answer" means that values have such spaces, too.
        after, before = any(name[:1] == " " for name in header[1:]), any(name[-1:] == " " for name in header[:-1])
        for values in csv.reader(source, delimiter=mark, strict=True, skipinitialspace=after):
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
            if before:
                values = [*(value.rstrip(" ") for value in values[:-1]), values[-1]]
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
    """Return whether a quoted value seems to hold whole rows because a quote is not closed."""
    inner = value.split("\n")[1:-1]
    rows_in_csv = len(inner) > 1 and columns > 1 and all(line.count(mark) == columns - 1 for line in inner)
    return rows_in_csv or (mark == "\t" and mark in value)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        _check_columns(path, table.column_names)
        return _rows_of_arrow(table)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not readable as parquet: {' '.join(str(error).split())[:200]}") from error


def _rows_of_arrow(table: Any) -> list[dict[str, Any]]:
    """Return the rows of an Arrow table."""
    for index, field in enumerate(table.schema):
        if field.type == "float":  # 32 bits; a float32 of 0.1 is 0.1
            column = table[index].cast("string").cast("float64")
            table = table.set_column(index, field.name, column)
    return list(table.to_pylist())


def blank(value: object) -> bool:
    """Return whether a field is empty."""
    return missing(value) or all(
        unicodedata.category(character) in UNSEEN or character in FILLERS for character in str(value)
    )


def check_fields(where: str, raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check that a row has some fields, each with a text or a number.

    Args:
        where: The row, for error messages.
        raw: The fields of the row.
        names: The required fields.

    Raises:
        UserError: A field is missing, empty, or not text.
    """
    for name in names:
        if name not in raw:
            raise UserError(f"{where} has no field {name!r}; {nearest(name, list(raw))}")
        if blank(raw[name]):
            raise UserError(f"{where}: field {name!r} is empty")
        as_text(raw[name], name, where)


def read_header(path: Path) -> dict[str, Any]:
    """Return the object around the rows of a JSON file (``{"task_prefix": ..., "examples": [...]}``), or ``{}``."""
    if path.suffix.lower() != ".json":
        return {}
    try:
        document = _parsed(read_text(path) or "", path)
    except _NotJsonError:  # JSON Lines
        return {}
    return document if isinstance(document, dict) else {}


@dataclass(frozen=True)
class HubSource:
    """A dataset on the hub.

    Attributes:
        path: The id of the dataset.
        config: The configuration, if the dataset has several.
        splits: The names of the splits on the hub, for ``train`` and perhaps ``val`` and ``test``.
    """

    path: str
    config: str | None
    splits: Mapping[str, str]

    def rows(
        self,
        split: str,
        wanted: Callable[[Mapping[str, Any]], bool] = lambda row: True,
        limit: int | None = None,
    ) -> list[RawRow]:
        """Stream the rows of a split, which downloads only what is read.

        Args:
            split: One of ``splits``.
            wanted: Which rows to keep, by their fields.
            limit: Stop after this many kept rows.

        Raises:
            UserError: The hub cannot be reached, or does not have the dataset.
        """
        import datasets

        datasets.logging.set_verbosity_error()
        name = self.splits[split]
        try:
            HfApi().dataset_info(self.path, timeout=10)  # fails at once; load_dataset would retry for every file
            stream: Iterable[dict[str, Any]] = datasets.load_dataset(self.path, self.config, split=name, streaming=True)
            found = list(islice((row for row in stream if wanted(row)), limit))
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"dataset {self.path!r} ({name}) cannot be loaded from the hub ({type(error).__name__}: {reason}); "
                f"without a network, give local files: --data.{split} FILE"
            ) from error
        return [RawRow(f"{self.path} {split} row {number}", row) for number, row in enumerate(found, start=1)]


def shipped_table(name: str) -> list[dict[str, str]]:
    """Return the rows of a table that comes with this package.

    Args:
        name: ``antonyms.tsv`` (WordNet 3.0, see ``data/LICENSE.wordnet``), with ``word``, ``antonym``, ``part`` of
            speech and ``count`` of the rarer word in tagged texts; ``word_pairs.tsv``, with ``task``, ``question`` and
            ``answer``.
    """
    text = (resources.files("lightning_prompts.datamodules") / "data" / name).read_text(encoding="ascii")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def wordnet_words() -> list[str]:
    """Return every word of the table of antonyms once, in alphabetical order: lower-case letters only."""
    return sorted({word for row in shipped_table("antonyms.tsv") for word in (row["word"], row["antonym"])})
