r"""Test whether prompts transfer between a quantised model and the original model.

    python experiments/quantization_transfer.py --folder runs/quantization experiments/antonyms/soft_prompt.yaml

The script trains a config on the LM in bfloat16, int8 and nf4, tests each prompt on each of them, and prints a table
with means and standard deviations over seeds. It reuses finished runs, and passes other options to every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_prompts.cli import run
from lightning_prompts.runs.names import BUDGET, CHECKPOINTS, CONFIG, LAST, METRICS
from lightning_prompts.runs.reader import Run
from lightning_prompts.runs.tables import cell

# The weights; activations are bfloat16 in all forms.
FORMS: dict[str, list[str]] = {
    "bfloat16": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "none"],
    "int8": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "int8"],
    "nf4": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "nf4"],
}


def command(*words: str) -> None:
    """Run one command, and stop if it fails."""
    if code := run(words):
        sys.exit(code)


def trained(config: Path, form: str, seed: int, folder: Path, options: list[str]) -> Path:
    """Train a prompt on a form of the model unless this is done, and return its checkpoint."""
    if not (folder / BUDGET).is_file():  # written at the end of training
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        place = ["--trainer.default_root_dir", str(folder), "--overwrite", "true"]
        command("fit", "-c", str(config), *seeds, *FORMS[form], *options, *place)
    return folder / CHECKPOINTS / LAST


def tested(training: Path, checkpoint: Path, form: str, folder: Path) -> dict[str, float]:
    """Test a prompt on a form of the model unless this is done, and return its metrics."""
    if not (folder / METRICS).is_file():
        place = ["--trainer.default_root_dir", str(folder), "--verbose", "false"]
        command("test", "-c", str(training / CONFIG), *FORMS[form], "--ckpt_path", str(checkpoint), *place)
    return Run(folder).metrics


def main() -> None:
    """Run all combinations, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments, options = parser.parse_known_args()
    print("| trained on | " + " | ".join(f"scored on {form}" for form in FORMS) + " |")
    print("|---|" + "---|" * len(FORMS))
    for form in FORMS:
        cells = []
        for other in FORMS:
            found = []
            for seed in arguments.seeds:
                training = arguments.folder / form / f"seed-{seed}"
                checkpoint = trained(arguments.config, form, seed, training, options)
                found.append(tested(training, checkpoint, other, training / other))
            nll, exact = ([metrics[f"test/{name}"] for metrics in found] for name in ("nll", "exact_match"))
            cells.append(f"{cell(nll, 3)} / {cell(exact, 3)}")
        print(f"| {form} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
