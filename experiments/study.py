r"""Run configs over several seeds and print tables: mean and spread of the test metrics.

    python experiments/study.py --folder runs/antonyms --seeds 0 1 2 experiments/antonyms/*.yaml [--data.train FILE ...]
    python experiments/study.py --folder runs/families --tasks experiments/families/tasks/*.yaml \
        --budget.tokens=20000 -- experiments/families/methods/*.yaml

Each run lies in FOLDER/CONFIG/seed-K, with tasks in FOLDER/TASK/CONFIG/seed-K. A seed sets the split, the initial
prompt and the order of batches. Runs that have a ``metrics.json`` are kept, so that an interrupted study goes on where
it was. With ``--untrained``, the prompt that training starts from is tested too. With ``--tasks``, every config is
combined with every task, and further tables put the methods side by side. Other options are handed on to every run;
written ahead of the configs they need a `=`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_prompts.cli import run

console = Console(stderr=True)
UNTRAINED = {"FixedPrompt", "FewShot", "ChainOfThought"}
Results = dict[str, list[float]]  # a metric's values by seed


def execute(words: list[str]) -> None:
    """One command; the study stops if it fails."""
    console.print(f"$ lightning-prompts {' '.join(words)}", highlight=False, soft_wrap=True)
    if code := run(words):
        sys.exit(code)


def measure(
    configs: list[Path], seed: int, folder: Path, trained: bool, checkpoint: str, options: list[str]
) -> dict[str, float]:
    """Train (where there is something to train) and test configs, each on top of the one before, with one seed."""
    done = folder / "metrics.json"
    if not done.is_file():
        given = [word for config in configs for word in ("-c", str(config))]
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed), *options]
        root = ["--trainer.default_root_dir", str(folder)]
        seconds = 0.0
        if trained and trains(configs[0]):
            start = time.monotonic()
            execute(["fit", *given, *seeds, *root, "--overwrite", "true"])
            seconds = time.monotonic() - start
            keep(folder, seconds)
            execute(["test", "-c", str(folder / "config.yaml"), "--verbose", "false",
                     "--ckpt_path", checkpoint])  # fmt: skip
        else:
            keep(folder, seconds)
            execute(["test", *given, *seeds, *root, "--verbose", "false"])
    costs = {"tokens": 0.0, "steps": 0.0}
    if (folder / "budget.json").is_file():
        costs = json.loads((folder / "budget.json").read_text(encoding="utf-8"))
    return {
        **json.loads(done.read_text(encoding="utf-8")),
        **{f"budget/{name}": value for name, value in costs.items()},
        **json.loads((folder / "seconds.json").read_text(encoding="utf-8")),
    }


def keep(folder: Path, seconds: float) -> None:
    """Note the training time, before there are metrics that say that the run is done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seconds.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def trains(config: Path) -> bool:
    """Whether there is something to fit."""
    return yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["class_path"] not in UNTRAINED


def cell(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def collect(arguments: argparse.Namespace, options: list[str]) -> dict[tuple[str, str], Results]:
    """Run everything: results by task (empty without tasks) and name of the config."""
    found: dict[tuple[str, str], Results] = {}
    for task in arguments.tasks or [None]:
        for config in arguments.configs:
            for trained in (False, True) if arguments.untrained and trains(config) else (True,):
                name = config.stem if trained else f"{config.stem}-untrained"
                folder = arguments.folder / (task.stem if task else "") / name
                configs = [config, task] if task else [config]
                results = [
                    measure(configs, seed, folder / f"seed-{seed}", trained, arguments.checkpoint, options)
                    for seed in arguments.seeds
                ]
                shared = [key for key in results[0] if all(key in result for result in results)]
                found[task.stem if task else "", name] = {key: [result[key] for result in results] for key in shared}
    return found


def long_table(found: dict[tuple[str, str], Results]) -> list[str]:
    """One row for each config (and task) and test set."""
    lines = [
        "| config | NLL (nats per answer token) | exact match | test questions | training seconds | training tokens |",
        "|---|---|---|---|---|---|",
    ]
    for (task, name), results in found.items():
        for split in (key.removesuffix("/nll") for key in results if key.endswith("/nll")):
            sizes = sorted({int(size) for size in results[f"{split}/examples"]})
            size = f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
            further = split.removeprefix("test").removeprefix("/")
            label = " / ".join(part for part in (task, name, further) if part)
            lines.append(
                f"| {label} | {cell(results[f'{split}/nll'], 3)} | {cell(results[f'{split}/exact_match'], 3)} | {size} "
                f"| {cell(results['seconds'], 0)} | {cell(results['budget/tokens'], 0)} |"
            )
    return lines


def side_by_side(found: dict[tuple[str, str], Results], what: str, mixtures: set[str]) -> list[str]:
    """Methods down, tasks across: in distribution, then the mean of the out-of-distribution sets."""
    tasks, names = ([*dict.fromkeys(key[place] for key in found)] for place in (0, 1))
    lines = [f"| {what} | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
    for name in names:
        cells = []
        for task in tasks:
            results = found[task, name]
            sets = [
                key for key in results if key.startswith("test/") and key.count("/") == 2 and key.endswith(f"/{what}")
            ]
            if task in mixtures:  # these are its members' metrics, and no further test sets
                sets = []
            further: list[Any] = [results[key] for key in sets]
            outside = [statistics.mean(values) for values in zip(*further, strict=True)]
            cells.append(cell(results[f"test/{what}"], 2) + (f" → {cell(outside, 2)}" if outside else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run everything, print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", type=Path, help="configs of the data alone")
    parser.add_argument("--untrained", action="store_true", help="test the initial prompt as well")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="best on validation, or last")
    # Of an option with a space in it, the parser would think that it is a file.
    spaced = [word for word in sys.argv[1:] if word.startswith("--") and "=" in word and " " in word]
    arguments, options = parser.parse_known_args([word for word in sys.argv[1:] if word not in spaced])
    options += spaced
    if missing := [str(path) for path in (*arguments.configs, *(arguments.tasks or [])) if not path.is_file()]:
        parser.error(f"no such config: {', '.join(missing)}; options go ahead of --, as --name=value")
    found = collect(arguments, options)
    print("\n".join(long_table(found)))
    if arguments.tasks:
        classes = {task.stem: yaml.safe_load(task.read_text(encoding="utf-8"))["data"] for task in arguments.tasks}
        mixtures = {name for name, data in classes.items() if data.get("class_path") == "Mixture"}
        for what in ("exact_match", "nll"):
            print("\n" + "\n".join(side_by_side(found, what, mixtures)))


if __name__ == "__main__":
    main()
