"""One step of a Deep Language Network: from a batch to the prompts of the next step (algorithms 1 and 2 of the paper).

With one layer it is DLN-1: propose, score, take the best. With more, hidden texts are latent variables: each hidden
layer's are drawn from a posterior, the top one's first, weighed, and then serve as targets of their layer and as inputs
of the layer above. The paper has two layers; for more, the best draw of a layer is the target of the layer below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.network import Answer, LanguageNetwork
from lightning_prompts.dln.posterior import Posterior, Thought
from lightning_prompts.dln.proposals import Case, Proposal, Proposals, Request, distinct
from lightning_prompts.dln.reader import Reader
from lightning_prompts.dln.rewards import best, divergence, expected_log_probs
from lightning_prompts.errors import UserError
from lightning_prompts.types import Example


@dataclass(frozen=True)
class StepSettings:
    """What a step does.

    Attributes:
        proposals: Where candidates come from.
        posterior: How hidden texts are drawn; without effect for one layer.
        trust: Weight of the divergence from the current prompt's classes.
        max_prompt_tokens: Longer proposals are dropped.
    """

    proposals: Sequence[Proposals]
    posterior: Posterior
    trust: float = 0.0
    max_prompt_tokens: int = 200


@dataclass(frozen=True)
class Candidate:
    """A prompt that was scored.

    Attributes:
        proposal: Where it comes from.
        reward: Its reward on the batch.
        chosen: Whether it is the next step's prompt.
    """

    proposal: Proposal
    reward: float
    chosen: bool


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Attributes:
        prompts: Of the next step.
        answers: Of the forward pass.
        candidates: By layer; none for a layer that did not learn or had no proposals.
        rewards: By layer, of the current prompt and of the chosen one.
        empty: Layers all of whose proposals were filtered out.
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
        """The candidates as rows of a table."""
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
        prompts: Of the layers.
        hidden: Texts of all layers but the top one, ``[N - 1][B]``.
        answers: ``[B]``.
    """

    examples: list[Example]
    prompts: list[str]
    hidden: list[list[str]]
    answers: list[Answer]

    @property
    def wrong(self) -> list[int]:
        """The examples whose answer was wrong."""
        return [b for b, answer in enumerate(self.answers) if not answer.right]

    def below(self, index: int) -> list[str]:
        """What layer ``index`` read beside the input, ``[B]``."""
        return self.hidden[index - 1] if index else [""] * len(self.examples)


@dataclass(frozen=True)
class Draws:
    """Hidden texts of a layer and their weights.

    Attributes:
        texts: ``[B][K]``.
        weights: ``[B, K]``.
    """

    texts: list[list[str]]
    weights: Tensor

    @property
    def best(self) -> list[str]:
        """The text of the largest weight, the first of equals, ``[B]``."""
        return [several[k] for several, k in zip(self.texts, self.weights.argmax(-1).tolist(), strict=True)]


class Stepper:
    """Takes steps.

    Args:
        network: The layers.
        proposer: The LM that writes proposals.
        settings: What a step does.
    """

    def __init__(self, network: LanguageNetwork, proposer: Reader, settings: StepSettings) -> None:
        """Nothing is run yet."""
        self.network, self.proposer, self.settings = network, proposer, settings

    def step(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        memory: PromptMemory,
        arms: Sequence[BanditStats],
        error_weight: float,
        generator: torch.Generator,
    ) -> StepResult:
        """One step.

        Args:
            examples: The batch, ``B`` examples with references.
            prompts: Of the layers; the weights of draws follow from these, and all are replaced together.
            memory: Prompts that may be rewritten beside the current ones, and are candidates themselves.
            arms: What the messages have brought, by layer; updated.
            error_weight: ``lambda_t`` of this step, what the likelihood of hidden texts that led to errors costs.
            generator: Of everything random.

        Returns:
            The result; the same prompts where a network of several layers got every answer right. A single layer looks
            for likelier answers all the same, as the paper's DLN-1 does.
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
            request = Request(list(dict.fromkeys(parents)), cases, options, arms[index], generator, self.proposer)
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
                if proposal.message is not None and math.isfinite(gain):  # one that is not would stay in all means
                    arms[index].update(proposal.message, gain)
        return result

    def forward(self, examples: Sequence[Example], prompts: Sequence[str]) -> Forward:
        """The forward pass."""
        hidden = self.network.think(examples, prompts)
        answers = self.network.answer(examples, hidden, prompts)
        return Forward(list(examples), list(prompts), hidden, answers)

    # --- latent texts -----------------------------------------------------------------------------------------------

    def posterior(self, seen: Forward, generator: torch.Generator) -> list[Draws]:
        """Draws of every hidden layer, the top one's first in time, the first layer's first in the list."""
        draws: list[Draws] = []
        examples, prompts = seen.examples, seen.prompts
        targets = [example.target for example in examples]
        for index in reversed(range(len(seen.hidden))):
            layer, above, below = self.network.layers[index], index + 1, seen.below(index)
            thoughts = [
                Thought(example, under, draft, target, answer.right, prompts[above])
                for example, under, draft, target, answer in zip(
                    examples, below, seen.hidden[index], targets, seen.answers, strict=True
                )
            ]
            texts = self.settings.posterior.draw(
                layer, self.network.readers[index], prompts[index], thoughts, generator
            )
            placed = [layer.place(example, under) for example, under in zip(examples, below, strict=True)]
            sharpening = self.settings.posterior.sharpening
            prior = torch.zeros(len(texts), len(texts[0]), dtype=torch.double, device="cpu")
            if sharpening.uses_prior:
                prior = self.network.hidden_log_probs(index, placed, [prompts[index]], texts)[0]
            read = Draws(texts, torch.empty(0, device="cpu"))
            wanted = None if self.network.layers[above].top else [[target] for target in targets]
            answer = self._log_probs(above, [prompts[above]], examples, read, wanted)[0][0, :, :, 0]
            there = torch.tensor([[bool(text) for text in several] for several in texts], device="cpu")
            weights = sharpening(answer, prior, there)
            draws.insert(0, Draws(texts, weights))
            targets = draws[0].best
        return draws

    # --- candidates and what they are worth ---------------------------------------------------------------------------

    def cases(self, index: int, seen: Forward, draws: Sequence[Draws]) -> list[Case]:
        """What a layer did and should have done: the answers, or for a hidden layer the best draws as targets."""
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
        """The current prompt and those of the memory; the proposals that are new, not empty and not too long."""
        lm = self.network.readers[index].lm
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
        """Rewards ``[C]`` of candidates for a layer's prompt, the current one first."""
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
        """How likely texts ``[B][K]`` (``None`` for the answers) are to a layer that reads ``[B][J]``.

        Returns:
            ``[C, B, J, K]``, and of the top layer's classes, if any, ``[C, B, J, Y]``.
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
