"""One step of a Deep Language Network: from a batch to the prompts of the next step (algorithms 1 and 2 of the paper).

One layer is DLN-1: propose prompts, score them, and take the best. With more layers, hidden texts are latent variables.
Each hidden layer draws them from a posterior, from the top one down. The weighted draws are targets of their layer and
inputs of the layer above. The paper has two layers; with more, the best draw of a layer is the target of the layer
below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.dln.cached_lm import CachedLM
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.network import Answer, LanguageNetwork
from lightning_prompts.dln.posterior import LatentSample, Posterior
from lightning_prompts.dln.proposals import Case, Proposal, Proposals, Request, distinct
from lightning_prompts.dln.rewards import best, divergence, expected_log_probs
from lightning_prompts.errors import UserError
from lightning_prompts.types import Example


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step.

    Attributes:
        proposals: Sources of candidates.
        posterior: How hidden texts are drawn; unused for one layer.
        trust: Weight of the divergence from the current prompt's class probabilities.
        max_prompt_tokens: Maximum length of a proposal, in tokens; longer ones are dropped.
    """

    proposals: Sequence[Proposals]
    posterior: Posterior
    trust: float = 0.0
    max_prompt_tokens: int = 200


@dataclass(frozen=True)
class Candidate:
    """A scored prompt.

    Attributes:
        proposal: The prompt and its origin.
        reward: Reward on the batch.
        chosen: Whether the next step uses the prompt.
    """

    proposal: Proposal
    reward: float
    chosen: bool


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        prompts: Prompts of the next step.
        answers: Answers of the forward pass.
        candidates: Candidates by layer; none for a layer that does not learn or has no proposals.
        rewards: Rewards of the current and the chosen prompt, by layer.
        empty: Layers whose proposals were all filtered out.
    """

    prompts: list[str]
    answers: list[Answer]
    candidates: dict[int, list[Candidate]] = field(default_factory=dict)
    rewards: dict[int, tuple[float, float]] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers in the forward pass."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    def rows(self) -> list[dict[str, Any]]:
        """Return the candidates as rows of a table."""
        return [
            {
                "layer": layer,
                "kind": candidate.proposal.kind,
                "message": candidate.proposal.message,
                "reward": round(candidate.reward, 5),
                "chosen": candidate.chosen,
                "prompt": candidate.proposal.text,
            }
            for layer, candidates in self.candidates.items()
            for candidate in candidates
        ]


@dataclass(frozen=True)
class Forward:
    """A forward pass at temperature 0.

    Attributes:
        examples: The batch, ``B`` examples.
        prompts: Prompts of the layers.
        hidden: Texts of all layers but the top one, ``[N - 1][B]``.
        answers: Answers of the network, ``[B]``.
    """

    examples: list[Example]
    prompts: list[str]
    hidden: list[list[str]]
    answers: list[Answer]

    @property
    def wrong(self) -> list[int]:
        """Indices of examples with a wrong answer."""
        return [b for b, answer in enumerate(self.answers) if not answer.right]

    def below(self, index: int) -> list[str]:
        """Return the texts that layer ``index`` read besides the input, ``[B]``."""
        return self.hidden[index - 1] if index else [""] * len(self.examples)


@dataclass(frozen=True)
class Draws:
    """Hidden texts of a layer and their weights.

    Attributes:
        texts: The texts, ``[B][K]``.
        weights: Their weights, ``[B, K]``.
    """

    texts: list[list[str]]
    weights: Tensor

    @property
    def best(self) -> list[str]:
        """The texts with the largest weight, ``[B]``; ties go to the first."""
        return [several[k] for several, k in zip(self.texts, self.weights.argmax(-1).tolist(), strict=True)]


class Stepper:
    """Runs training steps.

    Args:
        network: The layers.
        proposer: The LM that writes proposals.
        settings: See `StepSettings`.
    """

    def __init__(self, network: LanguageNetwork, proposer: CachedLM, settings: StepSettings) -> None:
        """Keep the settings."""
        self.network, self.proposer, self.settings = network, proposer, settings

    def step(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        memory: PromptMemory,
        stats: Sequence[BanditStats],
        error_weight: float,
        generator: torch.Generator,
    ) -> StepResult:
        """Run one step.

        Args:
            examples: The batch, ``B`` examples with references.
            prompts: Prompts of the layers. They decide the weights of draws, and are all replaced at once.
            memory: Prompts to rewrite besides the current ones; they are also candidates.
            stats: Statistics of the messages, by layer; updated in place.
            error_weight: ``lambda_t`` of this step: the penalty for the likelihood of hidden texts that led to errors.
            generator: Source of all random numbers.

        Returns:
            The result. A network of several layers keeps its prompts if every answer is right. A single layer still
            searches for likelier answers, like DLN-1 in the paper.
        """
        seen = self.forward(examples, prompts)
        new = list(prompts)
        result = StepResult(new, seen.answers)
        if not seen.wrong and len(prompts) > 1:
            return result
        draws = self.posterior(seen, generator)
        for index, layer in enumerate(self.network.layers):
            if not layer.settings.learn:
                continue
            cases = self.cases(index, seen, draws)
            parents = [prompts[index], *memory.of_layer(index)]
            options = self._options(index, examples)
            request = Request(list(dict.fromkeys(parents)), cases, options, stats[index], generator, self.proposer)
            known, fresh = self.candidates(index, request)
            if not fresh:
                result.empty.append(index)
                continue
            proposals = known + fresh
            rewards = self.rewards(index, [proposal.text for proposal in proposals], seen, draws, error_weight)
            chosen = best(rewards)
            new[index] = proposals[chosen].text
            values = rewards.tolist()
            result.rewards[index] = (values[0], values[chosen])
            result.candidates[index] = [
                Candidate(proposal, value, c == chosen)
                for c, (proposal, value) in enumerate(zip(proposals, values, strict=True))
            ]
            by_text = {proposal.text: value for proposal, value in zip(proposals, values, strict=True)}
            for proposal, value in zip(proposals, values, strict=True):
                gain = value - by_text[proposal.parent]
                if proposal.message is not None and math.isfinite(gain):  # one NaN would make the mean NaN for good
                    stats[index].update(proposal.message, gain)
        return result

    def forward(self, examples: Sequence[Example], prompts: Sequence[str]) -> Forward:
        """Run the forward pass."""
        hidden = self.network.sample_hidden(examples, prompts)
        answers = self.network.answer(examples, hidden, prompts)
        return Forward(list(examples), list(prompts), hidden, answers)

    # --- latent texts -----------------------------------------------------------------------------------------------

    def posterior(self, seen: Forward, generator: torch.Generator) -> list[Draws]:
        """Draw the texts of every hidden layer, from the top one down; the result starts with the first layer."""
        draws: list[Draws] = []
        examples, prompts = seen.examples, seen.prompts
        targets = [example.target for example in examples]
        for index in reversed(range(len(seen.hidden))):
            layer, above, below = self.network.layers[index], index + 1, seen.below(index)
            samples = [
                LatentSample(example, under, draft, target, answer.right, prompts[above])
                for example, under, draft, target, answer in zip(
                    examples, below, seen.hidden[index], targets, seen.answers, strict=True
                )
            ]
            texts = self.settings.posterior.draw(layer, self.network.lms[index], prompts[index], samples, generator)
            placed = [layer.place(example, under) for example, under in zip(examples, below, strict=True)]
            sharpening = self.settings.posterior.sharpening
            prior = torch.zeros(len(texts), len(texts[0]), dtype=torch.double, device="cpu")
            if sharpening.prior:
                prior = self.network.hidden_log_probs(index, placed, [prompts[index]], texts)[0]
            read = Draws(texts, torch.empty(0, device="cpu"))
            wanted = None if self.network.layers[above].top else [[target] for target in targets]
            answer = self._log_probs(above, [prompts[above]], examples, read, wanted)[0][0, :, :, 0]
            there = torch.tensor([[bool(text) for text in several] for several in texts], device="cpu")
            weights = sharpening(answer, prior, there)
            draws.insert(0, Draws(texts, weights))
            targets = draws[0].best
        return draws

    # --- candidates and their rewards ---------------------------------------------------------------------------------

    def cases(self, index: int, seen: Forward, draws: Sequence[Draws]) -> list[Case]:
        """Return a layer's inputs, outputs and targets: reference answers, or the best draws for a hidden layer."""
        layer = self.network.layers[index]
        outputs = [answer.text for answer in seen.answers] if layer.top else seen.hidden[index]
        targets = [example.target for example in seen.examples] if layer.top else draws[index].best
        inputs = [layer.shown(example, under) for example, under in zip(seen.examples, seen.below(index), strict=True)]
        return [
            Case(read, output, target, answer.right)
            for read, output, target, answer in zip(inputs, outputs, targets, seen.answers, strict=True)
        ]

    def _options(self, index: int, examples: Sequence[Example]) -> list[str]:
        same = {example.labels for example in examples}
        if len(same) != 1 or not self.network.layers[index].top:
            return []
        return [verbalisers[0] for verbalisers in same.pop()]

    def candidates(self, index: int, request: Request) -> tuple[list[Proposal], list[Proposal]]:
        """Return the current and remembered prompts, and the proposals that are new, not empty and not too long."""
        lm = self.network.lms[index].lm
        known = [Proposal(text, text, "memory" if c else "current") for c, text in enumerate(request.parents)]
        made = [proposal for source in self.settings.proposals for proposal in source.propose(request)]
        fresh = [
            proposal
            for proposal in distinct(made, request.parents)
            if lm.count(proposal.text) <= self.settings.max_prompt_tokens
        ]
        return known, fresh

    def rewards(
        self, index: int, prompts: Sequence[str], seen: Forward, draws: Sequence[Draws], error_weight: float
    ) -> Tensor:
        """Compute the rewards ``[C]`` of candidates for a layer's prompt, the current prompt first."""
        top = self.network.layers[index].top
        one = torch.ones(len(seen.examples), 1, dtype=torch.double, device="cpu")
        read = draws[index - 1] if index else Draws([[""] for _ in seen.examples], one)
        texts, weights = (None, one) if top else (draws[index].texts, draws[index].weights)
        log_probs, classes = self._log_probs(index, prompts, seen.examples, read, texts)
        rewards = expected_log_probs(log_probs, read.weights, weights)
        if top and self.settings.trust:
            if classes is None:
                raise UserError("trust compares class probabilities, and these answers are free text; set trust to 0")
            rewards = rewards - self.settings.trust * divergence(classes, read.weights)
        if not top and error_weight:
            below, layer = seen.below(index), self.network.layers[index]
            placed = [layer.place(seen.examples[b], below[b]) for b in seen.wrong]
            drafts = [[seen.hidden[index][b]] for b in seen.wrong]
            lapses = self.network.hidden_log_probs(index, placed, prompts, drafts)[..., 0].mean(-1)
            rewards = rewards - error_weight * lapses
        return rewards

    def _log_probs(
        self,
        index: int,
        prompts: Sequence[str],
        examples: Sequence[Example],
        read: Draws,
        texts: Sequence[Sequence[str]] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log-probabilities of texts ``[B][K]`` (``None`` for answers) under a layer that reads ``[B][J]``.

        Returns:
            ``[C, B, J, K]``, and the log-probabilities of the top layer's classes, ``[C, B, J, Y]``, if there are any.
        """
        layer, count = self.network.layers[index], len(read.texts[0])
        placed = [
            layer.place(example, text)
            for example, several in zip(examples, read.texts, strict=True)
            for text in several
        ]
        shape = (len(prompts), len(examples), count, -1)
        if texts is None:
            log_probs, classes = self.network.answer_log_probs(placed, prompts, count)
            return log_probs.view(shape), None if classes is None else classes.view(shape)
        repeated = [several for several in texts for _ in range(count)]
        return self.network.hidden_log_probs(index, placed, prompts, repeated, count).view(shape), None
