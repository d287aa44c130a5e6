"""What a run was run with, for whoever compares runs or makes them again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping

import torch

PACKAGES = ("lightning-prompts", "torch", "lightning", "transformers", "tokenizers", "numpy", "peft", "bitsandbytes",
            "openai", "ray")  # fmt: skip


def environment(
    device: torch.device, processes: int, dtype: torch.dtype | None, quantization: str | None
) -> Mapping[str, object]:
    """Versions, machine and precision.

    Args:
        device: Where this process computes.
        processes: How many there are.
        dtype: The LM's; ``None`` where it is behind a server.
        quantization: How its weights are kept, if in fewer bits.

    Returns:
        What ``environment.json`` holds: texts and numbers. Nothing that names a person or a place.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }
