"""Relaxed token prompts: softmax with annealed temperature, Gumbel-Softmax, straight-through, PEZ (Wen et al. 2023).

Prompt: a distribution over the vocabulary ``[P, V]``, or vectors near tokens (PEZ). Estimator: the relaxation.
Objective: answer likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.estimators.relaxations import Relaxation, Softmax
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.methods.discrete import DiscretePromptMethod
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.search.rounding import Rounding, coordinate_descent
from lightning_prompts.search.scoring import CandidateScorer
from lightning_prompts.types import Batch, Example


class RelaxedPromptTuning(DiscretePromptMethod):
    """Trains scores over the vocabulary by gradient, and uses the arg-max tokens as the prompt.

    ``val/nll`` and ``test/nll`` are those of the tokens, and ``relaxed_nll`` is that of the relaxed prompt.

    Args:
        length: ``P``, number of tokens.
        estimator: ``Softmax``, ``GumbelSoftmax``, ``StraightThrough`` or ``Projected`` (PEZ).
        temperature: Schedule of the relaxation's temperature.
        init: Initial prompt: the tokens nearest to its vectors.
        init_logit: How strongly the initial scores favour those tokens; 0 favours none. PEZ starts with the tokens.
        readable: Allow only words of ASCII letters and punctuation.
        rounding: Search for the tokens, at regular steps and after the last one; ``None`` takes the likeliest token of
            each position. Its cost counts as training.
        memory_mb: Approximate memory of one pass of the rounding, in megabytes.
        objective: Training objective.
        lm: The frozen language model.
        optimizer: Optimiser of the prompt's parameters. Scores need a high learning rate, PEZ's vectors about 0.05.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "distribution over the vocabulary [P, V]"
    objective: Likelihood
    matrix: Tensor
    rounded_ids: Tensor
    rounded_at: Tensor
    allowed_ids: Tensor

    def __init__(
        self,
        length: int = 4,
        estimator: Relaxation = Softmax(),
        temperature: Temperature = Temperature(),
        init: Initializer = RandomTokens(),
        init_logit: float = 0.0,
        readable: bool = False,
        rounding: Rounding | None = None,
        memory_mb: float = 256.0,
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=0.3),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; `build_prompt` creates the prompt."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_at_least("length", length)
        if not 0 <= init_logit < float("inf"):
            raise UserError(f"init_logit must not be negative, got {init_logit}")
        if not memory_mb > 0:
            raise UserError(f"memory_mb must be above 0, got {memory_mb}")
        if not estimator.passes_gradient:
            raise UserError(f"estimator {estimator} passes no gradient, so nothing would be learned; use Softmax()")
        self.length = length
        self.estimator = estimator
        self.temperature = temperature
        self.init = init
        self.init_logit = init_logit
        self.readable = readable
        self.rounding = rounding
        self.memory_mb = memory_mb
        self.objective = objective

    @property
    def estimator_name(self) -> str:  # type: ignore[override]
        """The relaxation."""
        return repr(self.estimator)

    def build_prompt(self) -> None:
        """Start with the initialiser's tokens.

        Raises:
            UserError: There are fewer allowed tokens than the rounding's ``top_k``.
        """
        self.register_buffer("matrix", self.lm.embedding_matrix().float(), persistent=False)
        self.register_buffer("allowed_ids", allowed_tokens(self.lm, self.readable), persistent=False)
        if self.rounding is not None and self.rounding.top_k > (count := int(self.allowed_ids.sum())):
            raise UserError(f"rounding.top_k ({self.rounding.top_k}) is more than the {count} tokens of a prompt")
        ids = self.lm.nearest_tokens(self.init(self.lm, self.length))[0]
        self.parameters_ = torch.nn.Parameter(self.estimator.start(ids, self.matrix, self.init_logit))
        self.register_buffer("rounded_ids", torch.zeros(self.length, dtype=torch.long, device=self.lm.device))
        self.register_buffer("rounded_at", torch.tensor(0, device=self.lm.device))  # step of the last rounding, or 0
        self.keep_ids(self.length)
        self.scorer = CandidateScorer(self.lm, self.memory_mb, self.map_across_ranks)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; estimators differ in their parameters."""
        return {**super().checkpoint_meta(), "estimator": repr(self.estimator)}

    def token_ids(self) -> Tensor:
        """Return the current tokens, ``[P]``."""
        if self.rounding is not None and self.rounded_at:
            return self.rounded_ids
        return self.estimator.tokens(self.parameters_, self.matrix, self.allowed_ids)

    def configure_callbacks(self) -> list[Callback]:
        """Return a callback that rounds; a method's own hooks run after checkpoints are saved."""
        return [] if self.rounding is None else [_Rounder()]

    def round_if_due(self) -> None:
        """Round every ``rounding.every`` steps, and at the end of the run."""
        step = self.trainer.global_step
        if self.rounding is None or step == self.rounded_at:  # mid-accumulation, the step is not complete
            return
        if step % self.rounding.every and self.progress(step) < 1:
            return
        train = self.trainer.datamodule.examples("train")  # type: ignore[attr-defined]
        order = torch.randperm(len(train), generator=self.step_generator(), device="cpu")
        chosen = [train[index] for index in order[: self.rounding.examples].tolist()]
        rows = self.lm.encode_answers(chosen, self.matrix[: self.length], self.objective.with_end)
        scores = self.estimator.scores(self.parameters_.detach(), self.matrix, self.allowed_ids)
        self.rounded_ids.copy_(coordinate_descent(self.scorer, rows, scores, self.objective, self.rounding))
        self.rounded_at.fill_(step)

    def relaxed_prompt_for(self, examples: Sequence[Example]) -> Tensor:
        """Return the relaxed prompt without noise, ``[P, D]``, at the current or final temperature."""
        temperature = self.temperature_now(self.temperature)
        return self.estimator.relaxed_vectors(self.parameters_, self.matrix, self.allowed_ids, temperature)

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        with torch.device("meta"):
            matrix = torch.empty(shape.vocabulary, shape.width)
            start = self.estimator.start(torch.zeros(self.length, dtype=torch.long), matrix, self.init_logit)
        # Kept: E in float32. Saved: the softmax, its input, and the masked scores, each [P, V].
        saved = 3 * self.length * shape.vocabulary
        return MemoryEstimate(start.numel(), matrix.numel(), saved, self.length, backward=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch under the relaxation."""
        del batch_idx
        temperature = self.temperature_now(self.temperature)
        vectors = self.estimator.train_vectors(
            self.parameters_, self.matrix, self.allowed_ids, temperature, self.step_generator()
        )
        self.log("train/temperature", temperature, batch_size=len(batch))
        return self.answer_step(self.own_part(batch), vectors, self.objective)


class _Rounder(Callback):
    """Rounds the method's prompt after a training step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Round the prompt if it is due."""
        cast("RelaxedPromptTuning", pl_module).round_if_due()
