"""The order of English adjectives, generated (``hyperbaton`` of BIG-bench, Srivastava et al. 2022)."""

from __future__ import annotations

import random
from typing import Any

from lightning_prompts.datamodules.generated import GeneratedReasoning
from lightning_prompts.datamodules.labels import Choices

# In the order in which they precede a noun. Gold and silver are materials, as in BIG-bench.
ADJECTIVES = {
    "opinion": "awful good lovely mysterious nice obnoxious repulsive ridiculous silly terrible wonderful",
    "size": "big enormous huge large little massive medium-size midsize normal-size small tiny",
    "age": "ancient archaic brand-new new old old-fashioned",
    "shape": "circular prismlike pyramidal rectangular spherical square triangular",
    "colour": "black blue brown gray green grey orange pink purple red tan white yellow",
    "origin": "American Bangladeshi Brazilian Chinese Congolese Egyptian Ethiopian Filipino German Indian Indonesian "
    "Iranian Japanese Mexican Nigerian Pakistani Russian Thai Turkish Vietnamese",
    "material": "cardboard cloth fiberglass glass gold iron lead leather paper plastic rubber silver steel wood wool",
    "purpose": "drinking driving eating exercise hiking smoking snorkeling typing walking whittling",
}
NOUNS = "baby car cat chair computer dog knife match monkey motorcycle ship shoe sock surfboard sweater"


class Hyperbaton(GeneratedReasoning):
    r"""Choose the right one of two orders of the same adjectives.

    ``midsize old grey Brazilian sweater``, not ``midsize grey Brazilian old sweater``: opinion, size, age, shape,
    colour, origin, material, purpose. As in BIG-bench, each kind of adjective occurs half of the time, there are at
    least two kinds, and the wrong order is any other order. A ``test`` file is BIG-Bench Hard's ``hyperbaton.json``.
    """

    task_instruction = "Which sentence has the correct adjective order?"

    def __init__(self, train_size: int = 400, val_size: int = 1000, **kwargs: Any) -> None:
        """Set the sizes."""
        super().__init__(train_size=train_size, val_size=val_size, **kwargs)

    @property
    def task(self) -> str:
        """The name of the task in BIG-Bench Hard."""
        return "hyperbaton"

    def draw(self, generator: random.Random, answer: int) -> Choices:
        """Draw some adjectives, in the right order and in another one."""
        right: list[str] = []
        while len(right) < 2:
            right = [generator.choice(words.split()) for words in ADJECTIVES.values() if generator.random() < 0.5]
        wrong = right
        while wrong == right:
            wrong = generator.sample(right, len(right))
        noun = generator.choice(NOUNS.split())
        sentences = [" ".join([*order, noun]) for order in (right, wrong)]
        options = sentences if answer == 0 else sentences[::-1]
        return Choices("Which sentence has the correct adjective order:", tuple(options), lettered=True)
