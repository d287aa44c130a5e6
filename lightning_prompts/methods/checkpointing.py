"""Saving, checking and loading checkpoints of a method."""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import Self

from lightning_prompts.checkpoints import between_batches, check_readable
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.distributed import Distributed
from lightning_prompts.methods.settings import as_plain, from_plain
from lightning_prompts.randomness import random_state, set_random_state
from lightning_prompts.template import Template

log = logging.getLogger(__name__)

META = "lightning_prompts"
TEMPLATE = "template"
GRADIENTS = "gradients"


class Checkpointing(Distributed):
    """Saves and restores a method: settings, template, random states, and accumulated gradients.

    Attributes:
        template: Template of the data that the prompt was trained on.
    """

    def __init__(self, lm: LMConfig) -> None:
        """Start with nothing restored."""
        super().__init__(lm)
        self.template: Template | None = None
        self._waiting: dict[str, Tensor] = {}  # restored gradients, by the parameter's name

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """``P``, the length of the prompt."""

    def checkpoint_meta(self) -> dict[str, str | int]:
        """Return the values that must be equal in a checkpoint and in the run that loads it."""
        return {
            "method": type(self).__name__,
            "model": self.language_model.name,
            "revision": self.lm_config.revision or "",
            "width": self.language_model.width,
            "vocabulary": self.language_model.vocabulary,
            "length": self.prompt_length,
        }

    @property
    def accumulating(self) -> bool:
        """Whether accumulated gradients are waiting for the next optimiser step."""
        if self._trainer is None or not (self.trainer.training or self.trainer.validating):
            return False
        progress, batches = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.num_training_batches
        last = progress.is_last_batch or progress.current.ready == batches
        return bool(progress.current.ready % self.trainer.accumulate_grad_batches) and not last

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the method, its settings, the template, the RNG state and accumulated gradients."""
        checkpoint[META] = self.checkpoint_meta()
        own = inspect.signature(type(self)).parameters
        settings = {name: value for name, value in self.hparams.items() if name in own}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = as_plain(settings)
        if self.template is not None:
            checkpoint[TEMPLATE] = asdict(self.template)
        checkpoint["rng"] = random_state()
        if self.accumulating:
            checkpoint[GRADIENTS] = {
                name: self._mean_across_ranks(value.grad)
                for name, value in self.named_parameters()
                if value.grad is not None
            }

    def _mean_across_ranks(self, gradient: Tensor) -> Tensor:
        """Average an accumulated gradient over the processes of DDP, which averages only in the last batch of a step.

        Every process can resume with the mean, because the mean of all processes stays the same.
        """
        if not isinstance(self.trainer.strategy, DDPStrategy):
            return gradient
        mean = self.trainer.strategy.reduce(gradient.clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this method and model, and restore its state.

        Raises:
            UserError: The checkpoint is from another method, model, prompt length or project; or training would
                resume with another template.
        """
        meta = checkpoint.get(META)
        if not isinstance(meta, dict):
            raise UserError("the checkpoint was not written by lightning-prompts; give one from a run's checkpoints/")
        for key, mine in self.checkpoint_meta().items():
            if (its := meta.get(key, "")) != mine:
                raise UserError(
                    f"the checkpoint is for another {key} ({its or 'none'}) than this run's ({mine or 'none'}); "
                    "use it with the config.yaml of the run that wrote it"
                )
        self.template = Template(**checkpoint[TEMPLATE]) if TEMPLATE in checkpoint else None
        self._check_template()
        if self._trainer is not None and self.trainer.training:
            set_random_state(checkpoint["rng"])
            between_batches(checkpoint["loops"])
            self._waiting = checkpoint.get(GRADIENTS, {})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **kwargs: object) -> Self:  # type: ignore[override]
        """Load a trained method with its training settings from a checkpoint file.

        Args:
            checkpoint_path: The checkpoint file.
            kwargs: Settings that replace the saved ones; also Lightning's ``map_location`` and ``strict``.

        Returns:
            The method with its LM loaded. The checkpoint does not hold the optimiser; it is the default unless given.

        Raises:
            UserError: The file is damaged, is from another method, or lacks a setting.
        """
        check_readable(Path(checkpoint_path))
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        name = checkpoint[META]["method"] if isinstance(checkpoint.get(META), dict) else None
        method = next((kind for kind in _with_subclasses(cls) if kind.__name__ == name), None)
        if method is None:
            found = "none of lightning-prompts" if name is None else f"one of {name}"
            raise UserError(f"{checkpoint_path} is no checkpoint of {cls.__name__}, but {found}")
        settings = from_plain(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}), method, kwargs)
        given: dict[str, Any] = {"map_location": "cpu", **settings, "weights_only": True}
        return cast("Self", super(Checkpointing, method).load_from_checkpoint(checkpoint_path, **given))

    def _check_template(self) -> None:
        """Compare the template of the prompt's training with the template of the run.

        Raises:
            UserError: Training would resume with another template.
        """
        mine, given = self.template, None if self._trainer is None else _template(self.trainer)
        if mine is None or given is None or mine == given:
            return
        values = [(field.name, getattr(mine, field.name), getattr(given, field.name)) for field in fields(Template)]
        said = " and ".join(
            f"data.{'template' if name == 'text' else name} {old!r} (now {new!r})"
            for name, old, new in values
            if old != new
        )
        if self.trainer.training:
            raise UserError(f"the checkpoint was trained with {said}; set it back to continue the training")
        log.warning("the prompt was trained with %s; expect worse results with another template", said)

    def on_train_start(self) -> None:
        """Restore accumulated gradients after resuming mid-accumulation; the Trainer has set them to zero by now."""
        self.template = _template(self.trainer)
        for name, parameter in self.named_parameters():
            if name in self._waiting:
                parameter.grad = self._waiting[name].to(parameter)
        self._waiting = {}


def _with_subclasses(kind: type[Checkpointing]) -> Iterator[type[Checkpointing]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _with_subclasses(child)


def _template(trainer: Trainer) -> Template | None:
    """Return the template of the data; ``None`` if there are several or none."""
    data = getattr(trainer, "datamodule", None)
    return None if getattr(data, "own_templates", False) else getattr(data, "template", None)
