"""Loss scaling for float16 models: small gradients survive, and an overflow costs a step and not the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_prompts.callbacks.files import logs_now
from lightning_prompts.errors import UserError, check_finite

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)


class GradientScaling(L.Callback):
    """Multiplies the loss ahead of the backward pass, and divides the gradients ahead of clipping and the optimiser.

    At work when the LM is in float16, whose gradients vanish below 6e-8 and overflow above 65,504; without effect
    otherwise. A step whose gradients are not finite is skipped, optimiser and learning rate untouched, and the scale
    halved; after ``growth_interval`` good steps in a row it is doubled. Works with gradient accumulation and with
    manual optimisation. Logs ``train/scale`` and ``train/skipped_steps``.

    What is trained stays in float32 and is computed in float32; this is no autocast.

    Args:
        initial_scale: Of the first step.
        growth_interval: Good steps until the scale is doubled.
        floor: Below this scale training ends: a loss that overflows even then is none that scaling can help.
    """

    def __init__(self, initial_scale: float = 65536.0, growth_interval: int = 200, floor: float = 1.0) -> None:
        """Check the numbers."""
        super().__init__()
        check_finite("initial_scale", initial_scale, above=True)
        check_finite("floor", floor, above=True)
        if growth_interval < 1:
            raise UserError(f"growth_interval must be at least 1, got {growth_interval}")
        if floor > initial_scale:
            raise UserError(f"floor ({floor}) must not be above initial_scale ({initial_scale})")
        self.initial_scale, self.growth_interval, self.floor = initial_scale, growth_interval, floor
        self.skipped = 0
        self._plugin: _ScaledPrecision | None = None
        self._saved: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the precision plugin's place, where the LM is in float16 and nobody scales already."""
        method = cast("PromptMethod", pl_module)
        present = trainer.strategy.precision_plugin
        if not method.gradient_through_lm or method.lm.model.dtype != torch.float16:
            return
        if isinstance(present, MixedPrecision) and present.scaler is not None:
            return
        scaler = torch.amp.GradScaler(
            pl_module.device.type, init_scale=self.initial_scale, growth_interval=self.growth_interval
        )
        self._plugin = _ScaledPrecision(pl_module.device.type, scaler)
        trainer.strategy.precision_plugin = self._plugin
        if self._saved:
            scaler.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log, and give up where scaling does not help."""
        if self._plugin is None:
            return
        skipped = self._plugin.take_skipped()
        self.skipped += skipped
        if logs_now(trainer):
            pl_module.log("train/scale", self._plugin.scale)
            pl_module.log("train/skipped_steps", float(self.skipped))
        if skipped and self._plugin.scale < self.floor:
            raise UserError(
                f"the loss scale sank below {self.floor:g} after {self.skipped} skipped steps: float16 overflows in "
                "the backward pass whatever the scale; set model.lm.dtype to bfloat16 (as small, with float32's range) "
                "or float32, or lower the learning rate"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often a step was skipped."""
        if self.skipped:
            log.info("%d steps were skipped because float16 gradients overflowed", self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The scale, and how many steps were skipped."""
        scaler = None if self._plugin is None else self._plugin.scaler
        return {"scaler": self._saved if scaler is None else scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._saved, self.skipped = state_dict["scaler"], state_dict["skipped"]


class _ScaledPrecision(MixedPrecision):
    """Lightning's loss scaling without its autocast."""

    def __init__(self, device: str, scaler: torch.amp.GradScaler) -> None:
        super().__init__("16-mixed", device, scaler)
        self._skipped = 0

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Nothing: the LM is in float16 by itself, and what is trained is not to be."""
        yield

    @property
    def scale(self) -> float:
        """The scale of the next step."""
        assert self.scaler is not None
        return float(self.scaler.get_scale())

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As Lightning does, and remember when the step was skipped."""
        steps: list[Any] = []
        hook = optimizer.register_step_post_hook(lambda *args: steps.append(args))
        try:
            result = super().optimizer_step(optimizer, model, closure, **kwargs)
        finally:
            hook.remove()
        if not steps:  # the scaler did not let the optimiser step; or else it is as a guard has left it
            self._skipped += 1
            cast("PromptMethod", model).step_skipped = True
        return result

    def take_skipped(self) -> int:
        """Steps that were skipped since this was last asked."""
        count, self._skipped = self._skipped, 0
        return count

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the callback keeps it, as this plugin is not there yet when a checkpoint is read."""
        return {}
