"""Automatic Prompt Engineer (Zhou et al. 2023, arXiv 2211.01910): propose instructions and keep the best.

Prompt: text. Estimator: proposals by an LM. Objective: accuracy on validation.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.dln.proposals import InducedInstructions, Paraphrases, distinct
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.demonstration_search import DemonstrationSearch
from lightning_prompts.search.demonstrations import FewShotPrompt
from lightning_prompts.types import Example


class Ape(DemonstrationSearch):
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
            text,
            sources=[],
            instructions=[paraphrases],
            racing=None,
            survivors=survivors,
            max_prompt_tokens=max_prompt_tokens,
            proposer=proposer,
            memory_mb=memory_mb,
            lm=lm,
            max_new_tokens=max_new_tokens,
        )
        self.induced, self.paraphrases = induced, paraphrases

    def propose(self, examples: Sequence[Example], parents: Sequence[FewShotPrompt]) -> dict[FewShotPrompt, str]:
        """Guess instructions in the first step, and vary the survivors in later ones; known prompts are left out."""
        known = [parent.instruction for parent in parents]
        request = self.request(known, examples, self.step_generator())
        source = self.paraphrases if self.survivors else self.induced
        made = {FewShotPrompt(proposal.text): proposal.kind for proposal in distinct(source.propose(request), known)}
        return {candidate: kind for candidate, kind in made.items() if candidate.key not in self.outcomes}
