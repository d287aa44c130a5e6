"""Compare scoring of prompts x examples x labels with batched full forward passes of transformers.

    python experiments/benchmarks/dln_scoring.py [--prompts 20] [--examples 20] [--repeats 3]

The grid has 20 prompts (instructions of about 20 tokens), 20 examples and 2 or 6 labels, with the prompt or the example
first in the template. The baseline makes one text of every prompt, example and label, pads the texts to batches, and
computes logits at every position, with the fastest of several batch sizes. The benchmark compares the normalised
log-probabilities of the classes. With --ways 2, each label is scored with and without a leading space, as methods do,
which doubles the texts of the baseline.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prompts.dln.cached_lm import CachedLM, CheckpointedCache
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.lm.encoding import LabelTokens
from lightning_prompts.lm.labels import class_log_probs
from lightning_prompts.template import Template
from lightning_prompts.types import Example

NAME = "smollm2-135m-instruct"
TEMPLATES = {
    "prompt first": "{prompt}\n\n{question}\n\nAnswer: {answer}",
    "example first": "{question}\n\n{prompt}\n\nAnswer: {answer}",
}
LABELS = {
    2: ("negative", "positive"),
    6: ("description", "entity", "expression", "human", "location", "number"),
}
TASKS = {2: "whether the review of the film is negative or positive", 6: "what kind of thing the question asks for"}
OPENINGS = (
    "Read the text below and decide",
    "Think about the words and say",
    "You are an expert; tell us",
    "Look at each word carefully, and then write",
)
ENDINGS = ("Answer with one word.", "Be exact.", "Do not explain.", "Consider every word.", "Choose the best option.")
WORDS = [
    "the",
    "a",
    "this",
    "film",
    "story",
    "actor",
    "plot",
    "is",
    "was",
    "seems",
    "never",
    "always",
    "quite",
    "rather",
    "slow",
    "warm",
    "dull",
    "bright",
    "long",
    "short",
    "and",
    "but",
    "with",
    "of",
    "in",
    "who",
    "what",
    "where",
    "made",
    "wrote",
    "first",
    "second",
    "city",
    "river",
    "war",
    "music",
    "painter",
    "name",
    "year",
]
console = Console(stderr=True)


def instructions(task: str, count: int) -> list[str]:
    """Make different instructions for a task."""
    every = [f"{opening} {task}. {ending}" for ending in ENDINGS for opening in OPENINGS]
    return every[:count]


def examples(template: str, labels: tuple[str, ...], count: int) -> list[Example]:
    """Make examples of 15 to 40 random words without a common prefix."""
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=draw.randint(15, 40))).capitalize() + "." for _ in range(count)]
    classes = [(label,) for label in labels]
    return [Template(template).render({"question": row, "answer": labels[0]}, labels=classes) for row in rows]


def written(lm: FrozenLM, labels: tuple[str, ...], ways: int) -> LabelTokens:
    """Encode labels as tokens."""
    spaces = (" ", "")[:ways]
    pairs = [(tuple(lm.encoder.tokens(space + name)), index) for index, name in enumerate(labels) for space in spaces]
    return LabelTokens(tuple(tokens for tokens, _ in pairs), tuple(index for _, index in pairs), len(labels))


def shared(lm: FrozenLM, given: list[Example], prompts: list[str], known: LabelTokens, memory_mb: float) -> Tensor:
    """This project's: ``[C, N, Y]``."""
    cached = CachedLM(lm, lm.name, CheckpointedCache(), memory_mb)
    scores = cached.scores(given, prompts, [known.tokens] * len(given))
    sums = [[[total for total, _ in several] for several in line] for line in scores]
    return class_log_probs(torch.tensor(sums), known.owners)


@torch.no_grad()
def full_passes(
    lm: FrozenLM, model: Any, given: list[Example], prompts: list[str], known: LabelTokens, size: int
) -> Tensor:
    """Score each (prompt, example, label) as a separate text, in batches of ``size`` texts, ``[C, N, Y]``."""
    texts, starts = [], []
    for prompt in prompts:
        ids = lm.encoder.tokens(prompt)
        for example in given:
            head, tail = lm.encoder.row(example, 1).around_slot()
            for label in known.tokens:
                texts.append(head + ids + tail + list(label))
                starts.append(len(texts[-1]) - len(label))
    sums = []
    for first in range(0, len(texts), size):
        part = texts[first : first + size]
        width = max(map(len, part))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in part])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in part])
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, text in enumerate(part):
            start = starts[first + row]
            log_probs = logits[row, start - 1 : len(text) - 1].float().log_softmax(-1)
            sums.append(float(log_probs.gather(-1, torch.tensor(text[start:])[:, None]).sum()))
    grid = torch.tensor(sums).view(len(prompts), len(given), -1)
    return class_log_probs(grid, known.owners)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the duration in seconds and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(lm: FrozenLM, model: Any, order: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare both for one template and one number of labels, alternating between them."""
    given = examples(TEMPLATES[order], LABELS[count], arguments.examples)
    prompts = instructions(TASKS[count], arguments.prompts)
    known = written(lm, LABELS[count], arguments.ways)
    trial = {
        size: timed(lambda size=size: full_passes(lm, model, given, prompts[:2], known, size))[0]
        for size in (8, 32, 64)
    }
    size = min(trial, key=trial.__getitem__)
    ours, theirs, difference = [], [], 0.0
    for _ in track(range(arguments.repeats), description=f"{order}, {count} labels", console=console):
        before = lm.tokens_forwarded
        seconds, mine = timed(lambda: shared(lm, given, prompts, known, arguments.memory_mb))
        tokens = lm.tokens_forwarded - before
        ours.append(seconds)
        seconds, other = timed(lambda: full_passes(lm, model, given, prompts, known, size))
        theirs.append(seconds)
        difference = max(difference, float((mine - other).abs().max()))
    row = {
        "template": order,
        "labels": count,
        "batch": size,
        "full_s": statistics.median(theirs),
        "our_s": statistics.median(ours),
        "our_tokens": tokens,
        "difference": difference,
    }
    return {**row, "ratio": row["full_s"] / row["our_s"]}


def main() -> None:
    """Run the benchmark, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--labels", type=int, nargs="*", choices=sorted(LABELS), default=sorted(LABELS))
    parser.add_argument("--ways", type=int, choices=(1, 2), default=1, help="verbalisers per label")
    parser.add_argument("--memory-mb", type=float, default=256.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/dln_scoring.json"))
    arguments = parser.parse_args()
    lm = FrozenLM.load(LMConfig(NAME))
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(NAME), dtype=torch.float32).eval()
    rows = [compare(lm, model, order, count, arguments) for count in arguments.labels for order in TEMPLATES]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
