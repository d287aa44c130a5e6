"""Walking by instructions, generated (``navigate`` of BIG-bench, Srivastava et al. 2022)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_prompts.datamodules.generated import GeneratedReasoning
from lightning_prompts.datamodules.labels import Choices

_START = "If you follow these instructions, do you return to the starting point?"
# Numbers of instructions, about as frequent as in BIG-bench.
_LENGTHS, _WEIGHTS = range(2, 10), (3, 6, 8, 7, 5, 4, 3, 2)
_TRIES = 100  # attempts for a walk of one length
_MOST_STEPS = 10
# Coordinates are (right, forward).
_SIDES = {"forward": (0, 1), "right": (1, 0), "backward": (0, -1), "left": (-1, 0)}
_TURNS = {"right": 1, "around": 2, "left": 3}  # quarters clockwise
_CLOCKWISE = list(_SIDES.values())


class Navigate(GeneratedReasoning):
    r"""Decide whether some instructions lead back to the start.

    About half of the questions give the direction of each step (``Always face forward. Take 9 steps left.``). The
    others have turns (``Take 8 steps. Turn around. Take 8 steps.``), about a third of their instructions, as in
    BIG-bench. A ``test`` file is BIG-Bench Hard's ``navigate.json``.
    """

    task_instruction = _START

    @property
    def task(self) -> str:
        """The name of the task in BIG-Bench Hard."""
        return "navigate"

    def draw(self, generator: random.Random, answer: int) -> Choices:
        """Draw instructions that lead back to the start, or do not."""
        turning = generator.random() < 0.5
        sentences = None
        while sentences is None:
            (length,) = generator.choices(_LENGTHS, _WEIGHTS)
            attempts = (_walk(generator, length, turning, back=answer == 0) for _ in range(_TRIES))
            sentences = next((walk for walk in attempts if walk is not None), None)
        return Choices(" ".join([_START, *([] if turning else ["Always face forward."]), *sentences]), ("Yes", "No"))


def _walk(generator: random.Random, length: int, turning: bool, back: bool) -> list[str] | None:
    """Draw instructions that lead ``back`` or do not; ``None`` if the drawn directions make that impossible."""
    words: list[str] = []  # of each instruction: the direction of a step, or the turn
    heading, directions = 0, []
    for _ in range(length):
        if turning and generator.random() < 1 / 3:
            (turn,) = generator.choices(list(_TURNS), (3, 5, 3))
            heading += _TURNS[turn]
            words.append(f"Turn {turn}.")
        elif turning:
            directions.append(_CLOCKWISE[heading % 4])
            words.append("")
        else:
            side = generator.choice(list(_SIDES))
            directions.append(_SIDES[side])
            words.append(f" {side}")
    counts = [generator.randint(1, _MOST_STEPS) for _ in directions]
    if not counts or (back and not _return(generator, directions, counts)):
        return None
    if not back and not any(_place(directions, counts)):
        return None
    left = iter(counts)
    return [word if word.startswith("Turn") else _step(next(left), word) for word in words]


def _return(generator: random.Random, directions: Sequence[tuple[int, int]], counts: list[int]) -> bool:
    """Change one count on each axis so that the walk returns to its start; return whether that is possible.

    All steps of an axis are equally likely to be changed, so that the last step does not reveal the answer.
    """
    for axis in (0, 1):
        steps = [number for number, direction in enumerate(directions) if direction[axis]]
        if steps:
            chosen = generator.choice(steps)
            counts[chosen] -= _place(directions, counts)[axis] * directions[chosen][axis]
            if not 1 <= counts[chosen] <= _MOST_STEPS:
                return False
    return True


def _place(directions: Sequence[tuple[int, int]], counts: Sequence[int]) -> tuple[int, int]:
    """Return the end of a walk that starts at (0, 0)."""
    steps = list(zip(directions, counts, strict=True))
    return sum(count * x for (x, _), count in steps), sum(count * y for (_, y), count in steps)


def _step(count: int, where: str) -> str:
    return f"Take {count} step{'s' if count > 1 else ''}{where}."
