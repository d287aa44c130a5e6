"""Count how often the host waits for the device in one training step of each method.

    python experiments/benchmarks/host_waits.py [METHOD ...] [--lines] [--steps 4]

The script trains each method of `tests/support/cases.py` on the pretend device, with all default callbacks
and without logging, with a model of two layers and four examples per step. While the host waits for a GPU, it does not
queue work for it. The first step is not counted. The kinds of waits:

- item: the host reads a number (`.item()`, `float()`, `if tensor`).
- size: the host needs the size of a result (`nonzero()`, `tensor[mask]`, `unique()`).
- download: a tensor is copied to the host (`.cpu()`, `.tolist()`).
- upload: a tensor is copied to the device, and not with ``non_blocking``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.cases import MODEL, TRAINED, Case
from support.pretend_device import NAME, installed, waits
from support.runs import trainer

KINDS = ("item", "size", "download", "upload")
TWO_LAYERS = MODEL.replace("num_hidden_layers=1", "num_hidden_layers=2")
console = Console(stderr=True)


@contextmanager
def counted_steps() -> Iterator[list[Counter[tuple[str, str]]]]:
    """Count the waits of each training step, from fetching the batch to the callbacks after it, without validation."""
    steps: list[Counter[tuple[str, str]]] = []
    advance = _TrainingEpochLoop.advance

    def counting(self: Any, data_fetcher: Any) -> None:
        waits.clear()
        advance(self, data_fetcher)
        steps.append(Counter(waits))

    _TrainingEpochLoop.advance = counting  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        _TrainingEpochLoop.advance = advance  # type: ignore[method-assign]


def waits_of(case: Case, steps: int) -> Counter[tuple[str, str]]:
    """Train a method, and sum the waits of all steps except the first, by kind and line."""
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder, counted_steps() as counts:
        fit = trainer(NAME, Path(folder), max_steps=steps + 1, log_every_n_steps=10**9, limit_val_batches=1)
        fit.fit(case.make(model=TWO_LAYERS), case.data())
    return sum(counts[1:], Counter())


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {'; '.join(TRAINED)}; default: all")
    parser.add_argument("--steps", type=int, default=4, help="counted training steps")
    parser.add_argument("--lines", action="store_true", help="print the lines that wait")
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(TRAINED):
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with installed():
        names = arguments.methods or list(TRAINED)
        found = {name: waits_of(TRAINED[name], arguments.steps) for name in track(names, console=console)}
    print(f"| method | {' | '.join(KINDS)} | waits per step |\n|" + "---|" * (len(KINDS) + 2))
    for name, counts in found.items():
        sums = [sum(count for (kind, _), count in counts.items() if kind == wanted) for wanted in KINDS]
        print(f"| {name} | {' | '.join(f'{count / arguments.steps:g}' for count in (*sums, sum(sums)))} |")
    for name, counts in found.items() if arguments.lines else ():
        print(f"\n{name}:")
        for (kind, place), count in counts.most_common():
            print(f"  {count / arguments.steps:6.2f}  {kind:8}  {place}")


if __name__ == "__main__":
    main()
