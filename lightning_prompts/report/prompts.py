"""What the prompts are."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from lightning_prompts.report.blocks import Block, Picture, Pictures, Table, Text
from lightning_prompts.report.charts import paths
from lightning_prompts.report.common import lacking
from lightning_prompts.report.methods import Task
from lightning_prompts.report.numbers import NONE, spread
from lightning_prompts.report.prompt_path import tracks
from lightning_prompts.runs.reader import Run

TOKENS = 16  # shown of a prompt of vectors
VALIDATED = ("nll", "exact_match")


def prompts(task: Task, prefix: str) -> list[Block]:
    """Texts, nearest tokens and paths."""
    rows: list[list[str]] = []
    pictures = []
    for number, method in enumerate(task.methods):
        for run in method.runs:
            if prompt := _prompt(run):
                rows.append([method.name, run.seed or NONE, *prompt])
        drawn = next((found for run in method.runs if (found := tracks(run))), None)
        if drawn:
            lines, vocabulary, share = drawn
            picture = paths(f"{method.name} (the plane shows {share:.0%} of the variance)", lines, vocabulary)
            pictures.append(Picture(f"{prefix}-path-{number}", picture, f"path of the prompt's vectors, {method.name}"))
    blocks = lacking(task, "prompt.jsonl though trained", lambda run: bool(run.readout) or not run.trained)
    blocks += lacking(
        task, "prompt_path.jsonl, so without a picture of the path", lambda run: bool(run.path) or not _vectors(run)
    )
    if rows:
        blocks += [
            Text(
                "What stands in the prompt after the best validation: its text, or for vectors the nearest vocabulary "
                "tokens with their cosine similarity, which do not say what the vectors do: compare the NLL of these "
                "tokens used as words with that on validation. Distance is Euclidean, mean over the prompt's vectors, "
                "from the start."
            ),
            Table(
                ["method", "seed", "prompt", "step", "NLL as words", "NLL on validation", "exact match on validation",
                 "distance"], rows, texts=3,
            ),
        ]  # fmt: skip
    if pictures:
        caption = (
            "From a ring (where training began) to a disc (where it ended), a dot per validation, for some places "
            "of the prompt; the number is the place, the cross and the text its nearest token in the end; grey: tokens "
            "of the vocabulary, drawn at random. Vectors are projected at random to a few numbers and then to their "
            "two principal components, so distances are approximate. First seed that kept its path."
        )
        blocks.append(Pictures(pictures, caption))
    return [*blocks, *_own_prompts(task), *_tried(task)]


def _vectors(run: Run) -> bool:
    """Whether its prompt was one that has a path."""
    return any("tokens" in row for row in run.readout)


def _prompt(run: Run) -> list[str] | None:
    """Prompt, step, NLL as words, what validation said, distance; of the validation that chose the best checkpoint."""
    name, larger = run.monitor
    judged = {step: -value if larger else value for step, value in _finite(run, name).items()}
    readouts = {int(row["step"]): row for row in run.readout if isinstance(row.get("step"), int)}
    both = [step for step in readouts if step in judged]
    step = min(both, key=lambda step: judged[step]) if both else max(readouts, default=-1)
    row = readouts.get(step, {})
    nll, match = (_finite(run, f"val/{name}").get(step) for name in VALIDATED)
    numbers = [_cell(row.get("nll_as_words")), _cell(nll), NONE if match is None else spread([match], percent=True),
               _cell(row.get("distance"))]  # fmt: skip
    shown = NONE if step < 0 else str(step)
    if run.text is not None:
        return [repr(run.text) if "\n" not in run.text else run.text, shown, *numbers]
    tokens = row.get("tokens")
    if not isinstance(tokens, list):
        return [NONE, shown, *numbers] if numbers[-1] != NONE else None
    cosines = row.get("cosine")
    near = (
        [f" ({value:.2f})" if isinstance(value, float) else "" for value in cosines]
        if isinstance(cosines, list)
        else []
    )
    words = [f"{str(token)!r}{cosine}" for token, cosine in itertools.zip_longest(tokens, near, fillvalue="")]
    more = f" and {len(words) - TOKENS} more" if len(words) > TOKENS else ""
    return [", ".join(words[:TOKENS]) + more, shown, *numbers]


def _finite(run: Run, metric: str) -> dict[int, float]:
    """A metric's curve, without what is no number."""
    return {step: value for step, value in run.curves.get(metric, {}).items() if np.isfinite(value)}


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else NONE


def _own_prompts(task: Task) -> list[Block]:
    """Of methods that write a prompt for each question."""
    rows = []
    for method in task.methods:
        counts = Counter(row.prompt for row in itertools.chain(*method.rows.values()) if row.prompt is not None)
        common = counts.most_common(4)
        for prompt, count in common:
            rows.append([method.name, repr(prompt), f"{count:,} of {counts.total():,}", f"{len(counts):,}"])
    if not rows:
        return []
    return [
        Text("Prompts written for single questions (for vectors, the nearest tokens): the commonest, and how many "
             "different ones there are."),
        Table(["method", "prompt", "questions", "different prompts"], rows, texts=2),
    ]  # fmt: skip


def _tried(task: Task) -> list[Block]:
    """Of methods that propose prompts: those of validations that were better than all before."""
    rows = []
    for method in task.methods:
        run = next((run for run in method.runs if run.candidates), None)
        best = float("-inf")
        for row in run.candidates if run else []:
            accuracy, prompts = row.get("accuracy"), row.get("prompts")
            if isinstance(accuracy, int | float) and isinstance(prompts, list) and accuracy > best:
                best = float(accuracy)
                text = "\n–\n".join(str(prompt) for prompt in prompts)
                rows.append([method.name, text, str(row.get("step", NONE)), f"{accuracy:.1%}"])
    if not rows:
        return []
    text = "Prompts that were better on validation than all before them (prompts.jsonl; the first seed that has one)."
    return [Text(text), Table(["method", "prompts, layer by layer", "step", "accuracy"], rows, texts=2)]
