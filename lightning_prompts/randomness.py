"""What is drawn once follows the run's seed alone, however much of its randomness loading a model has used up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def run_seed() -> int:
    """The run's seed."""
    return torch.initial_seed() % 2**63


@contextmanager
def from_run_seed() -> Iterator[None]:
    """Inside, torch's randomness starts at the run's seed; outside, it goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
