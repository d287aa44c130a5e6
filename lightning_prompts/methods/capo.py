"""CAPO (Zehle et al. 2025, arXiv 2504.16005): evolve instructions and solved examples, and pay for length.

Prompt: text. Estimator: proposals by an LM. Objective: accuracy on validation, less a penalty for length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.dln.leakage import LeakCheck
from lightning_prompts.dln.proposals import Crossover, InducedInstructions, Paraphrases, distinct
from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.demonstration_search import DemonstrationSearch
from lightning_prompts.search.demonstrations import SEPARATOR, Draw, FewShotPrompt
from lightning_prompts.search.scoring import Racing
from lightning_prompts.types import Example


class Capo(DemonstrationSearch):
    """Evolves a population of prompts, each an instruction and solved examples.

    The first training step guesses instructions from its batch as `Ape` does, and gives each one, and the initial one,
    a random number of random examples. Each later step draws pairs of parents from the population. An LM combines the
    instructions of a pair, and varies the result. The examples are drawn from those of both parents, half as many as
    both have; then one is added or dropped, or none, and the order is shuffled. Parents and children race on
    validation, and the best become the next population.

    Candidates are compared by accuracy less the penalty, in races as well. The best prompt so far is that of
    ``last.ckpt``; ``best.ckpt`` is that of the best accuracy without the penalty.

    Args:
        text: The initial instruction; ``None`` for the task's own.
        induced: Settings for guessing the first instructions.
        crossover: Settings for combining instructions; ``count`` is the number of pairs.
        mutation: Settings for varying instructions; ``count`` is the number of children, from the pairs in turn.
        population: Number of candidates that survive a step.
        shots: Maximum number of examples in a prompt; 0 evolves instructions alone.
        length_penalty: Accuracy that as many tokens cost as the initial instruction has with ``shots`` examples.
        racing: Drops bad candidates after a few validation examples; ``None`` scores each one on all. The paper's level
            is 0.2.
        leak_words: An instruction that shares a passage of this many words with a training question or answer is
            flagged in the column ``leaked_words`` of the candidates; see `copied_words`. Solved examples do not count.
        drop_leaks: Whether to drop such instructions.
        separator: Text after each example.
        max_prompt_tokens: Maximum length of the examples and the instruction, in tokens; longer candidates are refused.
        proposer: The LM that writes instructions; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        lm: The frozen language model.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    estimator_name = "proposals by an LM"
    objective_name = "accuracy less length"

    def __init__(
        self,
        text: str | None = None,
        induced: InducedInstructions = InducedInstructions(),
        crossover: Crossover = Crossover(),  # noqa: B008
        mutation: Paraphrases = Paraphrases(count=4),
        population: int = 10,
        shots: int = 5,
        length_penalty: float = 0.05,
        racing: Racing | None = Racing(first=32, error=0.2),  # noqa: B008
        leak_words: int = 8,
        drop_leaks: bool = False,
        separator: str = SEPARATOR,
        max_prompt_tokens: int = 1000,
        proposer: LMConfig | None = None,
        memory_mb: float = 256.0,
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings."""
        super().__init__(
            text,
            racing=racing,
            survivors=population,
            separator=separator,
            max_prompt_tokens=max_prompt_tokens,
            proposer=proposer,
            memory_mb=memory_mb,
            lm=lm,
            max_new_tokens=max_new_tokens,
        )
        check_at_least("population", population, 2)
        if shots < 0:
            raise UserError(f"shots must not be negative, got {shots}")
        check_finite("length_penalty", length_penalty)
        self.induced, self.crossover, self.mutation = induced, crossover, mutation
        self.winners, self.shots, self.length_penalty = population, shots, length_penalty
        self.leaks, self.drop_leaks = LeakCheck(leak_words), drop_leaks
        self.reference_tokens = 1

    @property
    def demonstrates(self) -> bool:
        """See `DemonstrationSearch`."""
        return self.shots > 0

    def validate_initial(self) -> None:
        """See `KeepsBest`; measure the length that the penalty is relative to."""
        full = FewShotPrompt(self.initial_prompts[0], tuple(self.pool[: self.shots]))
        self.reference_tokens = max(1, self.language_model.count(self.write(full)))
        super().validate_initial()

    def cost(self, candidate: FewShotPrompt) -> float:
        """Return the penalty for the length of a candidate."""
        return self.length_penalty * self.language_model.count(self.write(candidate)) / self.reference_tokens

    def keep(self, value: float) -> None:
        """See `TextPromptMethod`; the current prompt is the best of the population, and the penalty counts."""
        del value
        super().keep(self.value(self.survivors[0]))

    # --- operators --------------------------------------------------------------------------------------------------

    def propose(self, examples: Sequence[Example], parents: Sequence[FewShotPrompt]) -> dict[FewShotPrompt, str]:
        """Propose the first population, or children of the current one, without candidates that were tried before."""
        draw = Draw(parents, self.pool, self.step_generator())
        made = self.offspring(draw) if self.survivors else self.founders(draw, examples)
        fresh: dict[FewShotPrompt, str] = {}
        for candidate, kind in made:
            leaks = self.drop_leaks and self.leaked_words(candidate.instruction)
            if candidate.key not in self.outcomes and not leaks:
                fresh.setdefault(candidate, kind)
        return fresh

    def founders(self, draw: Draw, examples: Sequence[Example]) -> list[tuple[FewShotPrompt, str]]:
        """Return the initial and guessed instructions, each with up to ``shots`` random examples."""
        initial = draw.parents[0].instruction
        proposals = distinct(self.induced.propose(self.request([initial], examples, draw.generator)), [initial])
        made = []
        for instruction, kind in ((initial, "initial"), *((each.text, each.kind) for each in proposals)):
            chosen = draw.shuffled(len(draw.pool))[: draw.below(self.shots + 1)]
            made.append((FewShotPrompt(instruction, tuple(draw.pool[place] for place in chosen)), kind))
        return made

    def offspring(self, draw: Draw) -> list[tuple[FewShotPrompt, str]]:
        """Cross pairs of parents, and mutate the results."""
        pairs = []
        for _ in range(self.crossover.count):
            places = draw.shuffled(len(draw.parents))
            pairs.append((draw.parents[places[0]], draw.parents[places[:2][-1]]))  # one candidate alone is both
        written = self.crossover.propose(
            self.request([each.instruction for pair in pairs for each in pair], [], draw.generator)
        )
        crossed = [self.crossed(*pair, proposal.text, draw) for pair, proposal in zip(pairs, written, strict=True)]
        varied = self.mutation.propose(self.request([each.instruction for each in crossed], [], draw.generator))
        return [
            (self.mutated(crossed[index % len(crossed)], proposal.text, draw), "child")
            for index, proposal in enumerate(varied)
            if proposal.text
        ]

    @staticmethod
    def crossed(one: FewShotPrompt, other: FewShotPrompt, instruction: str, draw: Draw) -> FewShotPrompt:
        """Return an instruction with half as many examples as both parents have, drawn from those of both.

        An empty instruction is replaced by that of the first parent.
        """
        both = list(dict.fromkeys([*one.demonstrations, *other.demonstrations]))
        count = (len(one.demonstrations) + len(other.demonstrations)) // 2
        chosen = draw.shuffled(len(both))[:count]
        return FewShotPrompt(instruction or one.instruction, tuple(both[place] for place in chosen))

    def mutated(self, parent: FewShotPrompt, instruction: str, draw: Draw) -> FewShotPrompt:
        """Return an instruction with one example more or less or the same ones, each with probability 1/3, shuffled."""
        child, change = parent.with_instruction(instruction), draw.below(3)
        size, outside = len(child.demonstrations), draw.outside(child)
        if change == 0 and size < self.shots and outside:
            child = child.added(outside[0])
        if change == 1 and size:
            child = child.dropped(draw.below(size))
        return child.reordered(draw.shuffled(len(child.demonstrations)))

    def leaked_words(self, instruction: str) -> int:
        """Return the length of the longest passage of training text in an instruction, in words."""
        return self.leaks(instruction, self._train())

    def _row(self, candidate: FewShotPrompt, kind: str, chosen: bool) -> dict[str, Any]:
        row = super()._row(candidate, kind, chosen)
        prompt = row.pop("prompt")
        tokens, leaked = self.language_model.count(prompt), self.leaked_words(candidate.instruction)
        return {**row, "tokens": tokens, "leaked_words": leaked, "prompt": prompt}
