"""Training of a method: optimiser, learning rate, and the training step through the frozen LM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
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
from lightning_prompts.lm import LMConfig, Prompt, answer_scores
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.distributed import Distributed
from lightning_prompts.objectives import Objective
from lightning_prompts.randomness import run_seed
from lightning_prompts.types import Batch, Example


class Training(Distributed):
    """Trains the prompt's parameters.

    Attributes:
        step_skipped: Whether a callback skipped the optimiser step because gradients were not finite. The learning rate
            then stays the same.
        budget_used: Used share of a callback's limit on tokens, calls or seconds; 0 without one.
        on_bar: Names of the metrics on the progress bar, in order.
    """

    def __init__(
        self, lm: LMConfig, optimizer: OptimizerCallable | None, scheduler: LRSchedulerCallable | None
    ) -> None:
        """Keep the settings; see `PromptMethod`."""
        super().__init__(lm)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step_skipped = False
        self.budget_used = 0.0
        self.on_bar: dict[str, None] = {}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Correct the step count of loggers; after some checkpoints Lightning's is off by one."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the prompt's trainable parameters; the LM has none."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[Any]:
        """Return the optimiser's parameters, or groups of them with their own settings."""
        return self.trainable_parameters()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each parameter group separately, so the gradient of one does not shrink the updates of the others."""
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
        """Create the optimiser of the prompt's parameters, and the scheduler, which steps every training step."""
        if self.optimizer is None:
            return None
        parameters: Any = self.parameter_groups()
        if not parameters:  # an optimiser's own error is less clear
            raise UserError("there is nothing to train in this method; use test instead of fit")
        try:
            optimizer = self.optimizer(parameters)
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
        """Step schedulers that monitor a metric, before the checkpoint is saved.

        Lightning would step them after every epoch, with or without validation, and never in the epoch of a resume.

        Raises:
            UserError: The monitored metric does not exist.
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
        """Decay the learning rate linearly to zero over the run; keep it constant if the run has no end."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - self.progress(step))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:  # noqa: ANN401 - Lightning's own
        """Step the scheduler, unless the optimiser step was skipped."""
        if self.step_skipped:
            self.step_skipped = False
            return
        super().lr_scheduler_step(scheduler, metric)

    def progress(self, step: int) -> float:
        """Return the completed share of the run at ``step``, in [0, 1]: of its steps or budget, whichever is larger."""
        # Lightning builds the dataloader to estimate the steps, and a dataloader built before a checkpoint is restored
        # would restart its epoch. So the estimate is not read at step 0.
        steps = step / self.trainer.estimated_stepping_batches if step else 0.0
        return min(1.0, max(steps, self.budget_used))

    def step_generator(self) -> torch.Generator:
        """Return the CPU generator of this training step, equal on every device and after resuming."""
        step = self.trainer.fit_loop.total_batch_idx + 1
        return torch.Generator().manual_seed((run_seed() * 1_000_003 + step) % 2**63)

    def temperature_now(self, temperature: Temperature) -> float:
        """Return the current temperature during training, and the final one otherwise."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return temperature.end
        return temperature.at(self.progress(self.trainer.global_step))

    def answer_step(self, batch: Batch, prompt: Prompt, objective: Objective) -> Tensor:
        """Run the training step of methods that backpropagate through the frozen LM.

        Args:
            batch: ``B`` examples. With several processes, each passes its part (see `own_part`), or all pass the whole.
            prompt: The prompt, differentiable in the method's parameters.
            objective: Training objective.

        Returns:
            The loss, a scalar. Its mean over the processes is the loss of the whole batch.
        """
        rows = self.lm.encode_answers(batch.examples, prompt, objective.with_end)
        logits = self.lm.answer_logits(rows, prompt)
        scores = answer_scores(logits, rows)
        if len(batch) < batch.total:  # each process has its own part
            own = sum(len(row.answer) for row in rows) if batch.weight else 0.0
            scores = replace(scores, mean_tokens=self.data_parallel_rank.all_reduce(own)[0] / batch.total)
        loss = batch.weight * objective.loss(self.lm, rows, logits, scores)
        self.log_step("train/loss", loss, batch, prog_bar=True)
        self.log_step("train/nll", batch.weight * scores.nll.mean(), batch)  # without end tokens, like val/nll
        return loss

    def own_part(self, batch: Batch) -> Batch:
        """Return this process's part of a training batch; the whole batch if there is only one process."""
        return self.data_parallel_rank.part_of(batch)

    def log(self, name: str, value: float | Tensor, prog_bar: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        """Log like Lightning, but without synchronising with the device.

        Lightning copies numbers from pageable memory, and reads each metric of the progress bar after every step. The
        progress bar of the command line reads them only when a step is logged.
        """
        if isinstance(value, int | float):
            value = to_device(torch.tensor(float(value), device="cpu"), self.device)
        if prog_bar:
            self.on_bar[name] = None
        bar = None if self._trainer is None else self.trainer.progress_bar_callback
        prog_bar = prog_bar and bar is not None and not getattr(bar, "reads_when_logging", False)
        super().log(name, value, prog_bar=prog_bar, **kwargs)

    def log_step(self, name: str, value: float | Tensor, batch: Batch, prog_bar: bool = False) -> None:
        """Log the mean over the whole batch, from the weighted mean over this process's part."""
        self.log(name, value, batch_size=batch.total, prog_bar=prog_bar, sync_dist=True)

    def validation_batches(self) -> list[list[Example]]:
        """Return the batches of a validation during training; empty if there is no validation."""
        data = getattr(self.trainer, "datamodule", None)
        limit = self.trainer.limit_val_batches
        if data is None or not limit:
            return []
        examples, size = data.examples("val"), data.eval_batch_size
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        return batches[: limit if isinstance(limit, int) else max(1, int(limit * len(batches)))]

    def validation_examples(self) -> list[Example]:
        """Return the examples of `validation_batches`."""
        return [example for batch in self.validation_batches() for example in batch]


class SearchOptimizer(Optimizer):
    """An optimiser whose step searches with the gradient that the closure computes.

    The Trainer counts, saves and limits its steps like any other's.

    Args:
        parameters: The parameters of the gradient.
        search: Runs the step, without gradient.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], search: Callable[[], None]) -> None:
        """Keep the search; the method's buffers hold its state."""
        super().__init__(parameters, {"lr": 1.0})
        self.search = search

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Compute the gradient, then search."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.search()
        return loss
