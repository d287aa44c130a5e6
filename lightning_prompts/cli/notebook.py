"""The progress bar in a notebook."""

from __future__ import annotations

import importlib
import sys
import time
from html import escape
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lightning_prompts.cli.metrics_on_bar import MetricsOnBar

SECONDS = 0.2  # between two updates


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    found = sys.modules.get("IPython")
    return found is not None and hasattr(found.get_ipython(), "kernel")


class Line:
    """A line with a bar below a cell, which is updated in place. Where output goes to a file, it shows nothing."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._handle: Any = None
        self._last = 0.0

    def show(self, fraction: float, text: str, now: bool = False) -> None:
        """Show how much is done, at most every `SECONDS` unless it must be shown now."""
        if not type(sys.stdout).__module__.startswith("ipykernel") or not (now or time.monotonic() > self._last):
            return
        bar = f'<progress value="{fraction:.4f}" max="1" style="width: 12em; vertical-align: middle"></progress>'
        self._display({"text/html": f"<div>{bar} {escape(text)}</div>", "text/plain": f"{fraction:4.0%} {text}"})
        self._last = time.monotonic() + SECONDS

    def clear(self) -> None:
        """Remove the line."""
        if self._handle is not None:
            self._display({"text/html": "", "text/plain": ""})

    def _display(self, data: dict[str, str]) -> None:
        display: Any = importlib.import_module("IPython.display").display
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class NotebookBar(MetricsOnBar, ProgressBar):
    """One bar for a whole training with its loss and metrics. It needs no widgets, and stays in the saved notebook."""

    def __init__(self) -> None:
        """Show nothing yet."""
        super().__init__()
        self._line = Line()
        self._start = 0.0
        self._tested = 0
        self._enabled = True

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar."""
        self._line, self._start = Line(), time.monotonic()
        self._show(trainer, now=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show the step and the metrics."""
        self._show(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that a validation runs."""
        self._show(trainer, now=True, more="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the new metrics."""
        self._show(trainer, now=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step."""
        self._show(trainer, now=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say that training stopped."""
        self._show(trainer, now=True, more="stopped")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar."""
        self._line, self._tested = Line(), 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batches."""
        self._tested += 1
        total = sum(trainer.num_test_batches)
        if self._enabled:
            self._line.show(self._tested / total, f"test: batch {self._tested} of {total:.0f}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar, as a table of the results follows."""
        self._line.clear()

    def _show(self, trainer: L.Trainer, now: bool = False, more: str = "") -> None:
        if not self._enabled or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        module: Any = trainer.lightning_module
        steps = float(trainer.estimated_stepping_batches)
        total = "" if steps == float("inf") else f" of {steps:.0f}"
        metrics = {name: _shown(name, value) for name, value in self.get_metrics(trainer, module).items()}
        parts = [f"step {trainer.global_step}{total}", f"{time.monotonic() - self._start:.0f} s"]
        parts += [f"{name} {value}" for name, value in metrics.items()]
        done = max(trainer.global_step / steps, module.budget_used)
        self._line.show(min(done, 1.0), " · ".join(filter(None, [*parts, more])), now)


def _shown(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if name.endswith(("exact_match", "accuracy")) else f"{value:.3f}"
