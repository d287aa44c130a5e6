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
import shlex
import sys
from pathlib import Path

from rich.console import Console

from lightning_prompts.cli import run
from lightning_prompts.studies.runs import Run, trains
from lightning_prompts.studies.tables import Key, Results, by_metric, long_table, mixture_tasks, side_by_side

console = Console(stderr=True)


def execute(words: list[str]) -> None:
    """One command; the study stops if it fails."""
    console.print(f"$ lightning-prompts {shlex.join(words)}", highlight=False, soft_wrap=True)
    if code := run(words):
        sys.exit(code)


def collect(arguments: argparse.Namespace, options: list[str]) -> dict[Key, Results]:
    """Run everything: results by task (empty without tasks) and name of the config."""
    found: dict[Key, Results] = {}
    for task in arguments.tasks or [None]:
        for config in arguments.configs:
            for trained in (False, True) if arguments.untrained and trains(config) else (True,):
                name = config.stem if trained else f"{config.stem}-untrained"
                folder = arguments.folder / (task.stem if task else "") / name
                configs = (str(config), str(task)) if task else (str(config),)
                found[task.stem if task else "", name] = by_metric(
                    [
                        Run(
                            str(folder / f"seed-{seed}"), configs, seed, tuple(options), trained, arguments.checkpoint
                        ).measure(execute)
                        for seed in arguments.seeds
                    ]
                )
    return found


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
        mixtures = mixture_tasks(arguments.tasks)
        for what in ("exact_match", "nll"):
            print("\n" + "\n".join(side_by_side(found, what, mixtures)))


if __name__ == "__main__":
    main()
