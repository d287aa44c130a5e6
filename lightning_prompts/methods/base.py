"""The base class of all methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import check_at_least
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate, Prompt, prompt_length
from lightning_prompts.methods.checkpointing import Checkpointing
from lightning_prompts.methods.evaluation import Evaluation, Monitor
from lightning_prompts.methods.training import Training
from lightning_prompts.objectives import Likelihood, Objective
from lightning_prompts.types import Batch, Example


class PromptMethod(Training, Checkpointing, Evaluation):
    """A way to find a prompt for a frozen language model.

    A subclass names its prompt (`prompt_kind`) and its estimator (`estimator_name`), builds the prompt in
    `build_prompt`, and returns it from `current_prompt`. The default `training_step` minimises `objective` by
    backpropagation through the LM.

    Args:
        lm: The frozen language model.
        max_new_tokens: Maximum length of a generated answer, in tokens.
        optimizer: Optimiser of the prompt's parameters; ``None`` for methods that train nothing by gradient.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
    """

    prompt_kind: ClassVar[str]
    estimator_name: ClassVar[str]
    gradient_through_lm: ClassVar[bool] = True  # the loss is computed from the LM's output
    objective: Objective = Likelihood()  # of the default `training_step`
    monitor: ClassVar[Monitor] = Monitor("val/nll", "min")

    def __init__(
        self,
        lm: LMConfig,
        max_new_tokens: int,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """Keep the settings; `configure_model` loads the weights, so configs parse without them."""
        super().__init__(lm, optimizer, scheduler)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"], logger=False)  # the subclass's settings
        check_at_least("max_new_tokens", max_new_tokens)
        self.max_new_tokens = max_new_tokens

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        settings = {name: value for name, value in self.hparams.items() if name != "lm" and value is not None}
        plain = (str, int, float, list)
        shown = [f"{k}={v!r}" if isinstance(v, plain) else f"{k}={type(v).__name__}" for k, v in settings.items()]
        return ", ".join([f"lm={self.lm_config.name!r}", *shown])

    # --- hooks for subclasses ---------------------------------------------------------------------------------------

    @abstractmethod
    def build_prompt(self) -> None:
        """Create the prompt's parameters; called after ``self.lm`` is loaded."""

    @abstractmethod
    def current_prompt(self) -> Prompt:
        """Return the prompt for the LM, ``[P, D]`` or keys and values, differentiable in its parameters."""

    def prompt_for(self, examples: Sequence[Example]) -> Prompt:
        """Return the prompt for some examples: one for all, or ``[B, P, D]`` from methods that write one for each."""
        del examples
        return self.current_prompt()

    def initial_prompt(self) -> Prompt | None:
        """Return the prompt before training, or ``None`` if the method has no such prompt."""
        return None

    def prompt_text(self) -> str | None:
        """Return the exact text of the prompt, or ``None`` if the prompt is not text."""
        return None

    def task_instruction(self) -> str:
        """Return the datamodule's instruction for the task; empty if it has none."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return str(getattr(data, "instruction", ""))

    def proposed(self) -> list[dict[str, Any]]:
        """Return the candidates of the last step as rows; empty for methods without candidates."""
        return []

    def validated(self) -> list[dict[str, Any]]:
        """Return what the last validation found about the prompts, as rows; empty for methods that do not record it."""
        return []

    @property
    def objective_name(self) -> str:
        """Name of the objective."""
        return self.objective.name

    def describe(self) -> str:
        """Describe the method: prompt, estimator, objective, model, and the number of trained parameters."""
        return (
            f"{type(self).__name__}: {self.prompt_kind} x {self.estimator_name} x {self.objective_name}\n"
            f"{self.language_model.describe()}; trained: {self.describe_trained()}"
        )

    def describe_trained(self) -> str:
        """Return the number of trained parameters as text."""
        return f"{sum(parameter.numel() for parameter in self.trainable_parameters()):,}"

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """Estimate the memory that the method adds to its LM, for `lightning_prompts.memory_plan`, without loading it.

        Args:
            shape: Shape of the LM.
            batch_size: ``B``, examples per batch in this process.
        """
        del shape, batch_size
        return MemoryEstimate()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Compute the loss of a batch: `objective` under the prompts of this process's part of it."""
        del batch_idx
        part = self.own_part(batch)
        return self.answer_step(part, self.prompt_for(part.examples), self.objective)

    # --- loading ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the LM and build the prompt, once."""
        if not hasattr(self, "lms"):
            device = self._load_lms()
            with torch.device("cpu"):
                self.build_prompt()
            self.to(device)
        if self._trainer is not None:
            self._prepare_ranks()
            self._check_lengths()
            self._check_template()

    @property
    def prompt_length(self) -> int:
        """``P``, the length of the prompt."""
        with torch.no_grad():
            return prompt_length(self.current_prompt())
