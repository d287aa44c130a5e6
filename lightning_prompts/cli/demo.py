"""``lightning-prompts demo``: train a soft prompt on antonyms, test its checkpoint, compare."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.cli.commands import run as run_command
from lightning_prompts.errors import in_one_line
from lightning_prompts.runs.names import BEST, CHECKPOINTS, CONFIG
from lightning_prompts.runs.reader import Run

console = Console()


def parser() -> CommandParser:
    """The arguments besides those of ``fit``."""
    made = CommandParser(
        prog="lightning-prompts demo",
        allow_abbrev=False,
        description="Train a soft prompt of 4 vectors on antonyms, test it beside the word ' antonyms' and the "
        "untrained prompt, and write a report. Takes 2 minutes on 2 cores. Options of fit, such as --trainer.max_steps "
        "20, go to its commands.",
    )
    made.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="run folder, replaced (default: runs/demo)"
    )
    return made


def main(args: Sequence[str]) -> int:
    """Train, test, compare.

    Args:
        args: The words after ``demo``.

    Returns:
        The exit code.

    Raises:
        SystemExit: One of its commands failed; the exit code is that of the command.
    """
    import torch

    given, options = parser().parse_known_args(list(args))
    folder: Path = given.folder
    config, root = str(folder / CONFIG), "--trainer.default_root_dir"
    if not accelerator_works():
        options += ["--trainer.accelerator", "cpu"]

    start = time.monotonic()
    command("fit", "-c", "antonyms/soft_prompt.yaml", root, str(folder), "--overwrite", "true", *options)
    seconds = time.monotonic() - start
    command("test", "-c", "antonyms/static.yaml", root, str(folder / "static"), "--verbose", "false", *options)
    command("test", "-c", config, root, str(folder / "untrained"), "--verbose", "false")
    command("test", "-c", config, "--ckpt_path", str(folder / CHECKPOINTS / BEST), "--verbose", "false")

    run, static = Run(folder), Run(folder / "static")
    questions = int(run.metrics["test/examples"])
    table = Table(title=f"\nAntonyms, {questions:,} test questions, no word seen in training")
    for name in ("prompt", "NLL (nats per answer token)", "exact match"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for name, measured in (
        ("static text ' antonyms'", static),
        ("untrained soft prompt", Run(folder / "untrained")),
        ("trained soft prompt", run),
    ):
        result = measured.metrics
        table.add_row(name, f"{result['test/nll']:.2f}", f"{result['test/exact_match']:.1%}")
    console.print(table)

    samples = Table(title="\nFive of them: what the frozen model writes after 'Here are two... QUESTION and'")
    for name in ("question", "answer", "static", "trained"):
        samples.add_column(name)
    pairs = list(zip(run.predictions or [], static.predictions or [], strict=True))
    for trained, before in pairs[:: max(1, len(pairs) // 5)][:5]:
        samples.add_row(trained.question, trained.answer, before.generated, trained.generated)
    console.print(samples)

    best = torch.load(folder / CHECKPOINTS / BEST, weights_only=True)["global_step"]
    readout = next(row for row in run.readout if row["step"] == best)
    nearest = ", ".join(
        f"{token!r} ({cosine:.2f})" for token, cosine in zip(readout["tokens"], readout["cosine"], strict=True)
    )
    console.print(f"\nNearest vocabulary tokens (cosine): {nearest}", highlight=False, soft_wrap=True)
    console.print(
        f"Those four tokens as words: NLL {readout['nll_as_words']:.2f} on validation - a soft prompt is no sentence.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Training took {seconds:.0f} s. Everything is in {folder}/", highlight=False, soft_wrap=True)
    command("report", str(folder), "--baseline", str(folder / "static"))
    return 0


def command(*words: str) -> None:
    """Run one command; stop the demo if it fails."""
    console.print(f"\n[bold]$ lightning-prompts {shlex.join(words)}[/bold]", highlight=False, soft_wrap=True)
    if code := run_command(words):
        raise SystemExit(code)


def accelerator_works() -> bool:
    """Whether training works on this machine's accelerator; true where there is none."""
    from lightning_prompts.accelerators import accelerator_here, train_two_steps

    kind = accelerator_here()
    if kind is None:
        return True
    try:
        train_two_steps(kind)
    except Exception as error:  # noqa: BLE001 - the demo continues on the CPU
        console.print(f"Training on {kind} fails ({in_one_line(error)}), so the CPU is used.", soft_wrap=True)
        return False
    console.print(f"Training works on {kind}, which is used.")
    return True
