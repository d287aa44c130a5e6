"""Compare generation behind a long context with generation behind what `PromptDistillation` makes of it.

    python experiments/benchmarks/distilled_generation.py

A batch of questions on an invented document is answered behind the whole document, behind a prefix of ``--length``
positions, and behind as many vectors. The values of the prompts do not change the time, so they are not trained: both
are made from the first tokens of the document. The three take turns, and the table has ratios of medians. The document
runs once for each batch, as the questions share it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console

from lightning_prompts.lm import FrozenLM, KeyValues, LMConfig
from lightning_prompts.types import Example


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-tokens", type=int, default=1000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    lm = FrozenLM.load(LMConfig(dtype=options.dtype), device=torch.device(options.device))
    lines = "".join(f"Person {n} works in room {(n * 37) % 400} and keeps a cat.\n" for n in range(400))
    context = lm.text(lm.token_ids(lines)[: options.context_tokens])
    vectors = lm.embed_text(context)[: options.length].float()
    prefix = lm.key_values(vectors)
    console = Console(soft_wrap=True, highlight=False)
    console.print("| questions at once | behind | questions per second | against the document |")
    console.print("|---|---|---|---|")
    for size in options.batch_sizes:
        texts = [f"Question: Which room does person {n} work in?\nAnswer:" for n in range(size)]
        short = [Example("", text, None, stop="(?!)") for text in texts]
        long = [Example(context, text, None, stop="(?!)") for text in texts]

        def answer(examples: list[Example], prompt: torch.Tensor | KeyValues) -> None:
            lm.generate(examples, prompt, options.new_tokens)

        ways: dict[str, Callable[[], None]] = {
            "the document": lambda long=long: answer(long, lm.no_prompt()),
            f"a prefix of {options.length} positions": lambda short=short: answer(short, prefix),
            f"{options.length} vectors": lambda short=short: answer(short, vectors),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        base = statistics.median(seconds["the document"])
        for name, taken in seconds.items():
            middle = statistics.median(taken)
            console.print(f"| {size} | {name} | {size / middle:.2f} | {base / middle:.2f}x |")


if __name__ == "__main__":
    main()
