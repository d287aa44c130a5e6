"""The metrics beside a progress bar."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar


class MetricsOnBar(ProgressBar):
    """Reads metrics only when a step is logged, as every read makes the GPU wait. Leaves out the logger's version."""

    reads_when_logging = True  # `PromptMethod.log` leaves it to this bar

    def __init__(self) -> None:
        """Start without metrics."""
        super().__init__()
        self._shown: dict[str, Any] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics beside the bar."""
        if not trainer.training or not self._shown or trainer._logger_connector.should_update_logs:
            items: dict[str, Any] = super().get_metrics(trainer, pl_module)
            known = trainer.callback_metrics
            own = {name: float(known[name]) for name in getattr(pl_module, "on_bar", ()) if name in known}
            self._shown = {name: value for name, value in {**items, **own}.items() if name != "v_num"}
        return self._shown
