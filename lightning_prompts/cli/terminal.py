"""The output of a run: the progress bar, the table of results, and which warnings are hidden."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich.table import Table

from lightning_prompts.cli.metrics_on_bar import MetricsOnBar
from lightning_prompts.cli.notebook import NotebookBar, in_notebook


def results_table(metrics: Mapping[str, torch.Tensor]) -> Table:
    """Metrics named ``test/NAME`` or ``test/SET/NAME`` as a table."""
    names = list(dict.fromkeys(key.rpartition("/")[2] for key in metrics if key.startswith("test/")))
    table = Table("test set", *names)
    for split in dict.fromkeys(key.rpartition("/")[0] for key in metrics if key.startswith("test/")):
        values = [metrics.get(f"{split}/{name}") for name in names]
        cells = [
            "" if value is None else f"{value:.0f}" if name == "examples" else f"{value:.4f}"
            for name, value in zip(names, values, strict=True)
        ]
        table.add_row(split, *cells)
    return table


class _Bar(MetricsOnBar, RichProgressBar):
    """A progress bar without the logger's version number and without an epoch -2."""

    def _get_train_description(self, current_epoch: int) -> str:
        """Leave out the number of epochs if there is no limit: Lightning shows -2 for ``max_epochs: -1``."""
        return str(super()._get_train_description(current_epoch)).replace("/-2", "   ")


def use_own_progress_bar(trainer: L.Trainer) -> None:
    """Replace Lightning's default bar. A callback of the config would ignore ``enable_progress_bar: false``."""
    installed: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    defaults = [callback for callback in installed if type(callback) in (RichProgressBar, TQDMProgressBar)]
    if defaults or not any(isinstance(callback, ProgressBar) for callback in installed):
        installed[:] = [callback for callback in installed if callback not in defaults]
        installed.insert(0, NotebookBar() if in_notebook() else _Bar())


# Warnings about a run that is only built to be inspected, on the CPU and without callbacks.
_INSPECTED = (".*GPU available but not used.*", ".*callbacks used to create the checkpoint need to be provided.*")


def quiet(inspected: bool = False) -> None:
    """Hide warnings that a user cannot act on."""
    for message in (
        *(_INSPECTED if inspected else ()),
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`LightningCLI`'s args parameter.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*have no logger configured.*",
        ".*Starting from v1.9.0, `tensorboardX`.*",
        ".*`trainer.predict.*",
        ".*`is_gradient_checkpointing` is deprecated.*",  # PEFT asks for it
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*Using `DistributedSampler` with the dataloaders.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one warning per layer and step, and others
    torch.set_float32_matmul_precision("highest")
