r"""Test whether prompts transfer between a quantised model and the original model.

    python experiments/quantization_transfer.py --folder runs/quantization experiments/antonyms/soft_prompt.yaml

The script trains a config on the LM in bfloat16, int8 and nf4, tests each prompt on each of them, and prints a table
with means and standard deviations over seeds. It reuses finished runs, and passes other options to every run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from study import execute

from lightning_prompts.studies.tables import cell

# Precision of the weights; activations are bfloat16 in all cases.
FORMS: dict[str, list[str]] = {
    "bfloat16": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "none"],
    "int8": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "int8"],
    "nf4": ["--model.lm.dtype", "bfloat16", "--model.lm.quantization", "nf4"],
}


def trained(config: Path, form: str, seed: int, folder: Path, options: list[str]) -> Path:
    """Train a prompt on a form of the model unless this is done, and return its checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not (folder / "budget.json").is_file():  # written at the end of training
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        where = ["--trainer.default_root_dir", str(folder), "--overwrite", "true"]
        execute(["fit", "-c", str(config), *seeds, *FORMS[form], *options, *where])
    return checkpoint


def tested(run: Path, checkpoint: Path, form: str, folder: Path) -> dict[str, float]:
    """Test a prompt on a form of the model unless this is done, and return its metrics."""
    done = folder / "metrics.json"
    if not done.is_file():
        where = ["--trainer.default_root_dir", str(folder), "--verbose", "false"]
        execute(["test", "-c", str(run / "config.yaml"), *FORMS[form], "--ckpt_path", str(checkpoint), *where])
    return dict(json.loads(done.read_text(encoding="utf-8")))


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
                run = arguments.folder / form / f"seed-{seed}"
                checkpoint = trained(arguments.config, form, seed, run, options)
                found.append(tested(run, checkpoint, other, run / other))
            nll, exact = ([metrics[f"test/{name}"] for metrics in found] for name in ("nll", "exact_match"))
            cells.append(f"{cell(nll, 3)} / {cell(exact, 3)}")
        print(f"| {form} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
