"""The prompt-refinement pipeline: instruction and question -> hidden states -> Refiner -> prompt -> answer.

Prompt: soft embeddings ``[B, P, D]`` or a distribution over the vocabulary ``[B, P, V]``, one per question. Estimator:
backpropagation, straight-through, Gumbel-Softmax, or the arg-max as a control. Objective: answer likelihood,
BERTScore, or a weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.estimators.relaxations import GradientEstimator, PartNoise, ScoreRelaxation, Soft
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate, Query
from lightning_prompts.methods.refined import RefinerMethod
from lightning_prompts.objectives import Likelihood, Objective
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.refiners.heads import Head, Tied
from lightning_prompts.refiners.networks import MLPRefiner, RefinerNetwork
from lightning_prompts.refiners.refiner import ScoreRefiner, VectorRefiner, part_sizes
from lightning_prompts.types import Batch, Example


class RefinerTuning(RefinerMethod):
    """Trains a network that writes ``P`` vectors or tokens for each question, by gradient through the frozen LM.

    With tokens, ``val/nll`` and ``test/nll`` are those of the arg-max tokens, and ``relaxed_nll`` is that of the
    relaxed prompt.

    Args:
        length: ``P``, number of vectors or tokens.
        refiner: ``MLPRefiner`` or ``TransformerRefiner``.
        head: ``Tied``, ``Factored`` or ``Full``; ``Soft`` supports only ``Tied``.
        estimator: ``Soft``, ``StraightThrough``, ``GumbelSoftmax``, ``Softmax``, or ``Argmax`` as a control.
        objective: Training objective.
        query: Which hidden states of the question the refiner reads.
        init: Initial prompt, the same for every question: vectors, or the tokens nearest to them.
        init_logit: How strongly the initial scores favour those tokens.
        scale: How far a question may move a soft prompt, in units of the embeddings' root mean square.
        temperature: Schedule of the relaxation's temperature.
        readable: Allow only words of ASCII letters and punctuation.
        allow_no_gradient: Allow training with ``Argmax``, to show that nothing is learned.
        cache_states: Compute the hidden states once and keep them on disk, instead of in every step.
        base_lr: Learning rate of the base, which all questions share; ``None`` for 0.02 with vectors and 0.3 with
            scores.
        lm: The frozen language model.
        reader: Another LM, whose hidden states of the question the refiner reads, such as a smaller one (SoftCoT, Xu
            et al. 2025, section 3); ``None`` for ``lm``.
        optimizer: Optimiser; its learning rate is the network's.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "one prompt per question"
    matrix: Tensor
    allowed_ids: Tensor

    def __init__(
        self,
        length: int = 4,
        refiner: RefinerNetwork = MLPRefiner(),
        head: Head = Tied(),
        estimator: GradientEstimator = Soft(),
        objective: Objective = Likelihood(),
        query: Query = Query(),
        init: Initializer = RandomTokens(),
        init_logit: float = 5.0,
        scale: float = 1.0,
        temperature: Temperature = Temperature(),
        readable: bool = False,
        allow_no_gradient: bool = False,
        cache_states: bool = True,
        base_lr: float | None = None,
        lm: LMConfig = LMConfig(),
        reader: LMConfig | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; `build_prompt` creates the refiner."""
        soft = isinstance(estimator, Soft)
        rate = base_lr if base_lr is not None else (0.02 if soft else 0.3)
        super().__init__(query, cache_states, rate, lm, max_new_tokens, optimizer, scheduler, reader)
        if length < 1:
            raise UserError(f"length must be at least 1, got {length}: a refiner writes a prompt")
        if not soft and not isinstance(estimator, ScoreRelaxation):
            raise UserError(f"estimator {estimator} has no scores of tokens; use StraightThrough, for one")
        if not estimator.passes_gradient and not allow_no_gradient:
            raise UserError(
                f"estimator {estimator} passes no gradient: every weight of the refiner would stay as it is; use "
                "StraightThrough or GumbelSoftmax, or set model.allow_no_gradient to true to see it"
            )
        check_finite("init_logit", init_logit)
        check_finite("scale", scale)
        self.length = length
        self.network = refiner
        self.head = head
        self.estimator = estimator
        self.objective = objective
        self.init = init
        self.init_logit = init_logit
        self.scale = scale
        self.temperature = temperature
        self.readable = readable
        self.pooled = refiner.pooled

    @property
    def estimator_name(self) -> str:  # type: ignore[override]
        """Backpropagation for ``Soft``, or the relaxation."""
        return "backpropagation" if isinstance(self.estimator, Soft) else repr(self.estimator)

    def build_prompt(self) -> None:
        """Start with the initialiser's prompt for every question."""
        self.query.check(self.reader)
        self.objective.check(self.lm)
        start = self.init(self.lm, self.length)
        matrix = self.lm.embedding_matrix().float()
        if isinstance(self.estimator, ScoreRelaxation):
            self.register_buffer("matrix", matrix, persistent=False)
            self.register_buffer("allowed_ids", allowed_tokens(self.lm, self.readable), persistent=False)
            base = self.estimator.start(self.lm.nearest_tokens(start)[0], matrix, self.init_logit)
            self.refiner = ScoreRefiner(base, matrix, self.network, self.head, self.reader.width)
        else:
            size = float(matrix.square().mean().sqrt())
            self.refiner = VectorRefiner(start, size, self.network, self.head, self.reader.width, self.scale)

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; weights fit only one network, head and estimator."""
        parts = (self.network, self.head, type(self.estimator).__name__, self.scale)
        return {**super().checkpoint_meta(), "refiner": " ".join(map(str, parts))}

    def describe(self) -> str:
        """See `PromptMethod`; for an estimator without a gradient, explain that nothing will be learned."""
        text = super().describe()
        if self.estimator.passes_gradient:
            return text
        return (
            f"{text}\nNothing will be learned: the arg-max has no derivative, so the gradient of all "
            f"{sum(parameter.numel() for parameter in self.trainable_parameters()):,} weights is exactly zero.\n"
            "The loss will stay as it is. StraightThrough and GumbelSoftmax pass a gradient; Soft needs none."
        )

    def current_prompt(self) -> Tensor:
        """Return the base, which all questions share, as a prompt ``[P, D]``."""
        base = self.refiner.base
        assert isinstance(base, Tensor)
        if isinstance(self.estimator, ScoreRelaxation):
            return self.matrix[self.estimator.tokens(base, self.matrix, self.allowed_ids)]
        return base

    def refine(self, states: Tensor, mask: Tensor) -> Tensor:
        """See `RefinerMethod`."""
        output: Tensor = self.refiner(states, mask)
        if not isinstance(self.estimator, ScoreRelaxation):
            return output
        return self.matrix[self.estimator.tokens(output, self.matrix, self.allowed_ids)]

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        scored = isinstance(self.estimator, ScoreRelaxation)
        with torch.device("meta"):
            matrix = torch.empty(shape.vocabulary, shape.width)
            read = LMShape.of(self.reader_config).width if self.other_lms() else shape.width
            base = torch.empty(self.length, shape.vocabulary if scored else shape.width)
            refiner = (
                ScoreRefiner(base, matrix, self.network, self.head, read)
                if scored
                else VectorRefiner(base, 1.0, self.network, self.head, read, self.scale)
            )
        trained = sum(part_sizes(refiner).values())
        kept = 2 * matrix.numel() if scored else base.numel()  # E and its directions
        # Scores, noise and softmax; or the bounded change and the prompt.
        saved = (4 if scored else 2) * batch_size * base.numel()
        return MemoryEstimate(trained, kept, saved, self.length, per_question=True, backward=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        del batch_idx
        batch = self.own_part(batch)
        prompts = self.refiner(*self.states(batch.examples))
        if isinstance(self.estimator, ScoreRelaxation):
            temperature = self.temperature_now(self.temperature)
            self.log("train/temperature", temperature, batch_size=batch.total)
            noise = PartNoise(self.step_generator(), batch.start, batch.total)
            prompts = self.estimator.train_vectors(prompts, self.matrix, self.allowed_ids, temperature, noise)
        return self.answer_step(batch, prompts, self.objective)

    def relaxed_prompt_for(self, examples: Sequence[Example]) -> Tensor | None:
        """Return the relaxed prompts without noise, ``[B, P, D]``, at the current or final temperature."""
        if not isinstance(self.estimator, ScoreRelaxation):
            return None
        scores = self.refiner(*self.states(examples))
        temperature = self.temperature_now(self.temperature)
        return self.estimator.relaxed_vectors(scores, self.matrix, self.allowed_ids, temperature)
