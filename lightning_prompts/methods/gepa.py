"""GEPA (Agrawal et al. 2025, arXiv 2507.19457): an LM reflects on errors, and a Pareto front keeps what helps where.

Prompt: text, one for each layer. Estimator: proposals by an LM. Objective: accuracy on validation, or a reward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.leakage import LeakCheck
from lightning_prompts.dln.network import Answer
from lightning_prompts.dln.pareto import CandidatePool, PoolMember
from lightning_prompts.dln.proposals import Case, Reflection, Request, distinct, verdict
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.settings import as_plain
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.objectives.rewards import Reward
from lightning_prompts.template import final_result
from lightning_prompts.types import Example

log = logging.getLogger(__name__)

STATE = "gepa"


@dataclass(frozen=True)
class Rollout:
    """What the network does with some prompts.

    Attributes:
        hidden: Texts of all layers but the top one, ``[N - 1][B]``.
        answers: Answers, ``[B]``.
        scores: Scores of the answers in [0, 1], ``[B]``.
    """

    hidden: list[list[str]]
    answers: list[Answer]
    scores: list[float]

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)


class Gepa(TextPromptMethod):
    """Rewrites prompts by reflection on errors, and draws parents from a Pareto front over validation examples.

    A training step draws a candidate from the front, and answers the batch, which is the paper's minibatch. The
    proposer reads the outputs with feedback in words, and rewrites the prompt of one layer; the layers take turns. A
    rewritten candidate that scores higher on the batch is evaluated on the whole validation split and joins the pool.
    The step after that merges two candidates of different lineages, if there are several layers. The merge joins the
    pool if it is at least as good as both on as many random validation examples as the batch has.

    The result is the candidate with the highest mean score on validation; the initial prompts win ties. The paper's
    minibatch is ``data.batch_size: 3``; small LMs need more, since only strictly better candidates are accepted.

    Args:
        layers: Layers from the input to the answer; ``None`` for one layer with the task's own instruction.
        text: Initial prompt of the top layer, which replaces the one in ``layers``; ``None`` keeps that one.
        reflection: Settings of the rewriting.
        merges: Maximum number of merges in the run. One layer has nothing to merge.
        reward: Score of an answer, whose `Reward.feedback` the proposer reads as well; ``None`` for 1 if the answer is
            right and 0 if it is wrong. ``last.ckpt`` holds the best prompts by a reward; ``best.ckpt`` is that of the
            best exact match.
        leak_words: A proposal that shares a passage of this many words with a training question or answer is flagged.
            The column ``leaked_words`` of the candidates has the length of the passage; see `copied_words`.
        drop_leaks: Whether to drop such proposals.
        max_prompt_tokens: Maximum length of a proposal, in tokens; longer ones are dropped.
        proposer: The LM that reflects; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        lm: The frozen language model of layers without their own.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    estimator_name = "proposals by an LM"
    needs_validation = True

    def __init__(
        self,
        layers: list[LanguageLayer] | None = None,
        text: str | None = None,
        reflection: Reflection = Reflection(),  # noqa: B008
        merges: int = 5,
        reward: Reward | None = None,
        leak_words: int = 8,
        drop_leaks: bool = False,
        max_prompt_tokens: int = 200,
        proposer: LMConfig | None = None,
        memory_mb: float = 256.0,
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; LMs are loaded later."""
        layers = [LanguageLayer(None)] if layers is None else layers
        super().__init__(
            layers,
            text=text,
            max_prompt_tokens=max_prompt_tokens,
            proposer=proposer,
            memory_mb=memory_mb,
            lm=lm,
            max_new_tokens=max_new_tokens,
        )
        if merges < 0:
            raise UserError(f"merges must not be negative, got {merges}")
        self.reflection, self.merges, self.reward = reflection, merges, reward
        self.leaks, self.drop_leaks = LeakCheck(leak_words), drop_leaks
        self.learning = [index for index, layer in enumerate(layers) if layer.learn]
        self.pool = CandidatePool()
        self.merge_due = False
        self.tried: list[list[str]] = []  # prompts of merges

    @property
    def objective_name(self) -> str:
        """Accuracy, or the name of the reward."""
        return "accuracy" if self.reward is None else self.reward.name.replace("_", " ")

    def setup(self, stage: str) -> None:
        """See `TextPromptMethod`; load what the reward needs."""
        super().setup(stage)
        if stage == "fit" and self.reward is not None:
            self.reward.check(self.trainer.strategy.root_device)

    def validate_initial(self) -> None:
        """See `KeepsBest`; the initial prompts are the first of the pool."""
        if not self.pool.members:
            self._add(self.prompts, [], 0)
            self.prompt_memory.update(self.prompts, self.pool.best.mean)

    def keep(self, value: float) -> None:
        """See `TextPromptMethod`; the current prompts are the pool's best, whose score may be a reward."""
        del value
        super().keep(self.pool.best.mean)

    def score_settings(self) -> dict[str, Any]:
        """See `TextPromptMethod`; the reward is what a score measures."""
        reward = None if self.reward is None else repr((self.reward.name, as_plain({"reward": self.reward})))
        return {**super().score_settings(), "reward": reward}

    # --- scores -----------------------------------------------------------------------------------------------------

    def rollout(self, examples: Sequence[Example], prompts: Sequence[str]) -> Rollout:
        """Answer examples with some prompts, and score the answers."""
        hidden = self.network.sample_hidden(examples, prompts)
        answers = self.network.answer(examples, hidden, prompts)
        if self.reward is None:
            return Rollout(hidden, answers, [float(answer.right) for answer in answers])
        likelihoods = [0.0] * len(examples)
        if self.reward.needs_likelihood:
            placed = self.network.place_top(examples, hidden)
            likelihoods = self.network.answer_log_probs(placed, prompts[-1:])[0][0].exp().tolist()
        texts = [final_result(answer.text, example.extract) for answer, example in zip(answers, examples, strict=True)]
        rows = list(zip(texts, [example.target for example in examples], likelihoods, strict=True))
        return Rollout(hidden, answers, self.map_across_ranks(rows, self._rate))

    def _rate(self, rows: Sequence[tuple[str, str, float]]) -> list[float]:
        """Rate texts with their references and likelihoods; all processes get the same ratings."""
        assert self.reward is not None
        texts, references, likelihoods = zip(*rows, strict=True)
        return self.reward(texts, references, likelihoods if self.reward.needs_likelihood else [])

    def validation_scores(self, prompts: Sequence[str]) -> list[float]:
        """Return the scores of prompts on the validation split, the paper's Pareto set."""
        return [score for batch in self.validation_batches() for score in self.rollout(batch, prompts).scores]

    def _add(self, prompts: Sequence[str], parents: Sequence[int], turn: int) -> float:
        """Add a candidate to the pool, and return its mean score on validation."""
        self.pool.members.append(PoolMember(list(prompts), self.validation_scores(prompts), list(parents), turn))
        return self.pool.members[-1].mean

    # --- steps ------------------------------------------------------------------------------------------------------

    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Merge two candidates if a merge is due and possible, or rewrite one candidate by reflection."""
        generator = self.step_generator()
        rows = self.merge(len(examples), generator) if self.merge_due else []
        self.merge_due = False
        rows = rows or self.reflect(examples, generator)
        self.prompts = list(self.pool.best.prompts)
        self.log("train/best_score", self.pool.best.mean, batch_size=len(examples), prog_bar=True)
        self.log("train/candidates", float(len(self.pool)), batch_size=len(examples), prog_bar=True)
        return rows

    def reflect(self, examples: Sequence[Example], generator: torch.Generator) -> list[dict[str, Any]]:
        """Rewrite the prompt of one layer of a candidate of the front (algorithm 1); return the candidates' rows."""
        index = self.pool.draw(generator)
        parent = self.pool.members[index]
        layer = self.learning[parent.turn % len(self.learning)]
        parent.turn += 1
        seen = self.rollout(examples, parent.prompts)
        self.log("train/score", seen.mean, batch_size=len(examples))
        rows = [self._row(layer, "parent", parent.prompts, seen.mean, parent.mean)]
        if min(seen.scores) >= 1:  # nothing to learn from
            return rows
        cases = self.cases(layer, examples, seen)
        request = Request([parent.prompts[layer]], cases, [], self.message_stats[layer], generator, self.proposer)
        fresh = self.fresh(layer, parent.prompts, request)
        if not fresh:
            self.keeps_prompt(layer)
        for prompts in fresh:
            score = self.rollout(examples, prompts).mean
            validation = self._add(prompts, [index], parent.turn) if score > seen.mean else None
            self.merge_due |= validation is not None and len(self.tried) < self.merges
            if validation is not None and (copied := self.leaked_words(prompts[layer])):
                log.warning(
                    "step %d: a candidate for layer %d repeats %d words of a training example; see leaked_words in "
                    "prompts.jsonl, or set drop_leaks",
                    self.trainer.global_step,
                    layer,
                    copied,
                )
            rows.append(self._row(layer, type(self.reflection).__name__, prompts, score, validation))
        return rows

    def cases(self, index: int, examples: Sequence[Example], seen: Rollout) -> list[Case]:
        """Return a layer's inputs and outputs with feedback in words on the final answers."""
        layer = self.network.layers[index]
        below = seen.hidden[index - 1] if index else [""] * len(examples)
        outputs = [answer.text for answer in seen.answers] if layer.top else seen.hidden[index]
        inputs = [layer.shown(example, text) for example, text in zip(examples, below, strict=True)]
        feedback = [
            self.feedback(example, answer, score, layer.top)
            for example, answer, score in zip(examples, seen.answers, seen.scores, strict=True)
        ]
        return [
            Case(read, output, example.target, score >= 1, said)
            for read, output, example, score, said in zip(inputs, outputs, examples, seen.scores, feedback, strict=True)
        ]

    def feedback(self, example: Example, answer: Answer, score: float, top: bool) -> str:
        """Say in words how good an answer is, what the right one is, and what the reward says about it."""
        what = "This" if top else f"It led to the final answer: {answer.text}\nThat"
        if self.reward is None:
            return verdict(what, answer.right, example.target)
        said = f"{what} scores {score:.2f} of 1. The right answer is: {example.target}"
        return f"{said}\n{self.reward.feedback(final_result(answer.text, example.extract), example.target)}".strip()

    def fresh(self, layer: int, prompts: Sequence[str], request: Request) -> list[list[str]]:
        """Return the proposals for a layer that are new, not empty, not too long, and not dropped as leaks."""
        known = [member.prompts for member in self.pool.members]
        count = self.network.lms[layer].lm.count
        made = []
        for proposal in distinct(self.reflection.propose(request), request.parents):
            changed = [*prompts[:layer], proposal.text, *prompts[layer + 1 :]]
            if changed in known or count(proposal.text) > self.max_prompt_tokens:
                continue
            if self.drop_leaks and self.leaked_words(proposal.text):
                continue
            made.append(changed)
        return made

    def merge(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        """Merge two candidates, and return the rows of the merge, one for each layer; none if no merge is possible."""
        possible = self.pool.merges(self.tried)
        if not possible:
            return []
        merge = possible[int(torch.randint(len(possible), (1,), generator=generator, device="cpu"))]
        self.tried.append(list(merge.prompts))
        examples = self.validation_examples()
        places = torch.randperm(len(examples), generator=generator, device="cpu")[:count].tolist()
        score = self.rollout([examples[place] for place in places], merge.prompts).mean
        needed = max(
            sum(self.pool.members[parent].scores[place] for place in places) / len(places) for parent in merge.parents
        )
        turn = max(self.pool.members[parent].turn for parent in merge.parents)
        validation = self._add(merge.prompts, merge.parents, turn) if score >= needed else None
        return [self._row(layer, "merge", merge.prompts, score, validation) for layer in self.learning]

    def leaked_words(self, prompt: str) -> int:
        """Return the length of the longest passage of training text in a prompt, in words; see `copied_words`."""
        return self.leaks(prompt, self.trainer.datamodule.examples("train"))  # type: ignore[attr-defined]

    def _row(
        self, layer: int, kind: str, prompts: Sequence[str], score: float, validation: float | None
    ) -> dict[str, Any]:
        return {
            "layer": layer,
            "kind": kind,
            "message": None,
            "reward": round(score, 5),
            "chosen": kind != "parent" and validation is not None,
            "validation": None if validation is None else round(validation, 5),
            "leaked_words": self.leaked_words(prompts[layer]),
            "prompt": prompts[layer],
        }

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the pool, which the next step draws from, and the merges."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE] = {
            "pool": self.pool.state(),
            "merge_due": self.merge_due,
            "tried": list(self.tried),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the pool and the merges."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE]
        self.pool.load(state["pool"])
        self.merge_due, self.tried = state["merge_due"], [list(prompts) for prompts in state["tried"]]
