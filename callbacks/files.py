"""Writing into the run folder: a file is either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention


def write_atomic(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it, so that a killed process leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(work, 0o644)  # mkstemp's files are private
        os.replace(work, path)
    except BaseException:
        Path(work).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class RowLog(L.Callback):
    """A callback that keeps rows and has them in a JSON Lines file of the run folder, across a resumed run too.

    Args:
        name: The file's name.
    """

    def __init__(self, name: str) -> None:
        """Start without rows."""
        self.name = name
        self.rows: list[dict[str, Any]] = []

    def add(self, trainer: L.Trainer, rows: Iterable[dict[str, Any]]) -> None:
        """Keep more rows, and write all of them."""
        self.rows.extend(rows)
        if trainer.is_global_zero:
            write_jsonl(Path(trainer.default_root_dir) / self.name, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows, so that a resumed run goes on with them."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows back."""
        self.rows = list(state_dict["rows"])
