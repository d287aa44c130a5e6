r"""Compare methods question by question: means with 95% intervals, and a paired permutation test.

    python experiments/paired.py runs/refiner/mixture/{soft_prompt,mlp,transformer}

Each folder holds runs of several seeds (`seed-K`), as `study.py` makes them; the questions of all seeds are pooled, and
those that came with several seeds are drawn and swapped together. The first folder is what the others are compared
with. Intervals are bootstrapped over questions, 10,000 times; p is two-sided, from 10,000 random swaps of the two
methods within questions. `lightning-prompts report` has the same for all pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_prompts.report.data import Key, compare, questions, values
from lightning_prompts.report.page import interval, p_value
from lightning_prompts.report.runs import Run
from lightning_prompts.report.statistics import bootstrap


def rows(folder: Path, what: str) -> dict[Key, float]:
    """A figure for each seed's question."""
    runs = [Run(path.parent) for path in sorted(folder.glob("seed-*/predictions.jsonl"))]
    found = values({run.folder.name: run.predictions or [] for run in runs}, what)
    if not found:
        raise SystemExit(f"error: {folder} has no seed-*/predictions.jsonl; run experiments/study.py first")
    return found


def table(folders: Sequence[Path], what: str) -> list[str]:
    """One row for each folder."""
    first = rows(folders[0], what)
    lines = [f"| {what} | mean [95%] | difference to {folders[0].name} [95%] | p |", "|---|---|---|---|"]
    for folder in folders:
        mine = rows(folder, what)
        figures = np.array(list(mine.values()))
        ends = bootstrap(figures, np.random.default_rng(0), questions(list(mine)))
        line = f"| {folder.name} | {figures.mean():.3f} {interval(ends)} |"
        if folder != folders[0]:
            found = compare(mine, first)
            if found is None:
                raise SystemExit(f"error: {folder} and {folders[0]} have no question in common")
            line += f" {found.difference:+.3f} {interval(found.interval, signed=True)} | {p_value(found.p_value)} |"
        else:
            line += " | |"
        lines.append(line)
    return [*lines, f"{len(first):,} questions"]


def main() -> None:
    """Print a table for the NLL and one for exact match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    for what in ("nll", "correct"):
        print("\n".join(table(arguments.folders, what)), end="\n\n")


if __name__ == "__main__":
    main()
