"""What a Deep Language Network has learned: its prompts over time, its hidden texts, and what they carry.

    python experiments/dln/analysis.py runs/dln2 [--examples 10] [--draws 5]
    python experiments/dln/analysis.py runs/dln/*/dln1/seed-*

Of several runs: for each its accuracy at the first validation and at the best, with the best prompt; and of all of
them, how many proposals of each kind were tried and chosen. Of one run (``config.yaml``, ``checkpoints/best.ckpt``,
``prompts.jsonl``), as Markdown:

1. The prompts of every validation with their accuracy, and how many proposals of each kind were tried and chosen.
2. The messages' mean gains.
3. For networks of two layers or more: hidden texts of some test examples under the initial and under the best prompts,
   and how much they say about the answer, in nats, before and after (`mutual_information`): the answer that the network
   gives, over examples, and over draws of the hidden text for the same example.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prompts.cli import PromptCLI
from lightning_prompts.errors import UserError
from lightning_prompts.methods import DeepLanguageNetwork
from lightning_prompts.runs.reader import read_rows
from lightning_prompts.types import Example


class Loaded(PromptCLI):
    """Builds what a run's config names, and runs nothing."""

    def test(self, **kwargs: Any) -> None:
        """In the place of the Trainer's."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    if not rows:
        return "(none)"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [str(value).replace("\n", "⏎").replace("|", "\\|") for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts of every validation."""
    return [
        {
            "step": row["step"],
            "accuracy": row["accuracy"],
            "best": row["best_accuracy"],
            "prompts": "\n--\n".join(row["prompts"]),
            "back to best": "yes" if row["back_to_best"] else "",
        }
        for row in rows
        if row["kind"] == "validation"
    ]


def best(run: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run's accuracy at its first validation and at its best, and the prompts of that."""
    looked = [row for row in rows if row["kind"] == "validation"]
    top = max(looked, key=lambda row: float(row["accuracy"]))  # the first of equals, as the run has it
    return {
        "run": run,
        "first": looked[0]["accuracy"],
        "best": top["accuracy"],
        "at step": top["step"],
        "prompts": "\n--\n".join(top["prompts"]),
    }


def kinds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each kind of candidate was tried and chosen, by layer."""
    tried = [row for row in rows if "reward" in row]
    counts = Counter((row["layer"], row["kind"]) for row in tried)
    chosen = Counter((row["layer"], row["kind"]) for row in tried if row["chosen"])
    return [
        {"layer": layer, "kind": kind, "tried": count, "chosen": chosen[layer, kind]}
        for (layer, kind), count in sorted(counts.items())
    ]


def classes(method: DeepLanguageNetwork, examples: Sequence[Example], texts: Sequence[str], prompt: str) -> Tensor:
    """Log-probabilities of the classes after hidden texts, ``[B, Y]``."""
    placed = [method.network.top.place(example, text) for example, text in zip(examples, texts, strict=True)]
    return method.network.lms[-1].class_log_probs(placed, [prompt])[0]


def draws(
    method: DeepLanguageNetwork, examples: Sequence[Example], prompts: Sequence[str], count: int
) -> list[list[str]]:
    """Hidden texts of the layer below the top one, drawn at temperature 0.7, ``[K][B]``."""
    index = len(method.network.layers) - 2
    layer, cached = method.network.layers[index], method.network.lms[index]
    below = method.network.sample_hidden(examples, prompts)[index - 1] if index else [""] * len(examples)
    placed = [layer.place(example, under) for example, under in zip(examples, below, strict=True)]
    size = len(placed)
    return [
        cached.draw(placed, prompts[index], layer.settings.max_new_tokens, 0.7, range(k * size, (k + 1) * size))
        for k in range(count)
    ]


def mutual_information(log_probs: Tensor) -> Tensor:
    """Estimate the mutual information of text and class from the class probabilities after each of several texts.

    It is the entropy of the mean probabilities minus the mean of their entropies. It is 0 if every text leads to the
    same probabilities, and the logarithm of the number of classes if texts decide the class and all classes are equally
    frequent. It measures the classes that the LM predicts, right or wrong.

    Args:
        log_probs: Log-probabilities of ``Y`` classes after ``K`` texts, ``[K, Y]``; negative infinity for a class that
            does not exist.

    Returns:
        A scalar, in nats.
    """
    mean = torch.logsumexp(log_probs, 0) - math.log(len(log_probs))
    return _entropy(mean) - _entropy(log_probs).mean()


def _entropy(log_probs: Tensor) -> Tensor:
    """Compute the entropy, ``[..., Y]`` -> ``[...]``, in nats."""
    return -torch.where(torch.isinf(log_probs), 0.0, log_probs.exp() * log_probs).sum(-1)


def information(
    method: DeepLanguageNetwork, examples: Sequence[Example], prompts: Sequence[str], count: int
) -> dict[str, Any]:
    """What hidden texts carry under some prompts."""
    hidden = method.network.sample_hidden(examples, prompts)[-1]
    answered = classes(method, examples, hidden, prompts[-1])
    drawn = draws(method, examples, prompts, count)
    several = torch.stack([classes(method, examples, texts, prompts[-1]) for texts in drawn])
    by_draws = torch.stack([mutual_information(one) for one in several.unbind(1)]).mean()
    right = sum(answer.right for answer in method.network.answer(examples, [hidden], prompts))
    return {
        "accuracy": f"{right / len(examples):.3f}",
        "I(x, h; y)": f"{mutual_information(answered):.4f}",
        "I(h; y | x)": f"{by_draws:.4f}",
        "different h": len(set(hidden)),
        "mean length": f"{sum(map(len, hidden)) / len(hidden):.0f}",
    }


def main() -> None:
    """Read, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--examples", type=int, default=10, help="whose hidden texts are shown")
    parser.add_argument("--measured", type=int, default=100, help="that information is estimated from")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    for name in ("examples", "measured", "draws"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    for run in arguments.runs:
        if not run.is_dir():
            parser.error(f"{run} is no folder; give the folder of a run, such as runs/dln2")
        if not (run / "prompts.jsonl").is_file():
            needed = "the run of a DeepLanguageNetwork with the callback PromptTable"
            parser.error(f"{run}/prompts.jsonl does not exist; give {needed}")
    try:
        tables = [read_rows(run / "prompts.jsonl") or [] for run in arguments.runs]
    except UserError as error:
        parser.error(str(error))
    for run, rows in zip(arguments.runs, tables, strict=True):
        if not any(row["kind"] == "validation" for row in rows):
            parser.error(f"{run}/prompts.jsonl has no validation; the run ended before its first one")
    if len(tables) > 1:
        overview = [best(run, rows) for run, rows in zip(arguments.runs, tables, strict=True)]
        pooled = kinds([row for rows in tables for row in rows])
        print(f"Best prompts\n\n{table(overview)}\n\nProposals\n\n{table(pooled)}")
    else:
        one_run(arguments.runs[0], tables[0], arguments)


def one_run(run: Path, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Everything about one."""
    print(f"Prompts over time\n\n{table(over_time(rows))}\n\nProposals\n\n{table(kinds(rows))}")
    place = ["--trainer.default_root_dir", str(run)]  # its config names the folder that it was trained in
    cli = Loaded(["test", "-c", str(run / "config.yaml"), "--ckpt_path", "best", *place])
    method, data = cli.model, cli.datamodule
    method.configure_model()
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    method.on_load_checkpoint(checkpoint)
    L.seed_everything(0, verbose=False)
    gains = [
        {
            "layer": layer,
            "message": message,
            "proposals": stats.counts[message],
            "mean gain": f"{stats.mean(message):.4f}",
        }
        for layer, stats in enumerate(method.message_stats)
        for message in range(len(stats.counts))
    ]
    print(f"\nMessages\n\n{table(gains)}")
    if len(method.prompts) < 2:
        return
    examples = data.examples("test")[: max(arguments.examples, arguments.measured)]
    before, after = method.initial_prompts, method.active_prompts()
    with torch.no_grad():
        texts = [
            method.network.sample_hidden(examples[: arguments.examples], prompts)[-1] for prompts in (before, after)
        ]
        shown = [
            {"question": example.question, "answer": example.reference, "before": first, "after": second}
            for example, first, second in zip(examples, *texts, strict=False)
        ]
        print(f"\nHidden texts\n\n{table(shown)}")
        if all(example.labels for example in examples):
            both = [
                {"prompts": name, **information(method, examples[: arguments.measured], prompts, arguments.draws)}
                for name, prompts in (("initial", before), ("best", after))
            ]
            print(f"\nWhat they carry\n\n{table(both)}")


if __name__ == "__main__":
    main()
