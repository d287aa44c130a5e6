"""Walking by instructions, generated (``navigate`` of BIG-bench, Srivastava et al. 2022)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_prompts.datamodules.generated_reasoning import GeneratedReasoning
from lightning_prompts.datamodules.labelled import FORWARD
from lightning_prompts.datamodules.options import Choices

_START = "If you follow these instructions, do you return to the starting point?"
# How many instructions, about as often as in BIG-bench.
_LENGTHS, _WEIGHTS = range(2, 10), (3, 6, 8, 7, 5, 4, 3, 2)
_TRIES = 100  # for a walk of one length
_MOST_STEPS = 10
# On a grid of (right, forward).
_SIDES = {"forward": (0, 1), "right": (1, 0), "backward": (0, -1), "left": (-1, 0)}
_TURNS = {"right": 1, "around": 2, "left": 3}  # quarters clockwise
_CLOCKWISE = list(_SIDES.values())


class Navigate(GeneratedReasoning):
    r"""Whether one is back at the start after some instructions.

    About half of the questions say where each step goes (``Always face forward. Take 9 steps left.``), the others turn
    (``Take 8 steps. Turn around. Take 8 steps.``); about a third of their instructions are turns, as in BIG-bench.

    Args:
        test: Local file of BIG-Bench Hard (``navigate.json``) to test on instead; no other split has its questions.
        balanced: Training batches with as many examples of each class as of any other.
        template: Text with ``{prompt}``, ``{question}`` or ``{stripped}`` (without Yes and No), and ``{answer}``.
        stop: Regular expression; a generated answer ends where it first matches.
        chat: Render through the model's chat template.
        system: The system turn of a chat.
        train_size: How many questions to train on.
        val_size: How many questions for validation.
        test_size: How many questions to test on, with ``test`` at most.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples, drawn by ``seed``.
        seed: Seed of the questions.
    """

    instruction = _START

    def __init__(
        self,
        test: str | None = None,
        balanced: bool = False,
        template: str = FORWARD,
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        train_size: int = 375,
        val_size: int = 375,
        test_size: int = 250,
        batch_size: int = 20,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        super().__init__(template, stop, chat, system, test, balanced, train_size, val_size, test_size,
                         batch_size, eval_batch_size, max_train_examples, seed)  # fmt: skip

    @property
    def task(self) -> str:
        """See `GeneratedReasoning`."""
        return "navigate"

    def draw(self, generator: random.Random, answer: int) -> Choices:
        """Instructions that lead back, or do not."""
        turning = generator.random() < 0.5
        sentences = None
        while sentences is None:
            (length,) = generator.choices(_LENGTHS, _WEIGHTS)
            attempts = (_walk(generator, length, turning, back=answer == 0) for _ in range(_TRIES))
            sentences = next((walk for walk in attempts if walk is not None), None)
        return Choices(" ".join([_START, *([] if turning else ["Always face forward."]), *sentences]), ("Yes", "No"))


def _walk(generator: random.Random, length: int, turning: bool, back: bool) -> list[str] | None:
    """Instructions that lead ``back`` or do not; ``None`` where the directions drawn make that impossible."""
    words: list[str] = []  # of each instruction: where a step goes, or where to turn
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
    """Change one count on each axis, so that the walk ends where it began; whether that is possible.

    Any of an axis's steps is as likely to be changed, so that the last one does not give the answer away.
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
    """Where a walk ends, from its start."""
    steps = list(zip(directions, counts, strict=True))
    return sum(count * x for (x, _), count in steps), sum(count * y for (_, y), count in steps)


def _step(count: int, where: str) -> str:
    return f"Take {count} step{'s' if count > 1 else ''}{where}."
