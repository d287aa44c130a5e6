"""Several processes that work on one run."""

from __future__ import annotations

import re

import torch.distributed as dist

from lightning_prompts.errors import UserError

# What gloo and NCCL say when the other end is gone or does not answer.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|remote worker", re.IGNORECASE)


def process_lost(error: BaseException) -> UserError | None:
    """What to tell about an error that means that another process of the run is gone; ``None`` for others."""
    if not isinstance(error, RuntimeError) or not (dist.is_available() and dist.is_initialized()):
        return None
    if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
        return None
    return UserError(
        f"another process of this run has died or does not answer ({' '.join(str(error).split())[:100]}...), so this "
        "one ends too; what that one has said is further up. Go on with --ckpt_path last"
    )
