"""Helpers of callbacks: JSON files in the run folder, tables for loggers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_prompts.files import write_atomic


def logs_now(trainer: L.Trainer) -> bool:
    """Whether loggers record the metrics of this training step; logging at other steps only stalls a GPU."""
    return bool(trainer._logger_connector.should_update_logs)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log_table(trainer: L.Trainer, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Log rows of text as a table to W&B and MLflow, and as Markdown to TensorBoard.

    W&B shows the table of each step. MLflow keeps one table with the rows of all steps, ``NAME.json``.

    Args:
        trainer: The trainer with the loggers.
        name: Name of the table.
        rows: The rows as dictionaries.
        columns: Keys of the columns to log.
    """
    if not rows:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as Lightning numbers the metrics
    cells = [[row.get(column, "") for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *([_escaped(str(cell)) for cell in row] for row in cells)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for logger in trainer.loggers if trainer.is_global_zero else []:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_table"):
            logger.log_table(name, columns=list(columns), data=cells, step=step)
        elif hasattr(experiment, "add_text"):
            experiment.add_text(name, markdown, step)
        elif hasattr(experiment, "log_table") and hasattr(logger, "run_id"):
            table = {"step": [step] * len(rows), **dict(zip(columns, map(list, zip(*cells, strict=True)), strict=True))}
            experiment.log_table(logger.run_id, table, f"{name}.json")


def _escaped(cell: str) -> str:
    """Escape line breaks and bars in a cell of a Markdown table."""
    return cell.replace("|", "\\|").replace("\n", "<br>")


class RowLog(L.Callback):
    """A callback that collects rows in a JSON Lines file of the run folder, and continues it in a resumed run.

    Args:
        name: Name of the file.
    """

    def __init__(self, name: str) -> None:
        """Start without rows."""
        self.name = name
        self.rows: list[dict[str, Any]] = []

    def add(self, trainer: L.Trainer, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, and write all rows."""
        self.rows.extend(rows)
        if trainer.is_global_zero:
            write_jsonl(Path(trainer.default_root_dir) / self.name, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, which a resumed run continues."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])
