"""Reading the files of a run folder: what is not what it should be is said in one line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import FAST_LOADER, as_mapping, parse_json, parse_yaml, read_text


def read_yaml(path: Path) -> dict[str, Any] | None:
    """A config."""
    text = read_text(path)
    return None if text is None else as_mapping(parse_yaml(text, path, FAST_LOADER), str(path))


def read_rows(path: Path) -> list[dict[str, Any]] | None:
    """A JSON Lines file, one object per row."""
    text = read_text(path)
    if text is None:
        return None
    # Not splitlines: texts of models may hold line separators of Unicode's, which JSON leaves as they are.
    return [
        parse_json(line, f"{path} line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]


def read_csv(path: Path) -> list[dict[str, float]]:
    """A table of numbers as Lightning's CSVLogger writes it: empty cells are left out."""
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
    """A number of a row; ``None`` where there is none.

    Raises:
        UserError: It is something else.
    """
    value = row.get(name)
    if value is None or isinstance(value, int | float):  # true and false are numbers, too
        return None if value is None else float(value)
    raise UserError(f"{where}: {name} must be a number, got {value!r}")
