"""What the parts of a page have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lightning_prompts.report.blocks import Block, Text
from lightning_prompts.report.charts import Look
from lightning_prompts.report.methods import MAIN, Method, Task
from lightning_prompts.report.theme import SERIES
from lightning_prompts.runs.reader import Run

METRICS = (("nll", "NLL", False), ("exact_match", "exact match", True))  # name, title, whether a share
FIELDS = {"nll": "nll", "exact_match": "correct"}  # of a prediction
COLUMNS = 5  # methods side by side in a table
T = TypeVar("T")


def looks(task: Task) -> dict[str, Look]:
    """A colour for each method; of more than there are colours, for the best by NLL and the baseline."""
    methods = list(task.methods)
    if len(methods) > len(SERIES):

        def rank(method: Method) -> tuple[bool, float]:
            nll = method.values(f"{MAIN}/nll")
            return method is not task.baseline, sum(nll) / len(nll) if nll else float("inf")

        best = sorted(methods, key=rank)[: len(SERIES)]
        methods = [method for method in methods if method in best]
    places = {method.name: place for place, method in enumerate(methods)}
    return {method.name: Look(places.get(method.name)) for method in task.methods}


def lacking(task: Task, what: str, has: Callable[[Run], bool]) -> list[Block]:
    """A line about runs that lack a file."""
    names = []
    for method in task.methods:
        without = [run for run in method.runs if not has(run)]
        if without:
            part = "" if len(without) == len(method.runs) else f" ({len(without)} of {len(method.runs)} seeds)"
            names.append(f"{method.name}{part}")
    return [Text(f"Without {what}: {', '.join(names)}.", note=True)] if names else []


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """At most so many at a time, as even as possible."""
    if items:
        count = -(-len(items) // size)
        size = -(-len(items) // count)
    for start in range(0, len(items), size):
        yield items[start : start + size]
