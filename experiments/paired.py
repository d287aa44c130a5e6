r"""Compare methods question by question: means with 95% intervals, and a paired permutation test.

    python experiments/paired.py runs/refiner/mixture/{soft_prompt,mlp,transformer}

Each folder holds runs of several seeds (`seed-K`), as `study.py` makes them; the questions of all seeds are pooled. The
first folder is what the others are compared with. Intervals are bootstrapped over questions, 10,000 times; p is
two-sided, from 10,000 random swaps of the two methods within questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DRAWS = 10_000
Key = tuple[str, str, str]


def rows(folder: Path, what: str) -> dict[Key, float]:
    """A figure for each seed's question, by seed, question and answer."""
    found: dict[Key, float] = {}
    for path in sorted(folder.glob("seed-*/predictions.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[path.parent.name, str(row["question"]), str(row["answer"])] = float(row[what])
    if not found:
        raise SystemExit(f"error: {folder} has no seed-*/predictions.jsonl; run experiments/study.py first")
    return found


def interval(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """95% of the bootstrapped means."""
    means = values[generator.integers(len(values), size=(DRAWS, len(values)))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def permutation(differences: np.ndarray, generator: np.random.Generator) -> float:
    """How often random signs make the mean difference as large as it is, two-sided."""
    signs = generator.choice([-1.0, 1.0], size=(DRAWS, len(differences)))
    extreme = np.abs((signs * differences).mean(-1)) >= abs(differences.mean()) - 1e-12
    return float((extreme.sum() + 1) / (DRAWS + 1))


def table(folders: Sequence[Path], what: str) -> list[str]:
    """One row for each folder."""
    generator = np.random.default_rng(0)
    first = rows(folders[0], what)
    lines = [f"| {what} | mean [95%] | difference to {folders[0].name} [95%] | p |", "|---|---|---|---|"]
    for folder in folders:
        mine = rows(folder, what)
        values = np.array(list(mine.values()))
        low, high = interval(values, generator)
        line = f"| {folder.name} | {values.mean():.3f} [{low:.3f}, {high:.3f}] |"
        if folder != folders[0]:
            shared = [key for key in mine if key in first]
            differences = np.array([mine[key] - first[key] for key in shared])
            if not shared:
                raise SystemExit(f"error: {folder} and {folders[0]} have no question in common")
            low, high = interval(differences, generator)
            line += (
                f" {differences.mean():+.3f} [{low:+.3f}, {high:+.3f}] | {permutation(differences, generator):.4f} |"
            )
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
