"""The order of English adjectives, generated (``hyperbaton`` of BIG-bench, Srivastava et al. 2022)."""

from __future__ import annotations

import random

from lightning_prompts.datamodules.generated_reasoning import GeneratedReasoning
from lightning_prompts.datamodules.labelled import FORWARD
from lightning_prompts.datamodules.options import Choices

# In the order in which they stand ahead of a noun. Gold and silver are materials, as BIG-bench has them.
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
    r"""Which of two orders of the same adjectives is right.

    ``midsize old grey Brazilian sweater`` and not ``midsize grey Brazilian old sweater``: opinion, size, age, shape,
    colour, origin, material, purpose. As in BIG-bench, each kind of adjective is there half of the time, two kinds at
    least, and the wrong order is any other.

    Args:
        test: Local file of BIG-Bench Hard (``hyperbaton.json``) to test on instead; no other split has its questions.
        balanced: Training batches with as many examples of each class as of any other.
        template: Text with ``{prompt}``, ``{question}`` or ``{stripped}`` (without the two orders), and ``{answer}``.
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

    instruction = "Which sentence has the correct adjective order?"

    def __init__(
        self,
        test: str | None = None,
        balanced: bool = False,
        template: str = FORWARD,
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        train_size: int = 400,
        val_size: int = 1000,
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
        return "hyperbaton"

    def draw(self, generator: random.Random, answer: int) -> Choices:
        """Some adjectives, right and in any other order."""
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
