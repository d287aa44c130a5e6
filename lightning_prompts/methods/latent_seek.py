"""Vectors moved for each question at test time (LatentSeek, Li et al. 2025, arXiv 2505.13308).

Prompt: vectors for each question ``[B, P, D]``. Estimator: backpropagation; at test time the policy gradient.
Objective: answer likelihood; at test time the LM's own judgement of its answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.lm import LMConfig, LMShape, MemoryEstimate, label_scores
from lightning_prompts.lm.labels import class_log_probs, split_by_labels
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.soft_prompt_tuning import SoftPromptTuning
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.soft import Reparametrization
from lightning_prompts.types import Example

Answer: TypeAlias = tuple[str, str, str]  # the text before the prompt slot, the text after it, the answer


class LatentSeek(SoftPromptTuning):
    """Trains ``P`` vectors, and moves a copy of them for each question when the question is asked.

    Each of the ``steps`` takes the gradient of the expected reward of the LM's answers. The reward of an answer is the
    probability with which the LM itself calls it right; no reference answer is used. For questions with classes the
    expectation is exact; otherwise ``samples`` answers are drawn in each step. Validation moves the vectors as well.

    The paper moves the hidden states that its first answer tokens are read from. This class moves vectors in the
    prompt slot, which every LM takes.

    Args:
        steps: Steps of each question; 0 for none.
        step_size: Learning rate of these steps, which Adam takes.
        samples: ``K``, answers drawn in each step for a question without classes.
        verification: Text after a question and an answer that asks the LM whether the answer is right, yes or no.
        pass_rows: Maximum number of rows in a pass with gradients, at least ``K``.
        length: ``P``, number of vectors.
        init: Initial vectors.
        reparametrization: Network between the parameters and the prompt; ``None`` for none.
        objective: Training objective.
        lm: The frozen language model.
        optimizer: Optimiser of the prompt's parameters in training.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    prompt_kind = "soft embeddings [B, P, D], one prompt per question"

    def __init__(
        self,
        steps: int = 5,
        step_size: float = 0.03,
        samples: int = 4,
        verification: str = "\n\nIs this answer right, yes or no?",
        pass_rows: int = 16,
        length: int = 20,
        init: Initializer = RandomTokens(),
        reparametrization: Reparametrization | None = None,
        objective: Likelihood = Likelihood(),
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings."""
        super().__init__(length, init, reparametrization, objective, lm, optimizer, scheduler, max_new_tokens)
        check_at_least("steps", steps, 0)
        check_finite("step_size", step_size, above=True)
        check_at_least("samples (K)", samples, 2)  # the reward of an answer is compared with those of the others
        if not verification.strip():
            raise UserError("verification is empty; give a text that asks whether an answer is right, yes or no")
        check_at_least("pass_rows", pass_rows, samples)
        self.steps = steps
        self.step_size = step_size
        self.samples = samples
        self.verification = verification
        self.pass_rows = pass_rows

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        return replace(super().memory_estimate(shape, batch_size), per_question=True)

    def added_tokens(self) -> int:
        """See `Evaluation`; the LM also reads the question with an answer and ``verification``."""
        return self.lm.count(self.verification) + 2 * self.max_new_tokens if self.steps else 0

    def prompt_for(self, examples: Sequence[Example]) -> Tensor:
        """Return the shared prompt in training, ``[P, D]``, and a prompt for each example otherwise, ``[B, P, D]``."""
        shared = self.current_prompt()
        if self.training or not examples:
            return shared
        size = self.pass_rows // self.samples
        parts = [examples[first : first + size] for first in range(0, len(examples), size)]
        return torch.cat([self.seek(part, shared) for part in parts])

    def seek(self, examples: Sequence[Example], start: Tensor) -> Tensor:
        """Move vectors ``[P, D]`` for each of ``B`` examples; return ``[B, P, D]``."""
        known: dict[Answer, float] = {}
        with torch.inference_mode(False), torch.enable_grad():
            vectors = start.detach().clone().repeat(len(examples), 1, 1).requires_grad_()
            optimizer = torch.optim.Adam([vectors], lr=self.step_size)
            for step in range(self.steps):
                (gradient,) = torch.autograd.grad(self.expected_reward(examples, vectors, step, known), vectors)
                vectors.grad = -gradient
                optimizer.step()
        return vectors.detach()

    def expected_reward(
        self, examples: Sequence[Example], vectors: Tensor, step: int, known: dict[Answer, float]
    ) -> Tensor:
        """Compute a scalar whose gradient is that of the expected reward, summed over ``B`` examples.

        Args:
            examples: ``B`` examples; their reference answers are not read.
            vectors: ``[B, P, D]``.
            step: Number of the step, which the draws depend on.
            known: Rewards of earlier steps; new ones are added.
        """
        asked = [replace(example, answer=None) for example in examples]
        total = vectors.new_zeros(())
        for places, reward in zip(split_by_labels(examples), (self._of_classes, self._of_drawn), strict=True):
            if places:
                part = to_device(places, vectors.device)
                total = total + reward([asked[place] for place in places], vectors[part], step, known)
        return total

    def _of_classes(
        self, examples: Sequence[Example], vectors: Tensor, step: int, known: dict[Answer, float]
    ) -> Tensor:
        """The expected reward of the classes."""
        del step
        classes = [(n, names[0]) for n, example in enumerate(examples) for names in example.labels]
        rewards = self._rewards([examples[n] for n, _ in classes], [name for _, name in classes], known)
        scored = self.lm.label_sums(examples, vectors)
        parts = rewards.split([len(example.labels) for example in examples])
        expected = [
            class_log_probs(sums, owners).exp() @ own
            for sums, owners, own in zip(scored.sums, scored.owners, parts, strict=True)
        ]
        return torch.stack(expected).sum()

    def _of_drawn(self, examples: Sequence[Example], vectors: Tensor, step: int, known: dict[Answer, float]) -> Tensor:
        """The score function estimate from drawn answers, with the mean of the other draws as baseline."""
        rows = torch.arange(len(examples), device=vectors.device).repeat_interleave(self.samples)
        copies = [example for example in examples for _ in range(self.samples)]
        seeds = [
            zlib.crc32(f"{example.before}{example.after} {step} {draw}".encode())
            for example in examples
            for draw in range(self.samples)
        ]
        with torch.no_grad():
            texts = self.lm.generate(
                copies, vectors.detach()[rows], self.max_new_tokens, Sampling(1.0, seeds, self.samples)
            )
        written = [n for n, text in enumerate(texts) if text]  # an empty answer has no tokens to make likelier
        rewards = torch.zeros(len(texts), device=vectors.device)
        if not written:
            return vectors.sum() * 0
        chosen = to_device(written, vectors.device)
        rewards[chosen] = self._rewards([copies[n] for n in written], [texts[n] for n in written], known)
        rewards = rewards.view(-1, self.samples)
        others = (rewards.sum(-1, keepdim=True) - rewards) / (self.samples - 1)
        advantages = (rewards - others).flatten()[chosen] / self.samples
        answered = [replace(copies[n], answer=_after(copies[n], texts[n])) for n in written]
        scores = self.lm.score(answered, vectors[rows[chosen]])
        return -(advantages * scores.nll * scores.tokens).sum()

    def _rewards(self, examples: Sequence[Example], answers: Sequence[str], known: dict[Answer, float]) -> Tensor:
        """Look up the rewards ``[B]`` of answers, and judge those that are new."""
        keys = [(one.before, one.after, answer) for one, answer in zip(examples, answers, strict=True)]
        new = {key: n for n, key in enumerate(keys) if key not in known}
        if new:
            judged = self.judge([examples[n] for n in new.values()], [answers[n] for n in new.values()])
            known.update(zip(new, judged.tolist(), strict=True))
        return to_device(torch.tensor([known[key] for key in keys], device="cpu"), self.lm.device)

    @torch.no_grad()
    def judge(self, examples: Sequence[Example], answers: Sequence[str]) -> Tensor:
        """Compute the LM's probability ``[B]`` that answers are right, without a prompt.

        Args:
            examples: ``B`` examples.
            answers: An answer to each.
        """
        claims = [
            replace(
                example,
                after=f"{example.after}{_after(example, answer)}{self.verification}",
                reference=None,
                labels=(("yes",), ("no",)),
            )
            for example, answer in zip(examples, answers, strict=True)
        ]
        return label_scores(self.lm, claims, self.lm.no_prompt()).log_probs[:, 0].exp()


def _after(example: Example, answer: str) -> str:
    """An answer as it follows an example, with a space unless there is white space before it."""
    text = example.before + example.after
    return answer if not text or text[-1].isspace() else f" {answer}"
