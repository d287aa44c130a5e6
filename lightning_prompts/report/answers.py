"""The sections with answers: side by side, and during training."""

from __future__ import annotations

import numpy as np

from lightning_prompts.report.data import Task
from lightning_prompts.report.page import NONE, Block, Table, Text, lacking, side_by_side
from lightning_prompts.runs.names import SAMPLES
from lightning_prompts.runs.reader import Prediction

QUESTIONS = 8  # side by side


def side_by_side_answers(task: Task) -> list[Block]:
    """The same questions, answered by every method."""
    methods = [method for method in task.methods if method.rows]
    if not methods:
        return []
    answered = [method.rows_among(methods) for method in methods]
    seeds = [seed for seed in answered[0] if all(seed in rows for rows in answered)]
    tables = [{(row.question, row.answer): row for row in rows[seeds[0]]} for rows in answered]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        return [Text("No question was answered by all methods.", "note")]
    chosen = [shared[round(place)] for place in np.linspace(0, len(shared) - 1, min(QUESTIONS, len(shared)))]
    seed = f" (seed {seeds[0]})" if seeds[0] else ""
    text = f"Evenly spaced, whatever the answers, among the {len(shared):,} questions that all have answered{seed}."
    blocks: list[Block] = [Text(text)]
    for part in side_by_side(list(zip(methods, tables, strict=True))):
        rows = [[*map(_short, key), *(_answer(table[key]) for _, table in part)] for key in chosen]
        header = ["question", "reference", *(method.name for method, _ in part)]
        blocks.append(Table(header, rows, texts=len(header)))
    return blocks


def _answer(row: Prediction) -> str:
    mark = "" if row.correct is None else "✓ " if row.correct else "✗ "
    return f"{mark}{_short(row.generated)}" + ("" if row.nll is None else f"\nNLL {row.nll:.2f}")


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def samples(task: Task) -> list[Block]:
    """Begin, middle and end of the samples, of the first seed that has some."""
    blocks: list[Block] = []
    for method in task.methods:
        rows = next((run.samples for run in method.runs if run.samples), [])
        steps = sorted({step for row in rows if isinstance(step := row.get("step"), int)})
        if len(steps) < 2:
            continue
        chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
        said = {
            (str(row.get("question")), str(row.get("answer")), row.get("step")): str(row.get("generated", ""))
            for row in rows
        }
        asked = list(dict.fromkeys(key[:2] for key in said))
        cells = [[*map(_short, key), *(_short(said.get((*key, step), NONE), 120) for step in chosen)] for key in asked]
        header = ["question", "reference", *(f"step {step}" for step in chosen)]
        blocks += [Text(f"{method.name}, on validation:"), Table(header, cells, texts=len(header))]
    return [*blocks, *lacking(f"{SAMPLES} though trained", task.lacking_if_trained(lambda run: run.samples))]
