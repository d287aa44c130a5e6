"""How a method trains: optimiser, learning rate, and the step that follows a gradient through the frozen LM."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prompts.errors import UserError, nearest
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import Prompt, answer_scores
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.distributed import Distributed
from lightning_prompts.objectives import Objective
from lightning_prompts.randomness import run_seed
from lightning_prompts.types import Batch, Example


class Training(Distributed):
    """Trains the prompt's parameters.

    Attributes:
        step_skipped: Whether a callback skipped the optimiser step because gradients were not finite. The learning rate
            does not move then.
        budget_used: Share of a limit on tokens, calls or seconds that is used up, where a callback sets one.
        on_bar: Names of the metrics that a progress bar shows, in their order.
    """

    def __init__(self, optimizer: OptimizerCallable | None, scheduler: LRSchedulerCallable | None) -> None:
        """Keep the settings; see `PromptMethod`."""
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step_skipped = False
        self.budget_used = 0.0
        self.on_bar: dict[str, None] = {}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let loggers count the steps that were done; after some checkpoints Lightning is one off."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The prompt's parameters; the LM has none."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[Any]:
        """What the optimiser gets: parameters, or groups of them with settings of their own."""
        return self.trainable_parameters()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each group by itself: the gradient of one would otherwise decide how far the others may go."""
        groups = optimizer.param_groups
        if len(groups) == 1 or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in groups:
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(group["params"], gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union of nine types
        """The optimiser over the prompt's parameters, and the scheduler by step."""
        if self.optimizer is None:
            return None
        try:
            optimizer = self.optimizer(_iterable(self.parameter_groups()))
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}") from error
        scheduler = (self.scheduler or self._linear_decay)(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            if not self.trainer.enable_validation:
                raise UserError(
                    "ReduceLROnPlateau waits for validations; set trainer.limit_val_batches above 0, or "
                    "leave out model.scheduler"
                )
            settings.update(
                interval="epoch", frequency=sys.maxsize, monitor=scheduler.monitor
            )  # see `on_validation_epoch_end`
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def on_validation_epoch_end(self) -> None:
        """Step a scheduler that waits for a metric, ahead of the checkpoint.

        Lightning would do so after each epoch, validated or not, and not at all in the epoch that a run is resumed in.

        Raises:
            UserError: There is no such metric.
        """
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        known = self.trainer.callback_metrics
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, ReduceLROnPlateau):
                if scheduler.monitor not in known:
                    raise UserError(
                        f"ReduceLROnPlateau: no metric {scheduler.monitor!r}; {nearest(scheduler.monitor, known)}"
                    )
                scheduler.step(known[scheduler.monitor])

    def _linear_decay(self, optimizer: Optimizer) -> LRScheduler:
        """From the full learning rate to zero over the run; constant for a run without an end."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - self.progress(step))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ANN401 - Lightning's own
        """As Lightning does, unless the step was skipped."""
        if self.step_skipped:
            self.step_skipped = False
            return
        super().lr_scheduler_step(scheduler, metric)

    def progress(self, step: int) -> float:
        """How much of the run lies behind step ``step``, in [0, 1]: of its steps or its budget, what ends first."""
        # Asked for as late as this because Lightning builds the dataloader to answer, and one that is built before
        # a checkpoint is restored would start its epoch anew.
        steps = step / self.trainer.estimated_stepping_batches if step else 0.0
        return min(1.0, max(steps, self.budget_used))

    def step_generator(self) -> torch.Generator:
        """Randomness of this training step, on the CPU: the same on every device, and in a run that was resumed."""
        step = self.trainer.fit_loop.total_batch_idx + 1
        return torch.Generator().manual_seed((run_seed() * 1_000_003 + step) % 2**63)

    def temperature_now(self, temperature: Temperature) -> float:
        """The temperature at this point of the run; the last one when it is over."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return temperature.end
        return temperature.at(self.progress(self.trainer.global_step))

    def answer_step(self, batch: Batch, prompt: Prompt, objective: Objective) -> Tensor:
        """The training step of every method that follows a gradient through the frozen LM.

        Args:
            batch: ``B`` examples; of several processes each gives its part, see `own_part`, or all of them the whole.
            prompt: With a gradient to the method's parameters.
            objective: What is good.

        Returns:
            The loss, a scalar. Its mean over the processes is the loss of the whole batch.
        """
        rows = self.lm.encode_answers(batch.examples, prompt, objective.with_end)
        logits = self.lm.answer_logits(rows, prompt)
        scores = answer_scores(logits, rows)
        if len(batch) < batch.total:  # a part, of which all processes know one
            own = sum(len(row.answer) for row in rows) if batch.weight else 0.0
            scores = replace(scores, mean_tokens=self.data_parallel_rank.all_reduce(own)[0] / batch.total)
        loss = batch.weight * objective.loss(self.lm, rows, logits, scores)
        self.log_step("train/loss", loss, batch, prog_bar=True)
        self.log_step("train/nll", batch.weight * scores.nll.mean(), batch)  # without the ends, as val/nll
        return loss

    def own_part(self, batch: Batch) -> Batch:
        """The examples of a training batch that this process follows the gradient of; all, if there is no other."""
        return self.data_parallel_rank.part_of(batch)

    def log(  # type: ignore[override]
        self, name: str, value: Any, prog_bar: bool = False, **kwargs: Any  # noqa: ANN401 - as Lightning's
    ) -> None:  # fmt: skip
        """Log as Lightning does, but without a wait for the device.

        Lightning copies a number from pageable memory, and reads each metric of the progress bar after every step. The
        command line's bar reads them when a step is logged.
        """
        if isinstance(value, int | float):
            value = to_device(torch.tensor(float(value), device="cpu"), self.device)
        if prog_bar:
            self.on_bar[name] = None
        bar = None if self._trainer is None else self.trainer.progress_bar_callback
        prog_bar = prog_bar and bar is not None and not getattr(bar, "reads_when_logging", False)
        super().log(name, value, prog_bar=prog_bar, **kwargs)

    def log_step(self, name: str, value: float | Tensor, batch: Batch, prog_bar: bool = False) -> None:
        """Log a mean over this process's part of a batch, with its weight; what is logged is that over the batch."""
        self.log(name, value, batch_size=batch.total, prog_bar=prog_bar, sync_dist=True)

    def validation_batches(self) -> list[list[Example]]:
        """What a validation in training looks at, for methods that look ahead of it; nothing where there is none."""
        data = getattr(self.trainer, "datamodule", None)
        limit = self.trainer.limit_val_batches
        if data is None or not limit:
            return []
        examples, size = data.examples("val"), data.eval_batch_size
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        return batches[: limit if isinstance(limit, int) else max(1, int(limit * len(batches)))]


def _iterable(parameters: list[Any]) -> Iterable[Any]:
    """The parameters, checked: an optimiser without any would fail with less clear words."""
    if not parameters:
        raise UserError("there is nothing to train in this method; use test instead of fit")
    return parameters
