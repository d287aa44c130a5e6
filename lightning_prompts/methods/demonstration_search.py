"""Search for solved examples to put in front of each question (random search: Wan et al. 2024, arXiv 2406.15708).

Prompt: text. Estimator: candidates, by random draws, greedy additions or local changes. Objective: accuracy on
validation.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.proposals import Case, Proposals, Request, distinct
from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.search.demonstrations import (
    SEPARATOR,
    CandidateSource,
    Demonstration,
    Draw,
    FewShotPrompt,
    RandomDemonstrations,
    check_before,
    demonstrations_of,
)
from lightning_prompts.search.scoring import Racing, race_losses
from lightning_prompts.types import Example

log = logging.getLogger(__name__)

SEARCH = "demonstration_search"


class DemonstrationSearch(TextPromptMethod):
    """Chooses which solved training examples precede the question, how many, and in which order, by validation.

    Each training step draws candidates from ``sources``, and keeps the one with the most right answers on validation.
    Ties go to the current prompt, then to the earlier candidate. The initial prompt without examples is also a
    candidate. With ``instructions``, each step also tries new instructions with the best examples so far.

    The examples and the instruction fill the prompt slot, so all texts before the slot must be equal. No example asks a
    question of the validation or test split.

    Args:
        text: The instruction, in the slot of the question and of each example; ``None`` for the task's own.
        sources: Where candidates come from; ``None`` for `RandomDemonstrations`.
        instructions: Sources of new instructions, such as those of `Ape`; ``None`` keeps the instruction.
        racing: Drops bad candidates after a few validation examples; ``None`` scores each one on all.
        survivors: Number of best candidates that the sources start from.
        separator: Text after each example.
        max_prompt_tokens: Maximum length of the examples and the instruction, in tokens. Longer candidates are refused,
            and so are those that do not fit the context window together with the longest question.
        proposer: The LM that writes instructions; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    estimator_name = "draws of training examples"
    objective_name = "accuracy"
    needs_validation = True
    winners = 1  # number of candidates that a race finds

    def __init__(
        self,
        text: str | None = None,
        sources: list[CandidateSource] | None = None,
        instructions: list[Proposals] | None = None,
        racing: Racing | None = Racing(),  # noqa: B008
        survivors: int = 3,
        separator: str = SEPARATOR,
        max_prompt_tokens: int = 1000,
        proposer: LMConfig | None = None,
        memory_mb: float = 256.0,
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings."""
        super().__init__(
            [LanguageLayer(text)],
            max_prompt_tokens=max_prompt_tokens,
            proposer=proposer,
            memory_mb=memory_mb,
            lm=lm,
            max_new_tokens=max_new_tokens,
        )
        check_at_least("survivors", survivors)
        self.sources: list[CandidateSource] = [RandomDemonstrations()] if sources is None else sources
        self.instructions = instructions or []
        if not self.sources and not self.instructions:
            raise UserError("sources is empty; give RandomDemonstrations, AddedDemonstrations or ChangedDemonstrations")
        self.racing, self.count, self.separator = racing, survivors, separator
        self.survivors: list[FewShotPrompt] = []
        self.outcomes: dict[str, str] = {}  # of each candidate's key: "1" for each right answer so far, "0" for others
        self.before = ""
        self.pool: list[Demonstration] = []
        self.validation: list[Example] = []

    # --- preparation ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """See `TextPromptMethod`.

        Raises:
            UserError: No training example can be a demonstration.
        """
        super().setup(stage)
        if stage != "fit":
            return
        # In a random order, so that the first examples of a race are like the others.
        examples = self.validation_examples()
        self.validation = random.Random(0).sample(examples, len(examples))
        self.before = examples[0].before
        if not self.demonstrates:
            return
        train, others = self._train(), self._evaluated()
        for example in (*train, *others):
            check_before(example.before, self.before)
        self.pool = demonstrations_of(train, others)
        if shared := len(demonstrations_of(train, [])) - len(self.pool):
            log.warning("%d training questions are also in another split, so they are no demonstrations", shared)
        if not self.pool:
            raise UserError("no training example can be a demonstration: each asks a question of another split")

    @property
    def demonstrates(self) -> bool:
        """Whether candidates have demonstrations."""
        return bool(self.sources)

    def _train(self) -> list[Example]:
        examples: list[Example] = self.trainer.datamodule.examples("train")  # type: ignore[attr-defined]
        return examples

    def _evaluated(self) -> list[Example]:
        """Return the examples of all splits but the training split."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return [example for split in data.held_out() for example in data.examples(split)]

    def validate_initial(self) -> None:
        """See `KeepsBest`; limit prompts to what the context window leaves beside the longest question."""
        self.max_prompt_tokens = min(self.max_prompt_tokens, self._room())
        if self.prompt_memory.best is None:
            initial = FewShotPrompt(self.prompts[0])
            self._race([initial])
            self.prompt_memory.update(self.prompts, self.value(initial))

    def _room(self) -> int:
        """Return the number of tokens that the context window leaves beside the longest question."""
        lm = self.language_model
        count = functools.cache(lm.count)
        longest = 0
        for example in self._evaluated():
            texts = [f" {text}" for label in example.labels for text in label] or [example.answer or ""]
            answer = max(*map(count, texts), 0 if example.labels else self.max_new_tokens)
            longest = max(longest, lm.length(example) + answer + count(example.end or ""))
        return max(1, lm.context - longest)

    def added_tokens(self) -> int:
        """See `Evaluation`; candidates that are too long are refused one by one."""
        return 0

    def score_settings(self) -> dict[str, Any]:
        """See `TextPromptMethod`; the separator is a part of each prompt."""
        return {**super().score_settings(), "separator": self.separator}

    # --- steps ------------------------------------------------------------------------------------------------------

    def write(self, candidate: FewShotPrompt) -> str:
        """Write a candidate as the text of the prompt slot."""
        return candidate.write(self.before, self.separator)

    def accuracy(self, candidate: FewShotPrompt) -> float:
        """Return the share of right answers on validation; -1 for a candidate that is not scored on all examples."""
        known = self.outcomes.get(candidate.key, "")
        return known.count("1") / len(known) if len(known) == len(self.validation) else -1.0

    def cost(self, candidate: FewShotPrompt) -> float:
        """Return what a candidate costs beside its errors, in shares of right answers."""
        del candidate
        return 0.0

    def value(self, candidate: FewShotPrompt) -> float:
        """Return what candidates are compared by: the accuracy less the cost."""
        return self.accuracy(candidate) - self.cost(candidate)

    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Draw candidates, race them on validation, and keep the best."""
        parents = self.survivors or [FewShotPrompt(self.prompts[0])]
        fresh = self.propose(examples, parents)
        fits = [self.language_model.count(self.write(candidate)) <= self.max_prompt_tokens for candidate in fresh]
        if not any(fits):
            self.keeps_prompt(0)
        candidates = [*parents, *(candidate for candidate, fit in zip(fresh, fits, strict=True) if fit)]
        refused = [candidate for candidate, fit in zip(fresh, fits, strict=True) if not fit]
        self.outcomes.update({candidate.key: "" for candidate in refused})
        self._race(candidates)
        order = sorted(candidates, key=lambda candidate: -self.value(candidate))  # stable
        self.survivors = [candidate for candidate in order[: self.count] if self.accuracy(candidate) >= 0]
        best = self.survivors[0]
        self.prompts = [self.write(best)]
        self.log("train/accuracy", self.accuracy(best), batch_size=len(examples), prog_bar=True)
        if self.demonstrates:
            self.log("train/shots", float(len(best.demonstrations)), batch_size=len(examples))
        kinds = {parents[0]: "current", **dict.fromkeys(parents[1:], "memory"), **fresh}
        return [self._row(candidate, kinds[candidate], candidate == best) for candidate in (*candidates, *refused)]

    def propose(self, examples: Sequence[Example], parents: Sequence[FewShotPrompt]) -> dict[FewShotPrompt, str]:
        """Propose candidates that were never tried, each with the name of its source."""
        generator = self.step_generator()
        draw = Draw(parents, self.pool, generator)
        made = [(each, type(source).__name__) for source in self.sources for each in source.propose(draw)]
        known = list(dict.fromkeys(parent.instruction for parent in parents))
        request = self.request(known, examples, generator)
        proposals = [each for source in self.instructions for each in source.propose(request)]
        made += [(parents[0].with_instruction(each.text), each.kind) for each in distinct(proposals, known)]
        fresh: dict[FewShotPrompt, str] = {}
        for candidate, kind in made:
            if candidate.key not in self.outcomes:
                fresh.setdefault(candidate, kind)
        return fresh

    def request(self, parents: Sequence[str], examples: Sequence[Example], generator: torch.Generator) -> Request:
        """Request instructions for solved examples."""
        cases = [Case(example.question, "", example.target, True) for example in examples]
        names = {tuple(label[0] for label in example.labels) for example in examples}
        options = list(names.pop()) if len(names) == 1 else []
        return Request(parents, cases, options, BanditStats(), generator, self.proposer)

    def _row(self, candidate: FewShotPrompt, kind: str, chosen: bool) -> dict[str, Any]:
        """Return the row of a candidate; ``reward`` is that on the ``scored`` examples, ``None`` if it was refused."""
        known = self.outcomes[candidate.key]
        return {
            "layer": 0,
            "kind": kind,
            "message": None,
            "reward": round(known.count("1") / len(known), 5) if known else None,
            "scored": len(known),
            "shots": len(candidate.demonstrations),
            "chosen": chosen,
            "prompt": self.write(candidate),
        }

    # --- scores -----------------------------------------------------------------------------------------------------

    def _race(self, candidates: Sequence[FewShotPrompt]) -> None:
        """Score candidates on validation until they are complete or drop out, and record their outcomes."""
        keys = [candidate.key for candidate in candidates]

        def losses(alive: Tensor, part: slice) -> Tensor:
            lines = alive.tolist()
            new = [c for c in lines if len(self.outcomes.get(keys[c], "")) < part.stop]
            if new:
                right = self.right([self.write(candidates[c]) for c in new], self.validation[part])
                for c, line in zip(new, right, strict=True):
                    self.outcomes[keys[c]] = self.outcomes.get(keys[c], "") + "".join("01"[value] for value in line)
            bits = [[float(bit == "0") for bit in self.outcomes[keys[c]][part]] for c in lines]
            return torch.tensor(bits, device="cpu")

        costs = torch.tensor([self.cost(candidate) for candidate in candidates], device="cpu")
        race_losses(losses, len(self.validation), self.racing, costs, self.winners)

    def right(self, prompts: Sequence[str], examples: Sequence[Example]) -> list[list[bool]]:
        """Answer examples under each of several prompts.

        Args:
            prompts: ``C`` texts of the prompt slot.
            examples: ``n`` examples with references.

        Returns:
            Whether each answer is right, ``[C][n]``.
        """
        return [[answer.right for answer in line] for line in self.network.answers(examples, prompts)]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the survivors and the outcomes of all candidates."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SEARCH] = {
            "survivors": [candidate.state() for candidate in self.survivors],
            "outcomes": dict(self.outcomes),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the survivors and the outcomes.

        Raises:
            UserError: An older version wrote the checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        if SEARCH not in checkpoint:
            raise UserError("the checkpoint has no candidates: an older version wrote it; train again")
        self.survivors = [FewShotPrompt.of_state(state) for state in checkpoint[SEARCH]["survivors"]]
        self.outcomes = dict(checkpoint[SEARCH]["outcomes"])
