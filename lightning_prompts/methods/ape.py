"""Automatic Prompt Engineer (Zhou et al. 2023, arXiv 2211.01910): propose instructions and keep the best.

Prompt: text. Estimator: proposals by an LM. Objective: accuracy on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.proposals import Case, InducedInstructions, Paraphrases, Request, distinct
from lightning_prompts.errors import check_at_least
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.types import Example

SURVIVORS = "survivors"


class Ape(TextPromptMethod):
    """Asks an LM to guess the instruction from examples, and keeps the best instruction on validation.

    The first training step proposes prompts from its batch. Each later step proposes variations of the ``survivors``
    best prompts (iterative APE). ``max_steps: 1`` is APE without resampling. The initial prompt is also a candidate.

    Args:
        text: The initial prompt; ``None`` for the task's own instruction.
        induced: Settings for guessing instructions.
        paraphrases: Settings for varying instructions.
        survivors: Number of best prompts to vary.
        max_prompt_tokens: Maximum length of a proposal, in tokens; longer ones are dropped.
        proposer: The LM that writes proposals; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    estimator_name = "proposals by an LM"
    objective_name = "accuracy"
    needs_validation = True

    def __init__(
        self,
        text: str | None = None,
        induced: InducedInstructions = InducedInstructions(),
        paraphrases: Paraphrases = Paraphrases(),
        survivors: int = 3,
        max_prompt_tokens: int = 200,
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
        self.induced, self.paraphrases, self.count = induced, paraphrases, survivors
        self.survivors: list[str] = []

    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Propose prompts, score them on validation, and keep the best; the current prompt wins ties."""
        cases = [Case(example.question, "", example.target, True) for example in examples]
        parents = self.survivors or self.prompts
        request = Request(parents, cases, [], BanditStats(), self.step_generator(), self.proposer)
        source = self.paraphrases if self.survivors else self.induced
        fresh = [
            proposal
            for proposal in distinct(source.propose(request), [*self.prompts, *self.survivors])
            if self.network.lms[0].lm.count(proposal.text) <= self.max_prompt_tokens
        ]
        if not fresh:
            self.keeps_prompt(0)
        candidates = list(dict.fromkeys([*self.prompts, *self.survivors, *(proposal.text for proposal in fresh)]))
        kinds = {proposal.text: proposal.kind for proposal in fresh}
        scores = [self.accuracy([text]) for text in candidates]
        order = sorted(range(len(candidates)), key=lambda c: -scores[c])  # stable
        self.survivors = [candidates[c] for c in order[: self.count]]
        self.prompts = [candidates[order[0]]]
        self.log("train/accuracy", scores[order[0]], batch_size=len(examples), prog_bar=True)
        return [
            {
                "layer": 0,
                "kind": kinds.get(text, "memory" if c else "current"),
                "message": None,
                "reward": round(scores[c], 5),
                "chosen": c == order[0],
                "prompt": text,
            }
            for c, text in enumerate(candidates)
        ]

    def accuracy(self, prompts: Sequence[str]) -> float:
        """Compute the share of right answers on the validation split."""
        answers = [
            answer
            for batch in self.validation_batches()
            for answer in self.network.answer(batch, self.network.sample_hidden(batch, prompts), prompts)
        ]
        return sum(answer.right for answer in answers) / len(answers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the survivors, which the next step varies."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SURVIVORS] = list(self.survivors)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the survivors."""
        super().on_load_checkpoint(checkpoint)
        self.survivors = list(checkpoint[SURVIVORS])
