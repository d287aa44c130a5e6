"""What callbacks share: JSON files of the run folder, and when a step is logged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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


def log_table(trainer: L.Trainer, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Give rows of text to the loggers that take some: as a table to W&B, as Markdown to TensorBoard and MLflow.

    Args:
        trainer: Whose loggers.
        name: Of the table.
        rows: Each with the columns.
        columns: Which of their fields.
    """
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in cells)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for logger in trainer.loggers if trainer.is_global_zero else []:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_table"):
            logger.log_table(name, columns=list(columns), data=cells, step=trainer.global_step)
        elif hasattr(experiment, "add_text"):
            experiment.add_text(name, markdown, trainer.global_step)
        elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
            experiment.log_text(logger.run_id, markdown, f"{name}/{trainer.global_step}.md")


def _escaped(cell: str) -> str:
    """A cell of a Markdown table: a line, in which a bar is no border."""
    return cell.replace("|", "\\|").replace("\n", "<br>")


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
