"""Few-shot prompts: an instruction and solved examples (demonstrations) in an order, and their neighbours."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.types import Example

SEPARATOR = "\n"


@dataclass(frozen=True)
class Demonstration:
    """A solved example as text around an open prompt slot.

    Attributes:
        before: Text before the prompt slot.
        after: Text between the prompt slot and the answer.
        answer: The answer, with the space before it and the text after it.
    """

    before: str
    after: str
    answer: str

    @classmethod
    def of(cls, example: Example) -> Demonstration:
        """Take the texts of an example with an answer."""
        return cls(example.before, example.after, f"{example.space}{example.answer}{example.end or ''}")

    def write(self, instruction: str, separator: str = SEPARATOR) -> str:
        """Write the solved example with an instruction in its slot; it may end with the separator already."""
        text = f"{self.before}{instruction}{self.after}{self.answer}"
        return text if text.endswith(separator) else text + separator


@dataclass(frozen=True)
class FewShotPrompt:
    """An instruction and demonstrations, the last of which is next to the question.

    Two equal prompts compare and hash as equal.

    Attributes:
        instruction: The text in the prompt slot of the question and of each demonstration.
        demonstrations: The solved examples in order.
    """

    instruction: str
    demonstrations: tuple[Demonstration, ...] = ()

    def solved(self, separator: str = SEPARATOR) -> str:
        """Write the demonstrations; the text stands in front of the whole question."""
        return "".join(each.write(self.instruction, separator) for each in self.demonstrations)

    def write(self, before: str = "", separator: str = SEPARATOR) -> str:
        """Write the prompt as a text for the prompt slot.

        ``before``, this text, and the rest of a question read as `solved` in front of the question.

        Args:
            before: The text before the slot, equal for all questions and demonstrations.
            separator: Text after each demonstration.

        Raises:
            UserError: The text before a demonstration's slot is another one.
        """
        for each in self.demonstrations:
            check_before(each.before, before)
        return f"{self.solved(separator)}{before}{self.instruction}"[len(before) :]

    @property
    def key(self) -> str:
        """A hash of the content, which is the same in every process; 16 hexadecimal digits."""
        return hashlib.blake2b(repr(self.state()).encode(), digest_size=8).hexdigest()

    def state(self) -> list[Any]:
        """Convert to lists and texts, for a checkpoint."""
        return [self.instruction, [[each.before, each.after, each.answer] for each in self.demonstrations]]

    @classmethod
    def of_state(cls, state: Sequence[Any]) -> FewShotPrompt:
        """Invert `state`."""
        instruction, demonstrations = state
        return cls(instruction, tuple(Demonstration(*texts) for texts in demonstrations))

    # --- neighbours -------------------------------------------------------------------------------------------------

    def with_instruction(self, instruction: str) -> FewShotPrompt:
        """Return the same demonstrations with another instruction."""
        return replace(self, instruction=instruction)

    def added(self, demonstration: Demonstration, place: int | None = None) -> FewShotPrompt:
        """Add a demonstration at a place; ``None`` for the end, next to the question."""
        place = len(self.demonstrations) if place is None else place
        return replace(self, demonstrations=(*self.demonstrations[:place], demonstration, *self.demonstrations[place:]))

    def dropped(self, place: int) -> FewShotPrompt:
        """Remove the demonstration at a place."""
        return replace(self, demonstrations=self.demonstrations[:place] + self.demonstrations[place + 1 :])

    def replaced(self, place: int, demonstration: Demonstration) -> FewShotPrompt:
        """Put another demonstration at a place."""
        return self.dropped(place).added(demonstration, place)

    def swapped(self, first: int, second: int) -> FewShotPrompt:
        """Exchange the demonstrations at two places."""
        order = list(range(len(self.demonstrations)))
        order[first], order[second] = order[second], order[first]
        return self.reordered(order)

    def reordered(self, order: Sequence[int]) -> FewShotPrompt:
        """Return the demonstrations in another order.

        Args:
            order: The old place of each demonstration.
        """
        return replace(self, demonstrations=tuple(self.demonstrations[place] for place in order))


def check_before(found: str, expected: str) -> None:
    """Raise a `UserError` if examples have different texts before the prompt slot, such as their questions."""
    if found != expected:
        raise UserError(
            "demonstrations go into the prompt slot, and the text before it must be the same for all examples, not "
            f"{expected[:30]!r} and {found[:30]!r}; put {{prompt}} before the fields in data.template"
        )


def demonstrations_of(train: Sequence[Example], others: Sequence[Example]) -> list[Demonstration]:
    """Return the demonstrations that training examples allow, each once.

    Args:
        train: Training examples; those without an answer are left out.
        others: Examples of the splits to evaluate on. A demonstration never answers one of their questions.
    """
    asked = {(example.before, example.after) for example in others}
    found = [Demonstration.of(example) for example in train if example.answer is not None]
    return list(dict.fromkeys(each for each in found if (each.before, each.after) not in asked))


# --- where candidates come from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What a source draws candidates from.

    Attributes:
        parents: The best candidates so far, the best first; at least one.
        pool: All demonstrations.
        generator: Source of all random numbers, on the CPU.
    """

    parents: Sequence[FewShotPrompt]
    pool: Sequence[Demonstration]
    generator: torch.Generator

    def below(self, end: int) -> int:
        """Draw an integer from 0 to ``end - 1``."""
        return int(torch.randint(end, (1,), generator=self.generator, device="cpu"))

    def shuffled(self, count: int) -> list[int]:
        """Return the integers below ``count`` in a random order."""
        return torch.randperm(count, generator=self.generator, device="cpu").tolist()

    def outside(self, prompt: FewShotPrompt) -> list[Demonstration]:
        """Return the demonstrations of the pool that a prompt does not have, in random order."""
        used = set(prompt.demonstrations)
        left = [each for each in self.pool if each not in used]
        return [left[index] for index in self.shuffled(len(left))]


class CandidateSource(ABC):
    """A source of few-shot prompts."""

    @abstractmethod
    def propose(self, draw: Draw) -> list[FewShotPrompt]:
        """Propose candidates; the search removes known ones and duplicates."""


def _check(source: CandidateSource, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{type(source).__name__}.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RandomDemonstrations(CandidateSource):
    """Random demonstrations in random order (random search, Wan et al. 2024, arXiv 2406.15708, section 3).

    The parents' instructions are used in turn.

    Attributes:
        count: Number of candidates.
        shots: Maximum number of demonstrations in each.
        fewest: Minimum number of demonstrations in each; each number from it to ``shots`` is equally likely.
    """

    count: int = 8
    shots: int = 8
    fewest: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        _check(self, count=self.count, shots=self.shots, fewest=self.fewest)
        if self.fewest > self.shots:
            raise UserError(f"RandomDemonstrations.fewest ({self.fewest}) is above shots ({self.shots})")

    def propose(self, draw: Draw) -> list[FewShotPrompt]:
        """See `CandidateSource`."""
        made = []
        for index in range(self.count):
            shots = self.fewest + draw.below(self.shots - self.fewest + 1)
            chosen = draw.shuffled(len(draw.pool))[:shots]
            instruction = draw.parents[index % len(draw.parents)].instruction
            made.append(FewShotPrompt(instruction, tuple(draw.pool[place] for place in chosen)))
        return made


@dataclass(frozen=True)
class AddedDemonstrations(CandidateSource):
    """Greedy search: the best candidate with one more demonstration next to the question.

    Attributes:
        count: Maximum number of demonstrations to try in a step, drawn from the pool; with the size of the pool, all.
        shots: Maximum number of demonstrations in a prompt.
    """

    count: int = 16
    shots: int = 8

    def __post_init__(self) -> None:
        """Check the settings."""
        _check(self, count=self.count, shots=self.shots)

    def propose(self, draw: Draw) -> list[FewShotPrompt]:
        """See `CandidateSource`."""
        best = draw.parents[0]
        if len(best.demonstrations) >= self.shots:
            return []
        return [best.added(each) for each in draw.outside(best)[: self.count]]


@dataclass(frozen=True)
class ChangedDemonstrations(CandidateSource):
    """Local search: a parent with one change, chosen at random among those that are possible.

    The changes are: add a demonstration, drop one, replace one, swap two, and shuffle all.

    Attributes:
        count: Number of candidates; they change the parents in turn.
        shots: Maximum number of demonstrations in a prompt.
    """

    count: int = 8
    shots: int = 8

    def __post_init__(self) -> None:
        """Check the settings."""
        _check(self, count=self.count, shots=self.shots)

    def propose(self, draw: Draw) -> list[FewShotPrompt]:
        """See `CandidateSource`."""
        made = [self.change(draw.parents[index % len(draw.parents)], draw) for index in range(self.count)]
        return [candidate for candidate in made if candidate is not None and candidate not in draw.parents]

    def change(self, parent: FewShotPrompt, draw: Draw) -> FewShotPrompt | None:
        """Return a parent with one change; ``None`` if none is possible."""
        size, outside = len(parent.demonstrations), draw.outside(parent)
        possible = {
            "add": bool(outside) and size < self.shots,
            "drop": size > 0,
            "replace": bool(outside) and size > 0,
            "swap": size > 1,
            "shuffle": size > 2,
        }
        kinds = [kind for kind, allowed in possible.items() if allowed]
        if not kinds:
            return None
        kind = kinds[draw.below(len(kinds))]
        if kind == "add":
            return parent.added(outside[0], draw.below(size + 1))
        if kind == "drop":
            return parent.dropped(draw.below(size))
        if kind == "replace":
            return parent.replaced(draw.below(size), outside[0])
        order = draw.shuffled(size)
        return parent.swapped(*order[:2]) if kind == "swap" else parent.reordered(order)
