"""What of a checkpoint decides how a run goes on, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def state_of(path: Path) -> dict[str, Any]:
    """All that decides how a run goes on, and what it has found."""
    checkpoint = torch.load(path, weights_only=True)
    return {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)
