"""A token prompt learned by REINFORCE (Williams 1992; RLPrompt, Deng et al. 2022), for the task or each question.

Prompt: a distribution over ``S`` tokens ``[B, P, S]``. Estimator: score function with a baseline. Objective: expected
reward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.estimators.baselines import Baseline, BaselineState, LeaveOneOut
from lightning_prompts.estimators.reinforce import (
    Shaping,
    Support,
    TopK,
    ZScore,
    entropy,
    log_probability,
    sample,
    surrogate_loss,
    whiten,
)
from lightning_prompts.estimators.relaxations import PartNoise
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate, Query
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.refined import RefinerMethod
from lightning_prompts.objectives.rewards import AnswerLikelihood, Reward
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.refiners.heads import Head, Tied
from lightning_prompts.refiners.networks import RefinerNetwork, masked_mean
from lightning_prompts.refiners.refiner import ScoreRefiner
from lightning_prompts.template import final_result
from lightning_prompts.types import Batch, Example

MEMORY = 200_000  # maximum number of remembered rewards


class ReinforceRefiner(RefinerMethod):
    """Draws ``K`` prompts for each question, rewards the answers, and makes rewarded prompts likelier.

    The policy starts with the LM's own next-token distribution, and is limited to its likeliest tokens. The others are
    mostly noise, and give nearly constant rewards, which carry no signal.

    Args:
        length: ``P``, number of tokens.
        samples: ``K``, number of prompts drawn for each question in each step.
        refiner: ``MLPRefiner`` or ``TransformerRefiner``; ``None`` for one prompt for the task.
        head: ``Tied``, ``Factored`` or ``Full``.
        start: Text; the policy starts with the LM's distribution of the next token after it, at every position.
        support: Which tokens the policy may draw.
        reward: Reward of an answer.
        baseline: Baseline to subtract from the rewards.
        shaping: Transformation of the rewards before the baseline is subtracted; ``None`` for no change.
        whitened: Give advantages mean 0 and standard deviation 1 over the batch.
        entropy_weight: Weight of the policy's entropy, in nats per position.
        readable: Allow only words of ASCII letters and punctuation.
        pass_rows: Maximum number of rows in one forward pass.
        query: Which hidden states of the question the refiner reads.
        cache_states: Compute the hidden states once and keep them on disk, instead of in every step.
        base_lr: Learning rate of the scores that all questions share.
        lm: The frozen language model.
        optimizer: Optimiser; its learning rate is the network's.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    estimator_name = "score function (REINFORCE)"
    gradient_through_lm = False
    matrix: Tensor
    support_ids: Tensor

    def __init__(
        self,
        length: int = 2,
        samples: int = 8,
        refiner: RefinerNetwork | None = None,
        head: Head = Tied(),
        start: str = "Here are two",
        support: Support = TopK(),
        reward: Reward = AnswerLikelihood(),
        baseline: Baseline = LeaveOneOut(),
        shaping: Shaping | None = None,
        whitened: bool = False,
        entropy_weight: float = 0.0,
        readable: bool = False,
        pass_rows: int = 256,
        query: Query = Query(),
        cache_states: bool = True,
        base_lr: float = 0.1,
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=1e-3),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; `build_prompt` creates the policy."""
        super().__init__(query, cache_states, base_lr, lm, max_new_tokens, optimizer, scheduler)
        if length < 1:
            raise UserError(f"length must be at least 1, got {length}: there must be something to draw")
        check_at_least("samples (K)", samples)
        if samples < baseline.least_samples:
            raise UserError(
                f"samples (K) must be at least {baseline.least_samples} for {type(baseline).__name__}, got {samples}: "
                "it compares the prompts of one question with each other"
            )
        if baseline.needs_greedy and isinstance(shaping, ZScore):
            raise UserError(
                "shaping ZScore compares the prompts of one question with each other, and SelfCritical's is alone; "
                "use another baseline, or whitened: true instead of the shaping"
            )
        if samples < 2 and isinstance(shaping, ZScore):
            raise UserError("shaping ZScore of one prompt is 0 whatever its reward; set samples (K) to at least 2")
        check_finite("pass_rows", pass_rows, 1)
        check_finite("entropy_weight", entropy_weight)
        self.length = length
        self.samples = samples
        self.network = refiner
        self.head = head
        self.start = start
        self.support = support
        self.reward = reward
        self.baseline_kind = baseline
        self.shaping = shaping
        self.whitened = whitened
        self.entropy_weight = entropy_weight
        self.readable = readable
        self.pass_rows = pass_rows
        self.pooled = refiner is None or refiner.pooled
        self.remembered: OrderedDict[tuple[Hashable, ...], float] = OrderedDict()
        self.baseline: BaselineState

    @property
    def prompt_kind(self) -> str:  # type: ignore[override]
        """A distribution over tokens, for the task or for each question."""
        return f"distribution over tokens, one {'for the task' if self.network is None else 'per question'}"

    @property
    def objective_name(self) -> str:
        """The expected reward, by name."""
        return f"expected {self.reward.name.replace('_', ' ')}"

    def build_prompt(self) -> None:
        """Start with the LM's distribution of the next token after ``start``."""
        self.query.check(self.lm)
        self.reward.check(self.lm.device)
        allowed_ids = allowed_tokens(self.lm, self.readable)
        ids = list(self.lm.encoder.bos_ids) + self.lm.encoder.tokens(self.start, start=True)
        if not ids:
            raise UserError("start is empty; give the text whose continuation the first prompts are drawn from")
        with torch.no_grad():
            one = torch.empty(1, self.lm.width, device=self.lm.device)  # its value does not matter
            logits = self.lm.prompt_logits(ids, one)[0]
        known = torch.log_softmax(logits.masked_fill(~allowed_ids, float("-inf")), -1)
        kept = allowed_ids.nonzero()[:, 0]
        self.register_buffer("support_ids", kept[self.support.keep(known[kept])])
        matrix = self.lm.embedding_matrix().float()[self.support_ids]
        self.register_buffer("matrix", matrix, persistent=False)
        base = known[self.support_ids].expand(self.length, -1)
        self.refiner = ScoreRefiner(base, matrix, self.network, self.head, self.lm.width)
        self.baseline = self.baseline_kind.build(self.lm.width)
        self.register_load_state_dict_post_hook(_follow_support)  # type: ignore[no-untyped-call]

    def reads_questions(self) -> bool:
        """Return whether the policy or the baseline reads hidden states of the questions."""
        return self.network is not None or any(True for _ in self.baseline.parameters())

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; weights fit only one network, head, support and baseline."""
        return {
            **super().checkpoint_meta(),
            "refiner": f"{self.network} {self.head}",
            "support": len(self.support_ids),
            "baseline": repr(self.baseline_kind),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the method, and forget the rewards, so this run and a resumed one continue alike."""
        super().on_save_checkpoint(checkpoint)
        self.remembered.clear()

    def follow_support(self) -> None:
        """Update the embeddings to the tokens of the support, which a checkpoint may have changed."""
        matrix = self.lm.embedding_matrix().float()[self.support_ids]
        self.matrix.copy_(matrix)
        self.refiner.set_matrix(matrix)  # type: ignore[operator]

    def current_prompt(self) -> Tensor:
        """Return the likeliest prompt under the base, which all questions share, ``[P, D]``."""
        base = self.refiner.base
        assert isinstance(base, Tensor)
        return self.matrix[base.argmax(-1)]

    def prompt_text(self) -> str | None:
        """Return the text of the likeliest prompt, or ``None`` if each question has its own prompt."""
        base = self.refiner.base
        assert isinstance(base, Tensor)
        return self.lm.text(self.support_ids[base.argmax(-1)]) if self.network is None else None

    def refine(self, states: Tensor, mask: Tensor) -> Tensor:
        """See `RefinerMethod`; return the likeliest prompts."""
        return self.matrix[self.refiner(states, mask).argmax(-1)]

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        count = self.support.count if isinstance(self.support, TopK) else shape.vocabulary
        with torch.device("meta"):
            base, matrix = torch.empty(self.length, count), torch.empty(count, shape.width)
            refiner = ScoreRefiner(base, matrix, self.network, self.head, shape.width)
            baseline = self.baseline_kind.build(shape.width)
        trained = sum(value.numel() for part in (refiner, baseline) for value in part.parameters())
        saved = (2 + self.samples) * batch_size * base.numel()  # two for the distribution, one for each draw
        rows = min(self.pass_rows, batch_size * self.samples)
        return MemoryEstimate(trained, 2 * matrix.numel(), saved, self.length, per_question=True, rows=rows)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw prompts, compute their rewards, and return the surrogate loss."""
        del batch_idx
        batch = self.own_part(batch)
        states, mask = self.states(batch.examples)
        scores = self.refiner(states, mask)
        noise = PartNoise(self.step_generator(), batch.start, batch.total)
        prompts = sample(scores.detach(), self.samples, noise)
        rewards = self.rewards(batch.examples, prompts)
        pooled = masked_mean(states, mask)
        greedy = None
        if self.baseline_kind.needs_greedy:
            greedy = self.rewards(batch.examples, scores.detach().argmax(-1)[:, None])[:, 0]
            if self.shaping is not None:
                greedy = self.shaping(greedy[:, None])[:, 0]
        shaped = rewards if self.shaping is None else self.shaping(rewards)
        advantages = shaped - self.baseline(shaped, greedy, pooled)
        self.baseline.update(self._of_all(batch, shaped))
        if self.whitened:
            advantages = whiten(advantages, self._of_all(batch, advantages))
        entropies = entropy(scores).mean() / self.length
        loss = surrogate_loss(log_probability(scores, prompts), advantages) - self.entropy_weight * entropies
        value_loss = self.baseline.loss(shaped, pooled)
        self.log_step("train/loss", batch.weight * loss, batch)
        self.log_step("train/reward", batch.weight * rewards.mean(), batch, prog_bar=True)
        self.log_step("train/entropy", batch.weight * entropies, batch)
        return batch.weight * (loss if value_loss is None else loss + value_loss)

    def _of_all(self, batch: Batch, values: Tensor) -> Tensor:
        """Gather the ``[B, K]`` values of a whole batch from all processes, in order."""
        if self.data_parallel_rank.count == 1:
            return values
        own = list(values.detach().cpu()) if batch.weight else []
        return torch.stack(self.data_parallel_rank.all_gather(own)).to(values.device)

    @torch.no_grad()
    def rewards(self, examples: Sequence[Example], prompts: Tensor) -> Tensor:
        """Compute or look up the rewards ``[B, K]`` of prompts ``[B, K, P]``, given as indices into the support."""
        ids = self.support_ids[prompts].tolist()
        keys = [[(example.identity, *prompt) for prompt in row] for example, row in zip(examples, ids, strict=True)]
        # New prompts of a question stay together without duplicates, so the text before its prompt runs once.
        new = {key: (b, k) for b, row in enumerate(keys) for k, key in enumerate(row) if key not in self.remembered}
        todo = list(new.items())
        for start in range(0, len(todo), self.pass_rows):
            part = todo[start : start + self.pass_rows]
            vectors = torch.stack([self.matrix[prompts[b, k]] for _, (b, k) in part])
            values = self._judge([examples[b] for _, (b, _) in part], vectors)
            self.remembered.update(zip([key for key, _ in part], values, strict=True))
        known = [[self.remembered[key] for key in row] for row in keys]
        rewards = to_device(torch.tensor(known, dtype=torch.float32, device="cpu"), self.lm.device)
        while len(self.remembered) > MEMORY:
            self.remembered.popitem(last=False)
        return rewards

    def _judge(self, examples: Sequence[Example], vectors: Tensor) -> list[float]:
        """Compute the rewards of prompts ``[B, P, D]``, one for each example."""
        texts: list[str] = []
        likelihoods: list[float] = []
        if self.reward.needs_text:
            written = self.lm.generate(examples, vectors, self.max_new_tokens)
            texts = [final_result(text, example.extract) for text, example in zip(written, examples, strict=True)]
        if self.reward.needs_likelihood:
            likelihoods = (-self.lm.score(examples, vectors).nll).exp().tolist()
        references = [example.reference or "" for example in examples]
        return self.reward(texts, references, likelihoods)


def _follow_support(method: ReinforceRefiner, incompatible: object) -> None:
    """Update the embeddings after loading: the saved support may differ by the start text, dtype or machine."""
    method.follow_support()
