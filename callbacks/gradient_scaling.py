"""Loss scaling for float16 models, which avoids underflow of gradients and skips steps that overflow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_prompts.callbacks.files import logs_now
from lightning_prompts.errors import UserError, check_finite

if TYPE_CHECKING:
    from lightning_prompts.methods import PromptMethod

log = logging.getLogger(__name__)


class GradientScaling(L.Callback):
    """Scales the loss before the backward pass, and unscales the gradients before clipping and the optimiser step.

    The callback is active only if the LM is in float16, whose gradients underflow below 6e-8 and overflow above 65,504.
    A step with non-finite gradients is skipped without a change of optimiser and learning rate, and the scale is
    halved. After ``growth_interval`` consecutive good steps, the scale is doubled. Gradient accumulation and manual
    optimisation are supported. Logs ``train/scale`` and ``train/skipped_steps``.

    Trained parameters and their computations stay in float32; there is no autocast.

    Args:
        initial_scale: Scale of the first step.
        growth_interval: Consecutive good steps before the scale is doubled.
        floor: Training ends with an error if the scale falls below this value, because scaling does not help then.
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
        """Replace the precision plugin, if the LM is in float16 and no other plugin scales the loss."""
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise an error for optimisers that unscale gradients themselves, after they were clipped."""
        for optimizer in trainer.optimizers if self._plugin is not None else []:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                raise UserError(
                    f"{type(optimizer).__name__} with fused: true cannot be used with model.lm.dtype float16, as it "
                    "unscales gradients after they are clipped; leave out fused, or take bfloat16"
                )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log the scale, and raise an error if it falls below ``floor``."""
        if self._plugin is None:
            return
        skipped = self._plugin.take_skipped()
        self.skipped += skipped
        if logs_now(trainer):
            pl_module.log("train/scale", self._plugin.scale)
            pl_module.log("train/skipped_steps", float(self.skipped))
        if skipped and self._plugin.scale < self.floor:
            raise UserError(
                f"the loss scale fell below {self.floor:g} after {self.skipped} skipped steps: float16 overflows in "
                "the backward pass at every scale; set model.lm.dtype to bfloat16 (same size, range of float32) or "
                "float32, or lower the learning rate"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the number of skipped steps."""
        if self.skipped:
            log.info("%d steps were skipped because float16 gradients overflowed", self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler, and the number of skipped steps."""
        scaler = None if self._plugin is None else self._plugin.scaler
        return {"scaler": self._saved if scaler is None else scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scaler and the number of skipped steps."""
        self._saved, self.skipped = state_dict["scaler"], state_dict["skipped"]


class _ScaledPrecision(MixedPrecision):
    """Lightning's loss scaling without its autocast."""

    def __init__(self, device: str, scaler: torch.amp.GradScaler) -> None:
        super().__init__("16-mixed", device, scaler)
        self._skipped = 0

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Do not use autocast: the LM is in float16, and the trained parameters stay in float32."""
        yield

    @property
    def scale(self) -> float:
        """Scale of the next step."""
        assert self.scaler is not None
        return float(self.scaler.get_scale())

    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Any,
        model: L.LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """Run the optimiser step, and record whether it was skipped."""
        steps: list[Any] = []
        hook = optimizer.register_step_post_hook(lambda *args: steps.append(args))
        try:
            result = super().optimizer_step(optimizer, model, closure, **kwargs)
        finally:
            hook.remove()
        if not steps:  # the scaler skipped the step; otherwise keep the flag of `NonFiniteGuard`
            self._skipped += 1
            cast("PromptMethod", model).step_skipped = True
        return result

    def take_skipped(self) -> int:
        """Return the number of skipped steps since the last call."""
        count, self._skipped = self._skipped, 0
        return count

    def state_dict(self) -> dict[str, Any]:
        """Return no state; the callback stores it, because this plugin does not exist when a checkpoint is loaded."""
        return {}
