r"""Compare methods by question: means with 95% intervals, and a paired permutation test.

    python experiments/paired.py runs/refiner/mixture/{soft_prompt,mlp,transformer}

Each folder contains runs of several seeds (`seed-K`), as `lightning-prompts sweep` writes them. The questions of all
seeds in the main test set are pooled; a question that occurs with several seeds is resampled and permuted as one unit.
The other folders are compared with the first one. Intervals come from 10,000 bootstrap samples of the questions. p is
two-sided, from 10,000 random permutations of the two methods within questions. `lightning-prompts report` shows the
same comparison for all pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.report.data import Key, compare, main_rows, questions, values
from lightning_prompts.report.page import interval, p_value
from lightning_prompts.report.statistics import bootstrap
from lightning_prompts.runs.reader import Run


def rows(folder: Path, what: str) -> dict[Key, float]:
    """Return the value of a metric for each question of each seed; an LM behind a server may give no NLL."""
    runs = [Run(path.parent) for path in sorted(folder.glob("seed-*/predictions.jsonl"))]
    if not runs:
        raise SystemExit(f"error: {folder} has no seed-*/predictions.jsonl; run lightning-prompts sweep first")
    return values({run.folder.name: main_rows(run) for run in runs}, what)


def table(folders: Sequence[Path], what: str) -> list[str]:
    """Make the lines of a table with one row per folder."""
    all_rows = [rows(folder, what) for folder in folders]
    if without := [folder for folder, mine in zip(folders, all_rows, strict=True) if not mine]:
        return [f"{without[0]} has no {what}"]
    first = all_rows[0]
    lines = [f"| {what} | mean [95%] | difference to {folders[0].name} [95%] | p |", "|---|---|---|---|"]
    for folder, mine in zip(folders, all_rows, strict=True):
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
    return [*lines, f"{len(set(questions(list(first)))):,} questions"]


def main() -> None:
    """Print a table for the NLL and one for exact match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    try:
        for what in ("nll", "correct"):
            print("\n".join(table(arguments.folders, what)), end="\n\n")
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
