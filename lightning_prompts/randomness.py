"""Random numbers of a run, drawn on the CPU and then moved, so that a seed gives the same numbers on every device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def run_seed() -> int:
    """Return the seed of the run."""
    return torch.initial_seed() % 2**63


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make tensors on the CPU with the CPU generator at ``seed``, and restore the generator afterwards.

    ``torch.manual_seed`` would also seed the generators of all accelerators without restoring them. If the default
    device is the meta device, tensors are made there.
    """
    default = torch.get_default_device()
    with default if default.type == "meta" else torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def from_run_seed() -> Iterator[None]:
    """Use `seeded` with the seed of the run, so that draws inside do not depend on earlier draws."""
    with seeded(torch.initial_seed()):
        yield


def random_state() -> dict[str, Any]:
    """Return the states of all global random generators as plain data, which can be loaded without pickle."""
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
    """Restore the states of `random_state`, except those of devices that no longer exist."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for device, own in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(own.cpu(), device)
