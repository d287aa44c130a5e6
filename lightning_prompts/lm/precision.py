"""The fast precision of a device; for CPUs it is measured once per machine."""

from __future__ import annotations

import json
import logging
import platform
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic
from lightning_prompts.lm.config import LMConfig

log = logging.getLogger(__name__)


def mixed_dtype(device: torch.device) -> str | None:
    """Return the dtype of mixed precision, which Lightning sets around each step; ``None`` outside of it."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None


def dtype_of(config: LMConfig, device: torch.device | str) -> torch.dtype:
    """Return the dtype of a config; ``auto`` resolves to the `fast_dtype` of the device."""
    if config.dtype == "auto":
        return fast_dtype(torch.device(device).type)
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def for_device(config: LMConfig, device: torch.device | str) -> LMConfig:
    """Return the config with ``dtype: auto`` resolved for a device."""
    name: Any = str(dtype_of(config, device)).removeprefix("torch.")
    return replace(config, dtype=name) if config.dtype == "auto" else config


@cache
def fast_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 if a type of device is fast at it, otherwise float32.

    A GPU is fast at bfloat16 if it supports it. For a CPU, the result of a measurement is stored in the cache folder,
    because a new measurement on a busy machine could differ between runs.

    Args:
        device_type: ``cpu``, ``cuda``, ``mps`` and so on.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device_type != "cpu":
        return torch.bfloat16 if _multiplies_bfloat16(device_type) else torch.float32
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


def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether a device supports products of bfloat16 matrices."""
    try:
        one = torch.ones(2, 2, dtype=torch.bfloat16, device=device_type)
        return float((one @ one).sum()) == 8.0
    except (RuntimeError, TypeError):  # the type depends on the device
        return False


def _measured() -> str:
    """Time matrix products in both dtypes alternately, and compare the fastest of each."""
    generator = torch.Generator().manual_seed(0)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    left, right = (torch.randn(size, 1024, generator=generator, device="cpu") for size in (256, 1024))
    pairs = {dtype: (left.to(dtype), right.to(dtype)) for dtype in best}
    for _ in range(20):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            left @ right
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    chosen = "bfloat16" if best[torch.bfloat16] < 0.8 * best[torch.float32] else "float32"
    log.info(
        "dtype auto: %s (matmul %.2f ms in float32, %.2f ms in bfloat16)",
        chosen,
        1e3 * best[torch.float32],
        1e3 * best[torch.bfloat16],
    )
    return chosen


def _keep(path: Path, known: dict[str, str]) -> None:
    """Write the result to the cache; without a writable cache, the next run measures again."""
    with suppress(OSError, UserError):
        write_atomic(path, json.dumps(known))


def _processor() -> str:
    """Return the name of the processor and the number of threads of torch."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} {platform.machine()}, {torch.get_num_threads()} threads"
