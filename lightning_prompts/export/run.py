"""Restores a finished run from its folder, in the same way as ``test``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace

from lightning_prompts.accelerators import exists_here
from lightning_prompts.cli.errors import to_user_error
from lightning_prompts.cli.main import PromptCLI
from lightning_prompts.cli.terminal import quiet
from lightning_prompts.errors import UserError
from lightning_prompts.methods import FixedPrompt, PromptMethod
from lightning_prompts.runs.names import CHECKPOINTS, CONFIG
from lightning_prompts.runs.reader import Run, check_run_folder
from lightning_prompts.types import Example

# Measure and write nothing, in one process.
SETTINGS = {
    "trainer.strategy": "auto",
    "trainer.devices": "1",
    "trainer.num_nodes": "1",
    "trainer.logger": "false",
    "trainer.callbacks": "[]",
    "trainer.enable_progress_bar": "false",
    "trainer.limit_test_batches": "0",
}
# Compute on the CPU in full precision.
EXACT = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.plugins": "null"}
LM_SETTINGS = {"dtype": "float32", "quantization": None, "gradient_checkpointing": False}


class _Rebuild(PromptCLI):
    """Parses and builds what ``test`` would run, and runs nothing."""

    def __init__(self, args: Sequence[str], exact: bool) -> None:
        """Build the classes; see `open_run` for ``exact``."""
        self.exact = exact
        super().__init__(args)

    def before_instantiate_classes(self) -> None:
        """Skip the checks of a folder that is only read, and choose the device and the precision; see `open_run`."""
        config = self.config[self.config.subcommand]
        self.folder = Path(config.trainer.default_root_dir)
        self._check_checkpoint(config)
        if isinstance(config.trainer.accelerator, str) and not exists_here(config.trainer.accelerator):
            config.trainer.accelerator = "auto"  # the run is from another machine
        settings = config.model.init_args
        layers = settings.get("layers")
        layers = layers if isinstance(layers, list) else []  # a scratch model has a number of them
        lms = [settings.get("lm"), *(layer.get("lm") for layer in layers if isinstance(layer, Namespace))]
        for lm in filter(None, lms if self.exact else []):
            for name, value in LM_SETTINGS.items():
                lm[name] = value
        if settings.get("proposer"):  # it is not used after training, so do not load it
            settings.proposer = lms[-1] or settings.lm

    def _run_subcommand(self, subcommand: str) -> None:
        del subcommand


@dataclass(frozen=True)
class RestoredRun(Run):
    """A finished run with its method and data.

    Attributes:
        checkpoint: The checkpoint's file; ``None`` for a method without training.
        trainer: Loads the checkpoint.
        method: The method; `restore` gives it its LM and its prompt.
        data: The datamodule.
    """

    checkpoint: Path | None
    trainer: L.Trainer
    method: PromptMethod
    data: L.LightningDataModule

    @property
    def method_name(self) -> str:
        """The method's class."""
        return type(self.method).__name__

    def restore(self) -> None:
        """Load the LM, build the prompt, and load the checkpoint strictly.

        Raises:
            UserError: The checkpoint, the data or the model is missing, or they do not fit together.
        """
        try:
            self.trainer.test(
                self.method, datamodule=self.data, ckpt_path=self.checkpoint, weights_only=True, verbose=False
            )
        except Exception as error:
            if known := to_user_error(error):
                raise known from error
            raise

    def examples(self) -> list[Example]:
        """The test examples with answers.

        Raises:
            UserError: There are none.
        """
        data: Any = self.data
        found = [example for example in data.examples("test") if example.answer is not None]
        if not found:
            raise UserError(
                f"{self.folder}: its data has no test example with an answer, and an export is checked by scoring "
                "some; give data a test split"
            )
        return found

    def step(self) -> int | None:
        """The number of training steps of the checkpoint."""
        if self.checkpoint is None:
            return None
        return int(torch.load(self.checkpoint, map_location="cpu", weights_only=True).get("global_step", 0))


def open_run(folder: Path, checkpoint: str, exact: bool = True) -> RestoredRun:
    """Read a run folder without loading an LM.

    Args:
        folder: The run folder; it has ``checkpoints/`` unless the method trains nothing.
        checkpoint: ``best`` or ``last``.
        exact: Whether to compute in float32 on the CPU; otherwise in the precision of the run, and on its kind of
            device, or on this machine's if it has none of that kind.

    Raises:
        UserError: The folder is no run folder, or has no such checkpoint.
    """
    config = folder / CONFIG
    check_run_folder(folder)
    quiet(inspected=True)
    path = folder / CHECKPOINTS / f"{checkpoint}.ckpt"
    untrained = not path.parent.is_dir()
    words = ["test", "-c", str(config), "--trainer.default_root_dir", str(folder)]
    settings = {**SETTINGS, **(EXACT if exact else {})}
    words += [word for name, value in settings.items() for word in (f"--{name}", value)]
    try:
        built = _Rebuild(words if untrained else [*words, "--ckpt_path", checkpoint], exact)
    except Exception as error:
        if known := to_user_error(error):
            raise known from error
        raise
    assert isinstance(built.model, PromptMethod)
    if untrained and not isinstance(built.model, FixedPrompt):
        raise UserError(f"{folder} has no checkpoints/{checkpoint}.ckpt; train the prompt first, with fit")
    return RestoredRun(folder, None if untrained else path, built.trainer, built.model, built.datamodule)
