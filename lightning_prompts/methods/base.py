"""The base class of all methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_prompts.errors import UserError
from lightning_prompts.lm import (
    FrozenLM,
    LanguageModel,
    LMConfig,
    LMShape,
    MemoryEstimate,
    Prompt,
    RemoteLM,
    Usage,
    prompt_length,
    slot_length,
)
from lightning_prompts.lm.precision import for_device
from lightning_prompts.lm.reuse import load_or_reuse
from lightning_prompts.methods.checkpointing import Checkpointing
from lightning_prompts.methods.evaluation import Evaluation, Monitor
from lightning_prompts.methods.training import Training
from lightning_prompts.types import Example


class PromptMethod(Training, Checkpointing, Evaluation):
    """A way to find a prompt for a frozen language model.

    A subclass names its prompt (`prompt_kind`), its estimator (`estimator_name`) and its objective (`objective_name`),
    builds the prompt in `build_prompt`, and returns it from `current_prompt`.

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
    takes_server: ClassVar[bool] = False  # the method needs only texts of the LM, so the LM may be behind a server
    trains_lm: ClassVar[bool] = False  # the method trains weights instead of a prompt
    monitor: ClassVar[Monitor] = Monitor("val/nll", "min")

    def __init__(
        self,
        lm: LMConfig,
        max_new_tokens: int,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """Keep the settings; `configure_model` loads the weights, so configs parse without them."""
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"], logger=False)  # the subclass's settings
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if lm.server is not None and not self.takes_server:
            raise UserError(
                f"{type(self).__name__} works on the LM's vectors, gradients or logits, and a server gives texts; "
                "leave out model.lm.server, or take FixedPrompt, FewShot, ChainOfThought, Ape or DeepLanguageNetwork"
            )
        self.lm_config = lm
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
    def usage(self) -> Usage:
        """Usage of the LM, or of all LMs together, by this process."""
        return self.language_model.usage

    @property
    def tokens_forwarded(self) -> int:
        """Number of tokens that this process ran through the LM, or through all LMs together."""
        return self.usage.tokens

    @property
    @abstractmethod
    def objective_name(self) -> str:
        """Name of the objective."""

    def describe(self) -> str:
        """Describe the method: prompt, estimator, objective, model, and the number of trained parameters."""
        return (
            f"{type(self).__name__}: {self.prompt_kind} x {self.estimator_name} x {self.objective_name}\n"
            f"{self.language_model.describe()}; trained: {self.describe_trained()}"
        )

    def describe_trained(self) -> str:
        """Return the number of trained parameters as text."""
        return f"{sum(parameter.numel() for parameter in self.trainable_parameters()):,}"

    def other_lms(self) -> list[LMConfig]:
        """Return the settings of the LMs that the method uses besides ``lm_config``, each once."""
        return []

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """Estimate the memory that the method adds to its LM, for `lightning_prompts.memory_plan`, without loading it.

        Args:
            shape: Shape of the LM.
            batch_size: ``B``, examples per batch in this process.
        """
        del shape, batch_size
        return MemoryEstimate()

    # --- loading ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the LM and build the prompt, once."""
        if not hasattr(self, "lms"):
            if self._trainer is not None and self.trainer.precision in ("16-true", "bf16-true", "64-true"):
                raise UserError(
                    f"trainer.precision {self.trainer.precision!r} would change the precision of what is trained, "
                    "which is float32; set model.lm.dtype for the LM's, and leave trainer.precision at 32-true"
                )
            self._check_strategy()
            # Without a Trainer, the run computes on torch's default device.
            device = torch.get_default_device() if self._trainer is None else self.trainer.strategy.root_device
            with torch.device("cpu"):  # random draws and counts do not depend on the default device
                configs = dict.fromkeys([self.lm_config, *self.other_lms()])
                self.lms = {config: self.load_lm(config, device) for config in configs}
                if isinstance(self.language_model, FrozenLM):
                    self.lm = self.language_model
                self.build_prompt()
            self.to(device)
        if self._trainer is not None:
            self._prepare_ranks()
            self._check_lengths()
            self._check_template()

    def _check_strategy(self) -> None:
        """Raise a `UserError` if the method does not support the run's strategy."""
        strategy = None if self._trainer is None else self.trainer.strategy
        mesh = getattr(strategy, "device_mesh", None)
        servers = [config for config in (self.lm_config, *self.other_lms()) if config.server is not None]
        if mesh is not None and mesh["tensor_parallel"].size() > 1 and servers:
            raise UserError(
                f"{type(self).__name__} asks a server, and each of the processes that share an LM's heads would; set "
                "trainer.strategy.tensor_parallel_size to 1"
            )
        if self.trains_lm and mesh is not None:
            raise UserError(
                f"{type(self).__name__} trains weights of the model itself, which {type(strategy).__name__} spreads "
                "over processes; set trainer.strategy to ddp"
            )

    def load_lm(self, config: LMConfig, device: torch.device) -> LanguageModel:
        """Load an LM onto the run's device, or split it over devices if the run's strategy requires it.

        An LM behind a server gets no request yet.

        Args:
            config: Settings of the LM.
            device: Device of the run.

        Raises:
            UserError: See `FrozenLM.load`; or the LM cannot be split.
        """
        if config.server is not None:
            return RemoteLM(config)
        mesh = None if self._trainer is None else getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is None:
            return FrozenLM.load(config, device=device) if self.trains_lm else load_or_reuse(config, device)
        # The whole LM may not fit on a device, so it is split on the CPU first.
        lm = FrozenLM.load(for_device(config, device), device="cpu")
        lm.spread_over(mesh)
        return lm.to(device)

    def _check_lengths(self) -> None:
        """Raise an error before the run starts if an example does not fit the context window."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.trainer.state.fn is not None:
            with torch.no_grad():
                prompt = self.current_prompt()
            slot = slot_length(prompt)
            ahead = prompt_length(prompt) - slot + self.added_tokens()
            stage = self.trainer.state.fn.value
            later = [*(data.splits("test") if data.has("test") else []), *(["predict"] if data.has("predict") else [])]
            for split in dict.fromkeys([*data.splits(stage), *(later if stage == "fit" else [])]):
                self.language_model.check_examples(data.examples(split), slot, ahead)

    @property
    def prompt_length(self) -> int:
        """``P``, the length of the prompt."""
        with torch.no_grad():
            return prompt_length(self.current_prompt())
