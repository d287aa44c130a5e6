"""Write the results of ``validate``, ``test`` and ``predict`` to the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_prompts.callbacks.files import write_json, write_jsonl
from lightning_prompts.callbacks.non_finite_guard import NonFiniteGuard
from lightning_prompts.runs.names import GENERATIONS, METRICS, PREDICTIONS, VALIDATION
from lightning_prompts.types import Batch


class ResultFiles(L.Callback):
    """Writes ``metrics.json`` and ``predictions.jsonl`` after a test, ``generations.jsonl`` after a prediction.

    The ``validate`` command writes ``validation.json``; validations during training do not. Rows are in the order of
    the data, with the rows of a whole batch for each step, also with several processes.
    """

    def __init__(self) -> None:
        """Start without rows."""
        self.rows: list[dict[str, Any]] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget earlier rows."""
        self.rows = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget earlier rows."""
        self.rows = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of a batch."""
        self.rows.extend(outputs["rows"])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of a batch."""
        self.rows.extend(outputs["rows"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics of the ``validate`` command."""
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_json(Path(trainer.default_root_dir) / VALIDATION, metrics)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics, and the rows that they were computed from."""
        rows = self.rows
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        for name in metrics:
            if name.endswith("/examples"):
                metrics[name] = int(metrics[name])
        metrics.update(_predicted(rows))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, NonFiniteGuard):
                metrics.update(callback.counts())
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            write_jsonl(folder / PREDICTIONS, rows)
            write_json(folder / METRICS, metrics)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the generations."""
        if trainer.is_global_zero:
            write_jsonl(Path(trainer.default_root_dir) / GENERATIONS, self.rows)


def _predicted(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the predictions of each class in each test set as ``test/predicted/NAME``, to show a bias for a class."""
    names = [f"{row['split']}/predicted/{row['label']}" for row in rows if "label" in row]
    return {name: names.count(name) for name in sorted(set(names))}
