"""Which precision a machine is fast at, measured once per machine."""

from __future__ import annotations

import json
import logging
import platform
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine is fast at it: on a GPU if it supports it, on a CPU by a measurement.

    The measurement is kept in the cache folder, or else runs on a machine that happens to be busy would differ.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    path = cache_root() / "fast-dtype.json"
    machine = f"{_processor()}, torch {torch.__version__}"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or known.get(machine) not in ("bfloat16", "float32"):
        known = {machine: _measured()}
        _keep(path, known)
    return torch.bfloat16 if known[machine] == "bfloat16" else torch.float32


def _measured() -> str:
    """By matrix products in turn; the best of many, as a busy machine is only ever slower."""
    generator = torch.Generator().manual_seed(0)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    pairs = {dtype: (torch.randn(256, 1024, generator=generator).to(dtype),
                     torch.randn(1024, 1024, generator=generator).to(dtype)) for dtype in best}  # fmt: skip
    for _ in range(20):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    chosen = "bfloat16" if best[torch.bfloat16] < 0.8 * best[torch.float32] else "float32"
    log.info("dtype auto: %s (matmul %.2f ms in float32, %.2f ms in bfloat16)", chosen,
             1e3 * best[torch.float32], 1e3 * best[torch.bfloat16])  # fmt: skip
    return chosen


def _keep(path: Path, known: dict[str, str]) -> None:
    """Write it down; a machine that does not let us measures again next time."""
    with suppress(OSError, UserError):
        write_atomic(path, json.dumps(known))


def _processor() -> str:
    """The processor's name, and how many threads torch may use."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} {platform.machine()}, {torch.get_num_threads()} threads"
