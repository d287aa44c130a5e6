"""Random numbers of a run: drawn on the CPU and then moved, so that a seed means the same on every device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def run_seed() -> int:
    """The run's seed."""
    return torch.initial_seed() % 2**63


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, tensors are made on the CPU and its generator starts at ``seed``; outside, nothing has been drawn.

    ``torch.manual_seed`` would seed the generators of all accelerators as well, and nothing would set them back. On the
    meta device, where a module is made for its size alone, tensors stay there.
    """
    default = torch.get_default_device()
    with default if default.type == "meta" else torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def from_run_seed() -> Iterator[None]:
    """`seeded` by the run's seed: what is drawn inside does not depend on what was drawn before."""
    with seeded(torch.initial_seed()):
        yield


def random_state() -> dict[str, Any]:
    """The state of all global random numbers, as plain values that load without running anything."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was called; of devices that are not there any more nothing is set."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for device, own in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(own.cpu(), device)
