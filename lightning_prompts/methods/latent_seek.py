"""Soft vectors that are moved for each question at test time (LatentSeek, Li et al. 2025, arXiv 2505.13308).

Prompt: vectors for each question ``[B, P, D]``. Estimator: backpropagation; at test time the policy gradient.
Objective: answer likelihood; at test time the LM's own judgement of its answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.lm import LMConfig, label_scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.generation import generate_tokens
from lightning_prompts.lm.labels import class_log_probs, split_by_labels
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.soft_prompt_tuning import SoftPromptTuning
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.soft import Reparametrization
from lightning_prompts.template import cut
from lightning_prompts.types import Batch, Example

ANSWER = "{answer}"
JUDGED = (("yes",), ("no",))
SCALE = 1024.0  # of gradients, so that small ones do not become zero in float16

Known: TypeAlias = dict[tuple[object, ...], float]  # the rewards of answers


@dataclass(frozen=True)
class Answers:
    """Answers to a question that a step moves the vectors by.

    Attributes:
        tokens: Token ids of each answer, at least one.
        texts: The texts that are judged: of each class, or of each drawn answer.
        owners: The class of each answer; empty for drawn answers.
    """

    tokens: Sequence[Sequence[int]]
    texts: Sequence[str]
    owners: tuple[int, ...] = ()


class LatentSeek(SoftPromptTuning):
    """Trains ``P`` vectors, and moves a copy of them for each question that is evaluated.

    Each of the ``steps`` follows the gradient of the expected reward of the LM's answers. The reward of an answer is
    the LM's probability of yes when it is asked whether the answer is right. Reference answers are not used. The
    expectation over classes is exact. Free-text answers are drawn, ``samples`` in each step. Validation moves the
    vectors as well.

    The paper moves the hidden states that predict the first tokens of an answer. This class moves vectors in the prompt
    slot, which every LM takes.

    Args:
        length: ``P``, number of vectors.
        steps: Steps for each question; 0 for none.
        step_size: Learning rate of Adam in these steps.
        samples: ``K``, number of free-text answers drawn in each step.
        verification: Text after a question that asks the LM whether ``{answer}`` is right, yes or no.
        pass_rows: Maximum number of questions in a pass with gradients.
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
        length: int = 20,
        steps: int = 5,
        step_size: float = 0.03,
        samples: int = 4,
        verification: str = " {answer}\n\nIs this answer right, yes or no?",
        pass_rows: int = 16,
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
        check_at_least("pass_rows", pass_rows)
        if ANSWER not in verification:
            raise UserError(f"verification must contain {ANSWER}, which the model judges, got {verification!r}")
        if steps and lm.calibrate_labels:
            raise UserError("LatentSeek moves vectors by uncalibrated probabilities; leave out lm.calibrate_labels")
        self.steps = steps
        self.step_size = step_size
        self.samples = samples
        self.verification = verification
        self.pass_rows = pass_rows

    def _check_sharding(self) -> None:
        """Refuse also weights that are sharded over processes, whose steps differ in number."""
        super()._check_sharding()
        if self.steps and self.lm.shards is not None and self.lm.shards.lockstep is not None:
            raise UserError(
                "LatentSeek takes steps for each question, in which processes cannot share the weights; set "
                "trainer.strategy.data_parallel_size to 1, or model.steps to 0"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Compute the loss of a batch under the vectors that all questions start from."""
        del batch_idx
        return self.answer_step(self.own_part(batch), self.current_prompt(), self.objective)

    def prompt_for(self, examples: Sequence[Example]) -> Tensor:
        """Return the moved vectors of examples, ``[B, P, D]``; without steps those that all share, ``[P, D]``."""
        start = self.current_prompt()
        if not self.steps or not examples:
            return start
        firsts = range(0, len(examples), self.pass_rows)
        return torch.cat([self.seek(examples[first : first + self.pass_rows], start) for first in firsts])

    def seek(self, examples: Sequence[Example], start: Tensor) -> Tensor:
        """Move vectors ``[P, D]`` for each of ``B`` examples.

        Returns:
            ``[B, P, D]``.
        """
        asked = [replace(example, answer=None) for example in examples]
        rows = self.lm.encode(asked, len(start), ahead=2)  # room for a token and its end
        known: Known = {}
        with torch.inference_mode(False), torch.enable_grad():
            vectors = start.detach().clone().repeat(len(examples), 1, 1).requires_grad_()
            optimizer = torch.optim.Adam([vectors], lr=self.step_size)
            for step in range(self.steps):
                reward = self.expected_reward(examples, rows, vectors, step, known)
                (gradient,) = torch.autograd.grad(SCALE * reward, vectors)
                finite = gradient.isfinite().flatten(1).all(1)[:, None, None]
                vectors.grad = torch.where(finite, -gradient / SCALE, 0.0)
                optimizer.step()
        return vectors.detach()

    def expected_reward(
        self, examples: Sequence[Example], rows: Sequence[Row], vectors: Tensor, step: int, known: Known
    ) -> Tensor:
        """Compute a scalar whose gradient is that of the expected reward, summed over ``B`` examples.

        Args:
            examples: ``B`` examples.
            rows: The same as token ids.
            vectors: ``[B, P, D]``.
            step: Number of the step, which the draws depend on.
            known: Rewards of earlier steps; new ones are added.
        """
        answers = self.answers(examples, rows, vectors.detach(), step)
        rewards = self._rewards(examples, answers, known)
        contexts = [row.context for row in rows]
        sums = self.lm.continuation_scores(contexts, [each.tokens for each in answers], vectors)
        total = vectors.new_zeros(())
        for each, own, logs in zip(answers, rewards, sums.split([len(each.tokens) for each in answers]), strict=True):
            # Differences of rewards are exactly zero between equal ones, so that rounding does not move vectors.
            if each.owners:
                own = own.to(logs)
                total = total + own[0] + class_log_probs(logs, each.owners).exp() @ (own - own[0])
            else:
                others = (own[:, None] - own).sum(1) / (self.samples - 1)  # a reward less the mean of the others
                total = total + others.to(logs) @ logs / self.samples
        return total

    def answers(self, examples: Sequence[Example], rows: Sequence[Row], vectors: Tensor, step: int) -> list[Answers]:
        """Return the classes of examples, and draw answers to those without classes; see `expected_reward`."""
        _, free = split_by_labels(examples)
        drawn: Iterator[Answers] = iter(())
        if free:
            part = vectors[to_device(free, vectors.device)]
            drawn = iter(self._draw([examples[n] for n in free], [rows[n] for n in free], part, step))
        found = []
        for example, row in zip(examples, rows, strict=True):
            if not example.labels:
                found.append(next(drawn))
                continue
            known = self.lm.encoder.label_tokens(example)
            self.lm.check_fits(example, len(row.context) + max(map(len, known.tokens)), vectors.shape[1])
            found.append(Answers(known.tokens, [names[0] for names in example.labels], known.owners))
        return found

    def _draw(self, examples: Sequence[Example], rows: Sequence[Row], vectors: Tensor, step: int) -> list[Answers]:
        """Draw ``K`` answers to each example, with the token that ends each."""
        every = [(n, draw) for n in range(len(examples)) for draw in range(self.samples)]
        seeds = [zlib.crc32(f"{examples[n].before}\0{examples[n].after}\0{step} {draw}".encode()) for n, draw in every]
        asked, copies = [rows[n] for n, _ in every], vectors.repeat_interleave(self.samples, 0)
        ending = self.lm.ending(asked, copies, self.max_new_tokens, [examples[n].stop for n, _ in every])
        sampling = Sampling(1.0, seeds, self.samples)
        with torch.no_grad():
            drawn = generate_tokens(self.lm, asked, copies, ending, sampling)
        ends = [self.lm.encoder.end_token(examples[n].chat) for n, _ in every]
        tokens = [
            ids if end is None or ending.reached(k, ids) else [*ids, end]
            for k, (ids, end) in enumerate(zip(drawn, ends, strict=True))
        ]
        texts = [
            cut(self.lm.text(ids, special=False), examples[n].stop) for ids, (n, _) in zip(drawn, every, strict=True)
        ]
        places = [slice(n * self.samples, (n + 1) * self.samples) for n in range(len(examples))]
        return [Answers(tokens[place], texts[place]) for place in places]

    def _rewards(self, examples: Sequence[Example], answers: Sequence[Answers], known: Known) -> list[Tensor]:
        """Look up the rewards of the answers to each example in float64, and judge those that are new."""
        keys = [
            [(one.chat, one.system, one.before, one.after, text) for text in each.texts]
            for one, each in zip(examples, answers, strict=True)
        ]
        new = {
            key: self.claim(example, str(key[-1]))
            for example, own in zip(examples, keys, strict=True)
            for key in own
            if key not in known
        }
        for first in range(0, len(new), self.pass_rows):
            part = list(new.items())[first : first + self.pass_rows]
            known.update(zip([key for key, _ in part], self.judge([claim for _, claim in part]), strict=True))
        return [torch.tensor([known[key] for key in own], dtype=torch.double, device="cpu") for own in keys]

    def claim(self, example: Example, answer: str) -> Example:
        """Ask whether an answer to an example is right."""
        asked = self.verification.replace(ANSWER, answer)
        return replace(example, after=example.after + asked, answer=None, reference=None, labels=JUDGED)

    def judge(self, claims: Sequence[Example]) -> list[float]:
        """Compute the LM's probability of yes for each claim, without a prompt."""
        yes: list[float] = label_scores(self.lm, claims, self.lm.no_prompt()).log_probs[:, 0].exp().tolist()
        return yes

    def _check_lengths(self) -> None:
        """Check also that the questions fit with an answer and ``verification``."""
        super()._check_lengths()
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.trainer.state.fn is None or not self.steps:
            return
        for split in self.splits_ahead():
            for example in [] if split == "train" else data.examples(split):
                longest = max((names[0] for names in example.labels), key=len, default="")
                drawn = 0 if example.labels else 3 * self.max_new_tokens  # a drawn byte may be three when it is read
                total = self.lm.length(self.claim(example, longest)) + drawn + 1
                if total > self.lm.context:
                    raise UserError(
                        f"{example.source or 'example'}: text, answer and verification may be {total} tokens, more "
                        f"than the context window of {self.lm.name} ({self.lm.context}); shorten verification, lower "
                        "max_new_tokens or drop the row"
                    )
