"""Select the device of a run, and test whether training works on it."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Sequence

import torch

from lightning_prompts.errors import UserError, nearest


def accelerator_here() -> str | None:
    """Return the type of this machine's accelerator, for example ``cuda``; ``None`` if there is none."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def device_type(accelerator: str) -> str:
    """Return the device type of a Trainer with this ``accelerator``, for example ``cpu`` or ``cuda``."""
    return accelerator_here() or "cpu" if accelerator in ("auto", "gpu") else accelerator


def exists_here(accelerator: str) -> bool:
    """Return whether this machine has the ``accelerator`` of a Trainer."""
    from lightning.pytorch.accelerators import AcceleratorRegistry

    kinds = {"auto": ["cpu"], "gpu": ["cuda", "mps"]}.get(accelerator, [accelerator])
    known = [AcceleratorRegistry[kind]["accelerator"] for kind in kinds if kind in AcceleratorRegistry]
    return any(kind.is_available() for kind in known)


def check_accelerator(accelerator: str, words: Sequence[str]) -> None:
    """Check that the ``accelerator`` of a Trainer exists.

    Args:
        accelerator: Name of the accelerator.
        words: Arguments of the command line, to suggest a command that runs on the CPU.

    Raises:
        UserError: The name is unknown, or this machine does not have the accelerator.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry

    names = sorted({*AcceleratorRegistry.available_accelerators(), "auto", "gpu"})
    if accelerator not in names:
        raise UserError(f"trainer.accelerator {accelerator!r} does not exist; {nearest(accelerator, names)}")
    if not exists_here(accelerator):
        command = shlex.join(["lightning-prompts", *words, "--trainer.accelerator", "cpu"])
        raise UserError(f"this machine has no accelerator {accelerator!r}; run on the CPU instead: {command}")


def train_two_steps(accelerator: str) -> float:
    """Train and validate a soft prompt of a tiny LM for two steps.

    Args:
        accelerator: Accelerator of the Trainer.

    Returns:
        The duration in seconds.

    Raises:
        RuntimeError: The loss is not finite. Other errors are not caught.
    """
    import lightning as L

    from lightning_prompts.cli.terminal import quiet
    from lightning_prompts.datamodules import Antonyms
    from lightning_prompts.lm import LMConfig
    from lightning_prompts.methods import SoftPromptTuning

    quiet()
    start = time.perf_counter()
    shape = "hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,max_position_embeddings=256"
    method = SoftPromptTuning(length=2, lm=LMConfig(f"random:llama,{shape}", dtype="auto"), max_new_tokens=2)
    data = Antonyms(batch_size=4, max_train_examples=8, val_fraction=0.01, test_fraction=0.01)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=2,
            limit_val_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(method, datamodule=data)
        loss = float(trainer.callback_metrics["train/loss"])
    if not loss < float("inf"):
        raise RuntimeError(f"the loss is {loss}")
    return time.perf_counter() - start
