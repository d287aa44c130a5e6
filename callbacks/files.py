"""What callbacks share: JSON files of the run folder, and when a step is logged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention

from lightning_prompts.files import write_atomic


def logs_now(trainer: L.Trainer) -> bool:
    """Whether this training step's metrics go to the loggers; what is logged in others would only make a GPU wait."""
    return bool(trainer._logger_connector.should_update_logs)


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
