"""Everything about one task, part by part; a part that has nothing to say is left out."""

from __future__ import annotations

from collections.abc import Callable

from lightning_prompts.report.answers import answers, samples
from lightning_prompts.report.blocks import Block, Heading
from lightning_prompts.report.common import looks
from lightning_prompts.report.methods import Task
from lightning_prompts.report.prompts import prompts
from lightning_prompts.report.results import differences, further, summary
from lightning_prompts.report.terms import terms
from lightning_prompts.report.training import cost, curves


def section(task: Task, prefix: str, level: int) -> list[Block]:
    """Everything about a task.

    Args:
        task: The task.
        prefix: What its pictures' names begin with.
        level: Of its headings.
    """
    look = looks(task)
    parts: list[tuple[str, Callable[[], list[Block]]]] = [
        ("Summary", lambda: summary(task, look, prefix)),
        ("Further test sets and metrics", lambda: further(task)),
        ("Learning curves", lambda: curves(task, look, prefix)),
        ("Cost against quality", lambda: cost(task, look, prefix)),
        ("Differences, question by question", lambda: differences(task)),
        ("Prompts", lambda: prompts(task, prefix)),
        ("Answers side by side", lambda: answers(task)),
        ("Answers as training went on", lambda: samples(task)),
    ]
    blocks = terms(task)
    for title, make in parts:
        if made := make():
            blocks += [Heading(title, level), *made]
    return blocks
