"""What every method shares. A method adds its prompt."""

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
    monitor: ClassVar[Monitor] = Monitor("val/nll", "min")

    def __init__(
        self,
        lm: LMConfig,
        max_new_tokens: int,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        """Keep the settings; weights are loaded in `configure_model`, so that configs parse without them."""
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"], logger=False)  # those of the subclass
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if lm.server is not None and not self.takes_server:
            raise UserError(
                f"{type(self).__name__} works on the LM's vectors, gradients or logits, and a server gives texts; "
                "leave out model.lm.server, or take FixedPrompt, FewShot, ChainOfThought, Ape or DeepLanguageNetwork"
            )
        self.lm_config = lm
        self.max_new_tokens = max_new_tokens

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
        return self.language_model.usage

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
            f"{self.language_model.describe()}; trained: {self.describe_trained()}"
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
            with torch.device("cpu"):  # nothing that is drawn or counted relies on the default device
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
        """Raise a `UserError` if the run's strategy does not go with the method."""
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
        """Load an LM onto the run's device, or spread it over devices if the run's strategy says so.

        An LM behind a server is not asked yet.

        Args:
            config: Which LM.
            device: Where the run computes.

        Raises:
            UserError: See `FrozenLM.load`; or the LM cannot be split.
        """
        if config.server is not None:
            return RemoteLM(config)
        mesh = None if self._trainer is None else getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is None:
            return FrozenLM.load(config, device=device) if self.trains_lm else load_or_reuse(config, device)
        # The whole LM may be larger than a device, so that it is cut up ahead of it.
        lm = FrozenLM.load(for_device(config, device), device="cpu")
        lm.spread_over(mesh)
        return lm.to(device)

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
                self.language_model.check_examples(data.examples(split), slot, ahead)

    @property
    def prompt_length(self) -> int:
        """``P``."""
        with torch.no_grad():
            return prompt_length(self.current_prompt())
