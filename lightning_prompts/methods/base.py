"""What every method shares: loading the LM, several processes, checkpoints, training. A method adds its prompt."""

from __future__ import annotations

import inspect
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prompts.checkpoints import between_batches, check_readable
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import (
    FrozenLM,
    LMConfig,
    LMShape,
    MemoryEstimate,
    Prompt,
    Usage,
    answer_scores,
    prompt_length,
    slot_length,
)
from lightning_prompts.lm.precision import for_device
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.evaluation import Evaluation, Item, Result
from lightning_prompts.methods.settings import as_plain, from_plain
from lightning_prompts.objectives import Objective
from lightning_prompts.processes import Replica
from lightning_prompts.randomness import random_state, run_seed, set_random_state
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example

log = logging.getLogger(__name__)

META = "lightning_prompts"
TEMPLATE = "template"
GRADIENTS = "gradients"


class PromptMethod(Evaluation):
    """A way to find a prompt for a frozen language model.

    A subclass says in three words what it is (`prompt_kind`, `estimator_name`, and its objective), builds its prompt in
    `build_prompt`, and gives it in `current_prompt`.

    Args:
        lm: The frozen language model.
        max_new_tokens: How long a generated answer may get.
        optimizer: Makes the optimiser of the prompt's parameters; ``None`` where nothing is trained by gradient.
        scheduler: Makes a learning-rate scheduler that steps every training step; ``None`` for a linear decay to zero
            over the whole run.
    """

    prompt_kind: ClassVar[str]
    estimator_name: ClassVar[str]
    gradient_through_lm: ClassVar[bool] = True  # the loss is computed from the LM's output
    takes_server: ClassVar[bool] = False  # it needs texts of the LM alone, which may be behind a server then
    trains_lm: ClassVar[bool] = False  # and no prompt
    monitor: ClassVar[tuple[str, str]] = ("val/nll", "min")  # what tells the best checkpoint, and which way

    def __init__(
        self,
        lm: LMConfig,
        max_new_tokens: int,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """Keep the settings; weights are loaded in `configure_model`, so that configs parse without them."""
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"], logger=False)  # those of the subclass
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if lm.server is not None and not self.takes_server:
            raise UserError(
                f"{type(self).__name__} works on the LM's vectors, gradients or logits, and a server gives texts; "
                "leave out model.lm.server, or take DeepLanguageNetwork or Ape (whose model.text is measured by test "
                "without fit)"
            )
        self.lm_config = lm
        self.max_new_tokens = max_new_tokens
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step_skipped = False  # by a callback, for want of finite gradients: the learning rate does not move either
        self.budget_used = 0.0  # share of a limit on tokens, calls or seconds, where a callback sets one
        self.on_bar: dict[str, None] = {}  # names of the metrics that a progress bar shows, in their order
        self.template: Template | None = None  # of the data that the prompt was trained on
        self._waiting: dict[str, Tensor] = {}  # gradients of an earlier start, by the parameter's name

    # --- what a method adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def build_prompt(self) -> None:
        """Make the prompt's parameters; ``self.lm`` is loaded by now."""

    @abstractmethod
    def current_prompt(self) -> Prompt:
        """The prompt as it goes into the LM, ``[P, D]`` or keys and values, differentiable in its parameters."""

    def prompt_for(self, examples: Sequence[Example]) -> Prompt:
        """The prompt for some examples: the same for all, unless a method writes one for each, ``[B, P, D]``."""
        del examples
        return self.current_prompt()

    def initial_prompt(self) -> Prompt | None:
        """The prompt before training, or ``None`` where that means nothing."""
        return None

    def prompt_text(self) -> str | None:
        """The prompt in words, exactly, or ``None`` where there are none."""
        return None

    def task_instruction(self) -> str:
        """The task in a sentence, as the datamodule has it; empty where there is none."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return str(getattr(data, "instruction", ""))

    def proposed(self) -> list[dict[str, Any]]:
        """The candidates that the last step tried, as rows; none where a method does not try several."""
        return []

    def validated(self) -> list[dict[str, Any]]:
        """What the last validation of training has found about prompts, as rows, where a method goes by it."""
        return []

    @property
    def usage(self) -> Usage:
        """What the LM was used for, or all of them together, by this process."""
        return self.lm.usage

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that were run through the LM, or through all of them, by this process."""
        return self.usage.tokens

    @property
    @abstractmethod
    def objective_name(self) -> str:
        """The third word: what is good."""

    def describe(self) -> str:
        """The method in words: its triple, its model, and how much of it is trained."""
        return (
            f"{type(self).__name__}: {self.prompt_kind} x {self.estimator_name} x {self.objective_name}\n"
            f"{self.lm.describe()}; trained: {self.describe_trained()}"
        )

    def describe_trained(self) -> str:
        """How much is trained."""
        return f"{sum(parameter.numel() for parameter in self.trainable_parameters()):,}"

    def other_lms(self) -> list[LMConfig]:
        """The LMs that are asked beside ``lm_config``, each once."""
        return []

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """What the method adds to the memory of its LM, for `lightning_prompts.memory_plan`; nothing is loaded.

        Args:
            shape: Of the LM.
            batch_size: ``B`` of this process.
        """
        del shape, batch_size
        return MemoryEstimate()

    # --- several processes ------------------------------------------------------------------------------------------

    @property
    def replica(self) -> Replica:
        """Which share of a step's examples is this process's."""
        places = None if self._trainer is None else self.trainer.distributed_sampler_kwargs
        if places is None or places["num_replicas"] == 1:
            return Replica()
        mesh = getattr(self.trainer.strategy, "device_mesh", None)
        group = None if mesh is None else mesh["data_parallel"].get_group()
        return Replica(places["rank"], places["num_replicas"], group, self.lm.barrier)

    def map_across_ranks(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        """Some work without gradients, split over the processes; see `Replica.map_across_ranks`."""
        return self.replica.map_across_ranks(items, work)

    def _prepare_replicas(self) -> None:
        """What several processes need.

        Raises:
            UserError: They were not given the same seed.
        """
        replica = self.replica
        if replica.count == 1:
            return
        if len(set(replica.all_gather([run_seed()]))) > 1:
            raise UserError(
                "the processes have different seeds; call lightning.seed_everything(0) ahead of the Trainer"
            )
        # The same everywhere without being sent: what never changes, and what all processes work out alike.
        frozen = [name for name, value in self.named_parameters(remove_duplicate=False) if not value.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [
            *frozen, *(name for name, _ in self.named_buffers(remove_duplicate=False))
        ]  # fmt: skip

    # --- loading and checkpoints ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the LM and build the prompt, once."""
        if not hasattr(self, "lm"):
            if self._trainer is not None and self.trainer.precision in ("16-true", "bf16-true", "64-true"):
                raise UserError(
                    f"trainer.precision {self.trainer.precision!r} would change the precision of what is trained, "
                    "which is float32; set model.lm.dtype for the LM's, and leave trainer.precision at 32-true"
                )
            self._check_strategy()
            # Without a Trainer, the run computes on torch's default device.
            device = torch.get_default_device() if self._trainer is None else self.trainer.strategy.root_device
            with torch.device("cpu"):  # nothing that is drawn or counted relies on the default device
                configs = dict.fromkeys([self.lm_config, *self.other_lms()])
                self.lms = {config: self.load_lm(config, device) for config in configs}
                self.lm = self.lms[self.lm_config]
                self.build_prompt()
            self.to(device)
        if self._trainer is not None:
            self._prepare_replicas()
            self._check_lengths()
            self._check_template()

    def _check_strategy(self) -> None:
        """Raise a `UserError` if the run's strategy spreads weights that the method changes."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if self.trains_lm and getattr(strategy, "device_mesh", None) is not None:
            raise UserError(
                f"{type(self).__name__} trains weights of the model itself, which {type(strategy).__name__} spreads "
                "over processes; set trainer.strategy to ddp"
            )

    def load_lm(self, config: LMConfig, device: torch.device) -> FrozenLM:
        """Load an LM onto the run's device, or spread it over devices where the run's strategy says so.

        Args:
            config: Which LM.
            device: Where the run computes.

        Raises:
            UserError: See `FrozenLM.load`; or the LM cannot be split.
        """
        mesh = None if self._trainer is None else getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is None:
            return FrozenLM.load(config, device=device)
        # The whole LM may be larger than a device, so that it is cut up ahead of it.
        lm = FrozenLM.load(for_device(config, device), device="cpu")
        lm.spread_over(mesh)
        return lm.to(device)

    def step_generator(self) -> torch.Generator:
        """Randomness of this training step, on the CPU: the same on every device, and in a run that was resumed."""
        step = self.trainer.fit_loop.total_batch_idx + 1
        return torch.Generator().manual_seed((run_seed() * 1_000_003 + step) % 2**63)

    def _check_lengths(self) -> None:
        """Find examples that do not fit the context window before anything starts, not in the middle of it."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.trainer.state.fn is not None:
            with torch.no_grad():
                prompt = self.current_prompt()
            slot = slot_length(prompt)
            ahead = prompt_length(prompt) - slot + self.added_tokens()
            stage = self.trainer.state.fn.value
            later = [*(data.splits("test") if data.has("test") else []), *(["predict"] if data.has("predict") else [])]
            for split in dict.fromkeys([*data.splits(stage), *(later if stage == "fit" else [])]):
                self.lm.check_lengths(data.examples(split), slot, ahead)
                if isinstance(self.lm, FrozenLM):
                    self.lm.encoder.warn_of_losses(data.examples(split))

    @property
    def prompt_length(self) -> int:
        """``P``."""
        with torch.no_grad():
            return prompt_length(self.current_prompt())

    def checkpoint_meta(self) -> dict[str, str | int]:
        """What a checkpoint must agree on with the run that loads it."""
        return {
            "method": type(self).__name__,
            "model": self.lm.name,
            "revision": self.lm_config.revision or "",
            "width": self.lm.width,
            "vocabulary": self.lm.vocabulary,
            "length": self.prompt_length,
        }

    @property
    def accumulating(self) -> bool:
        """Whether gradients of some batches wait for those of others, between two steps."""
        if self._trainer is None or not (self.trainer.training or self.trainer.validating):
            return False
        progress, batches = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.num_training_batches
        last = progress.is_last_batch or progress.current.ready == batches
        return bool(progress.current.ready % self.trainer.accumulate_grad_batches) and not last

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what identifies the prompt, the state of the random numbers, and gradients that wait for their step."""
        checkpoint[META] = self.checkpoint_meta()
        own = inspect.signature(type(self)).parameters
        settings = {name: value for name, value in self.hparams.items() if name in own}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = as_plain(settings)
        if self.template is not None:
            checkpoint[TEMPLATE] = asdict(self.template)
        checkpoint["rng"] = random_state()
        if self.accumulating:
            checkpoint[GRADIENTS] = {
                name: value.grad for name, value in self.named_parameters() if value.grad is not None
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was not made by this method on this model.

        Raises:
            UserError: It is another method's, model's or length's, or no checkpoint of this project; or training would
                go on with another template.
        """
        meta = checkpoint.get(META)
        if not isinstance(meta, dict):
            raise UserError("the checkpoint was not written by lightning-prompts; give one from a run's checkpoints/")
        for key, mine in self.checkpoint_meta().items():
            if meta.get(key) != mine:
                raise UserError(
                    f"the checkpoint is for another {key} ({meta.get(key)}) than this run's ({mine}); "
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
        """A trained method with the settings that it was trained with, from a checkpoint's file.

        Args:
            checkpoint_path: The file.
            kwargs: Settings that take the place of those; also ``map_location`` and ``strict``, as Lightning has them.

        Returns:
            The method, its LM loaded. Its optimiser is not in the checkpoint; it is the default one unless given.

        Raises:
            UserError: The file is damaged, of another method, or does not say a setting.
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
        return cast("Self", super(PromptMethod, method).load_from_checkpoint(checkpoint_path, **given))

    def _check_template(self) -> None:
        """Compare the template that the prompt was trained with and that of the run.

        Raises:
            UserError: Training is to go on, and they differ.
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
            raise UserError(f"the checkpoint was trained with {said}; to go on training, set it back")
        log.warning("the prompt was trained with %s; expect worse results with another template", said)

    def on_train_start(self) -> None:
        """Gradients of an earlier start go on to wait for their step; the Trainer has set them to zero before this."""
        self.template = _template(self.trainer)
        for name, parameter in self.named_parameters():
            if name in self._waiting:
                parameter.grad = self._waiting[name].to(parameter)
        self._waiting = {}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let loggers count the steps that were done; after some checkpoints Lightning is one off."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    # --- training ---------------------------------------------------------------------------------------------------

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
            scores = replace(scores, mean_tokens=self.replica.all_reduce(own)[0] / batch.total)
        loss = batch.weight * objective.loss(self.lm, rows, logits, scores)
        self.log_step("train/loss", loss, batch, prog_bar=True)
        self.log_step("train/nll", batch.weight * scores.nll.mean(), batch)  # without the ends, as val/nll
        return loss

    def own_part(self, batch: Batch) -> Batch:
        """The examples of a training batch that this process follows the gradient of; all, if there is no other."""
        return self.replica.part_of(batch)

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


def _with_subclasses(kind: type[PromptMethod]) -> Iterator[type[PromptMethod]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _with_subclasses(child)


def _template(trainer: Trainer) -> Template | None:
    """The template of the data; ``None`` where there are several or none."""
    data = getattr(trainer, "datamodule", None)
    return None if getattr(data, "own_templates", False) else getattr(data, "template", None)


def _iterable(parameters: list[Any]) -> Iterable[Any]:
    """The parameters, checked: an optimiser without any would fail with less clear words."""
    if not parameters:
        raise UserError("there is nothing to train in this method; use test instead of fit")
    return parameters
