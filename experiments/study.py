"""Run configs over several seeds and print one table: mean and spread of the test metrics.

    python experiments/study.py --folder runs/antonyms --seeds 0 1 2 experiments/antonyms/*.yaml [--data.train FILE ...]

Each run lies in FOLDER/CONFIG/seed-K. A seed sets the split, the initial prompt and the order of batches. Runs that
have a ``metrics.json`` are kept, so that an interrupted study goes on where it was. With ``--untrained``, the prompt
that training starts from is tested too. Other options are handed on to every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console

from lightning_prompts.cli import run

console = Console(stderr=True)


def execute(words: list[str]) -> None:
    """One command; the study stops if it fails."""
    console.print(f"$ lightning-prompts {' '.join(words)}", highlight=False, soft_wrap=True)
    if code := run(words):
        sys.exit(code)


def measure(
    config: Path, seed: int, folder: Path, trained: bool, checkpoint: str, options: list[str]
) -> dict[str, float]:
    """Train (where there is something to train) and test one config with one seed."""
    done = folder / "metrics.json"
    if not done.is_file():
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed), *options]
        root = ["--trainer.default_root_dir", str(folder)]
        seconds = 0.0
        if trained and trains(config):
            start = time.monotonic()
            execute(["fit", "-c", str(config), *seeds, *root, "--overwrite", "true"])
            seconds = time.monotonic() - start
            keep(folder, seconds)
            execute(["test", "-c", str(folder / "config.yaml"), "--verbose", "false",
                     "--ckpt_path", checkpoint])  # fmt: skip
        else:
            keep(folder, seconds)
            execute(["test", "-c", str(config), *seeds, *root, "--verbose", "false"])
    metrics = json.loads(done.read_text(encoding="utf-8"))
    return {**metrics, **json.loads((folder / "seconds.json").read_text(encoding="utf-8"))}


def keep(folder: Path, seconds: float) -> None:
    """Note the training time, before there are metrics that say that the run is done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seconds.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def trains(config: Path) -> bool:
    """Whether there is something to fit."""
    return bool(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["class_path"] != "FixedPrompt")


def cell(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Run everything, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--untrained", action="store_true", help="test the initial prompt as well")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="best on validation, or last")
    arguments, options = parser.parse_known_args()
    lines = [
        "| config | NLL (nats per answer token) | exact match | test questions | training seconds |",
        "|---|---|---|---|---|",
    ]
    for config in arguments.configs:
        for trained in (False, True) if arguments.untrained and trains(config) else (True,):
            name = config.stem if trained else f"{config.stem}-untrained"
            results = [
                measure(config, seed, arguments.folder / name / f"seed-{seed}", trained, arguments.checkpoint, options)
                for seed in arguments.seeds
            ]
            columns = {key: [result[key] for result in results] for key in results[0]}
            sizes = sorted({int(size) for size in columns["test/examples"]})
            size = f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
            lines.append(
                f"| {name} | {cell(columns['test/nll'], 3)} | {cell(columns['test/exact_match'], 3)} | {size} | "
                f"{cell(columns['seconds'], 0)} |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
