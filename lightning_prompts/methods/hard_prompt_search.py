"""Gradient-guided search over token prompts (AutoPrompt, Shin et al. 2020; GCG, Zou et al. 2023).

Prompt: token ids ``[P]``. Estimator: token gradients plus search. Objective: answer likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.discrete import DiscretePromptMethod
from lightning_prompts.methods.training import SearchOptimizer
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import FromText, Initializer
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.search.candidates import draw_candidates, round_trips, top_tokens
from lightning_prompts.search.scoring import CandidateScorer, Racing, race
from lightning_prompts.types import Batch

ACCUMULATED = "accumulated"  # in checkpoints


class HardPromptSearch(DiscretePromptMethod):
    """Replaces tokens of a text prompt by better ones, which the gradient with respect to the one-hot rows suggests.

    A step computes the gradient on a batch, draws candidates from the ``top_k`` tokens of each position, and scores
    them and the buffer on the same batch. The best become the new buffer.

    Args:
        length: ``P``, number of tokens; ``None`` for the length of the initial text.
        init: Initial prompt.
        candidates: ``C``, number of candidates drawn per step.
        top_k: Number of tokens to choose from at each position.
        n_replace: Maximum number of tokens that change at once.
        buffer: Number of best prompts that the next step scores again.
        filter: Drop candidates whose text is tokenised to other tokens.
        readable: Allow only words of ASCII letters and punctuation.
        fluency: Weight of the prompt's own negative log-likelihood, in nats per token; 0 for none.
        racing: Drop bad candidates after a few examples; ``None`` scores all on the whole batch.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        objective: Training objective.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    gradient_through_lm = False  # the gradient's scale does not matter, only the order of its elements
    prompt_kind = "token ids [P]"
    estimator_name = "token gradients plus search"
    objective: Likelihood
    buffer_ids: Tensor
    allowed_ids: Tensor

    _rows: list[Row]  # rows of the accumulated gradient
    _fluency_gradient: Tensor

    def __init__(
        self,
        length: int | None = None,
        init: Initializer = FromText(" Answer the question, please."),
        candidates: int = 64,
        top_k: int = 256,
        n_replace: int = 1,
        buffer: int = 1,
        filter: bool = True,
        readable: bool = False,
        fluency: float = 0.0,
        racing: Racing | None = None,
        memory_mb: float = 256.0,
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; `build_prompt` creates the prompt."""
        super().__init__(lm, max_new_tokens)
        for name, value in (("candidates", candidates), ("top_k", top_k), ("n_replace", n_replace), ("buffer", buffer)):
            check_at_least(f"{name}", value)
        if not 0 <= fluency < float("inf"):
            raise UserError(f"fluency must not be negative, got {fluency}")
        if not memory_mb > 0:
            raise UserError(f"memory_mb must be above 0, got {memory_mb}")
        if length is None and not isinstance(init, FromText):
            raise UserError("length is needed, unless init is FromText")
        if length is not None and length < 1:
            raise UserError(f"length must be at least 1, got {length}")
        self.length, self.init = length, init
        self.candidates, self.top_k, self.n_replace, self.buffer = candidates, top_k, n_replace, buffer
        self.filter, self.readable, self.fluency, self.racing = filter, readable, fluency, racing
        self.memory_mb = memory_mb
        self.objective = objective

    @property
    def objective_name(self) -> str:
        """The answer likelihood, with the fluency if it has a weight."""
        return "answer likelihood" + (f" + {self.fluency} x fluency" if self.fluency else "")

    def build_prompt(self) -> None:
        """Start with the initialiser's tokens.

        Raises:
            UserError: There are fewer allowed tokens than ``top_k``, or the initial prompt's text is tokenised to other
                tokens.
        """
        self.register_buffer("allowed_ids", allowed_tokens(self.lm, self.readable), persistent=False)
        if self.top_k > (count := int(self.allowed_ids.sum())):
            raise UserError(f"top_k ({self.top_k}) is more than the {count} tokens that a prompt may have")
        if self.length is None:
            assert isinstance(self.init, FromText)
            self.length = len(self.init.token_ids(self.lm))
        ids = self.lm.nearest_tokens(self.init(self.lm, self.length))[0]
        if self.filter and not round_trips(self.lm, ids[None]).item():
            raise UserError(
                f"the initial prompt {self.lm.text(ids)!r} becomes other tokens when it is tokenised again, and so "
                "would all candidates: start from FromText, or set filter to false"
            )
        self.embeddings = torch.nn.Parameter(self.lm.embed(ids).float())
        self.register_buffer("buffer_ids", ids[None].repeat(self.buffer, 1))
        self.keep_ids(self.length)
        self.scorer = CandidateScorer(self.lm, self.memory_mb, self.map_across_ranks)
        self._start_over()

    def describe_trained(self) -> str:
        """Return the number of tokens as text."""
        return f"{self.length} tokens"

    def token_ids(self) -> Tensor:
        """Return the best prompt of the buffer, ``[P]``."""
        return self.buffer_ids[0]

    def configure_optimizers(self) -> SearchOptimizer:
        """Return the search in the form of an optimiser."""
        return SearchOptimizer([self.embeddings], self._search)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: only the order of the gradient's elements matters."""

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        length = self.length
        if length is None:
            assert isinstance(self.init, FromText)
            length = len(shape.encoder.tokens(self.init.text))
        return MemoryEstimate(length * shape.width, length=length, backward=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rows and the fluency gradient of accumulated batches."""
        super().on_save_checkpoint(checkpoint)
        if self.accumulating:
            rows = [[row.context, row.answer, row.end] for row in self._rows]
            checkpoint[ACCUMULATED] = {"rows": rows, "fluency_gradient": self._fluency_gradient}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the rows and the fluency gradient of accumulated batches, to resume between them."""
        super().on_load_checkpoint(checkpoint)
        if ACCUMULATED in checkpoint and self._trainer is not None and self.trainer.training:
            self._rows = [Row(*parts) for parts in checkpoint[ACCUMULATED]["rows"]]
            self._fluency_gradient = checkpoint[ACCUMULATED]["fluency_gradient"].to(self.lm.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of the current prompt on a batch; its gradient guides the search."""
        del batch_idx
        self._rows += self.lm.encode_answers(batch.examples, self.embeddings, self.objective.with_end)
        loss = self.answer_step(self.own_part(batch), self.embeddings, self.objective)
        if self.fluency:
            logits = self.lm.prompt_logits(self._before(), self.embeddings)
            # The prompt is both input and target. The backward pass gives the gradient of the input; this is that of
            # the target. Lightning divides the loss by the number of accumulated batches.
            batches = self.trainer.accumulate_grad_batches if self._trainer is not None else 1
            share = self.fluency / len(logits) / batches
            self._fluency_gradient = self._fluency_gradient - share * functional.log_softmax(logits.detach(), -1)
            loss = loss + self.fluency * functional.cross_entropy(logits, self.token_ids())
        return loss

    def _before(self) -> list[int]:
        """Return the tokens before the prompt in the first row, or an end token if there are none."""
        before, _ = self._rows[0].around_slot()
        return before or [int(self.lm.tokenizer.eos_token_id)]

    def _search(self) -> None:
        """Draw candidates by the gradient, and score them and the buffer on the same batch."""
        if self.embeddings.grad is None:  # a callback removed a gradient that was not finite
            return
        candidates = torch.unique(torch.cat([self.buffer_ids, self._draw(self.token_gradient())]), dim=0)
        offsets = self.fluency * self._prompt_nll(candidates) if self.fluency else None
        losses = race(self.scorer, self._rows, candidates, self.objective, self.racing, offsets)
        order = losses.argsort()[: self.buffer]
        order = order[torch.isfinite(losses[order])]  # dropped candidates have no final score
        self.log("train/candidates", float(len(candidates)))
        self.log("train/best_candidate", losses[order[0]], prog_bar=True)
        self.buffer_ids.copy_(candidates[order.repeat(self.buffer)[: self.buffer]])  # repeated if too few
        self.embeddings.copy_(self.lm.embed(self.buffer_ids[0]))

    def on_train_batch_end(self, *args: object) -> None:
        """End the step, even if mixed precision skipped the search."""
        if not self.accumulating:
            self._start_over()

    def _start_over(self) -> None:
        """Forget the rows and the fluency gradient of the last step."""
        self._rows = []
        self._fluency_gradient = torch.zeros((), device=self.lm.device)

    def token_gradient(self) -> Tensor:
        """Compute the gradient with respect to the prompt's one-hot rows, ``[P, V]``, after a backward pass."""
        gradient = self.embeddings.grad
        assert gradient is not None
        return gradient @ self.lm.embedding_matrix().float().T + self._fluency_gradient

    def _draw(self, gradient: Tensor) -> Tensor:
        """Draw candidates ``[C, P]``; if ``filter`` is set, keep those whose text has the same tokens.

        Raises:
            UserError: Several draws give no candidate.
        """
        generator = self.step_generator()
        different = False
        top = top_tokens(gradient, self.allowed_ids, self.top_k)
        for _ in range(5):
            drawn = draw_candidates(self.buffer_ids[0], top, self.candidates, self.n_replace, generator)
            different = different or len(drawn) > 0
            kept = drawn[round_trips(self.lm, drawn)] if self.filter and len(drawn) else drawn
            if len(kept):
                return kept
        if not different:
            raise UserError(
                f"step {self.trainer.global_step}: none of the candidates differs from the prompt, as the gradient "
                f"wants the tokens that it has; raise top_k ({self.top_k}) or candidates ({self.candidates})"
            )
        raise UserError(
            f"all candidates of step {self.trainer.global_step} were filtered out: they become other tokens when their "
            "text is tokenised again; raise top_k or candidates, or set filter to false"
        )

    def _prompt_nll(self, candidates: Tensor) -> Tensor:
        """Compute the mean NLL of each prompt's own tokens, ``[C]``."""
        before = self._before()
        rows = [Row(before, ids) for ids in candidates.tolist()]
        size = 64

        def nll(part: Sequence[Row]) -> list[float]:
            passes = [part[start : start + size] for start in range(0, len(part), size)]
            return [value for few in passes for value in self.lm.score_rows(few, self.embeddings[:0]).nll.tolist()]

        return to_device(self.map_across_ranks(rows, nll), candidates.device)
