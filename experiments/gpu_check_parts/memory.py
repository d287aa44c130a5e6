"""Provoke out-of-memory errors: generation and scoring must halve their batches, with the same results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_check_parts.base import LARGER, SHAPES, attempt, clean, compared, load, normal
from gpu_check_parts.rows import Row, Settings
from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.encoding import Row as TextRow
from lightning_prompts.lm.passes import ContinuationScorer
from lightning_prompts.search.scoring import CandidateScorer

SECONDS = 60  # for one job
PLENTY = 1e6  # memory limit of a pass in megabytes, which is never reached
TOLERANCE = 1e-4
HOOK, LIMIT = "raised in the first large pass", "raised by the allocator"


def jobs(settings: Settings) -> list[str]:
    """List each kind of work with an artificial error, and on a GPU with a real one."""
    ways = [HOOK, LIMIT] if settings.device == "cuda" else [HOOK]
    return [f"{work}, {way}" for way in ways for work in WORKS]


def run(name: str, settings: Settings) -> list[Row]:
    """Run one kind of work with and without enough memory."""
    work, way = name.split(", ")
    lm = load(SHAPES["llama"] if settings.small else LARGER, settings.device)
    do = partial(WORKS[work], lm, 8 if settings.small else 256)
    return [attempt("memory", name, partial(_hook if way == HOOK else _limit, name, lm, do))]


def _rows(lm: FrozenLM, count: int) -> list[TextRow]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 200, (count, 24), generator=draw, device="cpu").tolist()
    return [TextRow([-1, -2, *row[:20]], row[20:]) for row in ids]


def _generate(lm: FrozenLM, count: int) -> Tensor:
    rows = [TextRow(row.context, []) for row in _rows(lm, 8 * count)]
    texts = lm.generate_tokens(rows, normal(lm, 2).detach(), 8)
    return torch.tensor([(text + [0] * 8)[:8] for text in texts], device="cpu")


def _candidates(lm: FrozenLM, count: int) -> Tensor:
    ids = torch.randint(40, 200, (count, 2), generator=torch.Generator().manual_seed(1), device="cpu")
    return CandidateScorer(lm, PLENTY).score(_rows(lm, 8), ids.to(lm.device)).nll


def _continuations(lm: FrozenLM, count: int) -> Tensor:
    prompts = torch.randint(40, 200, (count, 2), generator=torch.Generator().manual_seed(1), device="cpu").tolist()
    texts = [[[49], [50, 51]]] * 8
    return torch.tensor(ContinuationScorer(lm, PLENTY).score(_rows(lm, 8), prompts, texts), device="cpu")


WORKS: Mapping[str, Callable[[FrozenLM, int], Tensor]] = {
    "generation": _generate,
    "candidates": _candidates,
    "continuations": _continuations,
}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the log messages of the project about memory."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "out of memory" in record.getMessage():
                said.append(record.getMessage())

    product, handler = logging.getLogger("lightning_prompts"), Keep()
    product.addHandler(handler)
    try:
        yield said
    finally:
        product.removeHandler(handler)


def _judge(name: str, found: Tensor, wanted: Tensor, said: list[str]) -> Row:
    if wanted.is_floating_point():
        row = compared("memory", name, found, wanted, TOLERANCE)
    else:  # other shapes round differently, and tokens can be equally likely
        same = (found == wanted).all(-1).float().mean().item()
        row = Row("memory", name, f"{same:.1%} of texts the same", ">= 99%", same >= 0.99)
    row.measured = f"halved {len(said)} times, {row.measured}"
    row.expected = f"halved at least once, {row.expected}"
    row.ok = bool(row.ok and said)
    return row


def _hook(name: str, lm: FrozenLM, work: Callable[[], Tensor]) -> Row:
    """Raise the error of CUDA in passes with more than 3/5 of the tokens of the largest pass."""
    sizes: list[int] = []
    limit = [1 << 62]

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["inputs_embeds"].shape[1])
        if sizes[-1] > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory (raised by the check)")

    handle = lm.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        wanted = work()
        limit[0] = max(sizes) * 3 // 5
        with _warnings() as said:
            found = work()
    finally:
        handle.remove()
    return _judge(name, found, wanted, said)


def _limit(name: str, lm: FrozenLM, work: Callable[[], Tensor]) -> Row:
    """Reduce the memory of this process until the work does not fit into one batch."""
    work()
    clean("cuda")
    before = torch.cuda.memory_reserved()
    wanted = work()
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    said: list[str] = []
    found, share = wanted, 1.0
    try:
        while not said and share > 0.2:
            share -= 0.15
            clean("cuda")
            torch.cuda.set_per_process_memory_fraction((before + share * (peak - before)) / total)
            with _warnings() as said:
                found = work()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        clean("cuda")
    row = _judge(name, found, wanted, said)
    row.figures |= {"peak_MiB": peak / 2**20, "limit_MiB": (before + share * (peak - before)) / 2**20}
    return row
