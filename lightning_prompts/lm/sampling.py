"""Sample tokens at a temperature, independent of the other rows in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prompts.errors import check_finite
from lightning_prompts.lm.transfer import to_device


class Sampling:
    """Samples the next token of each row by inverse transform sampling.

    The seed of a row determines one uniform number in [0, 1) per step. Samples therefore do not depend on other rows or
    on the length of the longest row.

    Args:
        temperature: Divisor of the logits, above 0.
        seeds: One seed per row.
        group: Number of consecutive rows that are samples for the same context, which runs once; ``None`` for none.

    Raises:
        UserError: The temperature is not a finite number above 0.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], group: int | None = None) -> None:
        """Make one generator per row."""
        check_finite("temperature", temperature, above=True)
        self.temperature = temperature
        self.group = group
        self.seeds = tuple(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: list[Tensor] = []

    def part(self, rows: slice) -> Sampling:
        """Return the same samples for a slice of the rows."""
        seeds = self.seeds[rows]
        group = self.group if self.group is not None and len(seeds) % self.group == 0 else None
        return Sampling(self.temperature, seeds, group)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Sample tokens ``[B]`` from logits ``[B, V]``; the same step, counted from 0, gives the same numbers."""
        while len(self._drawn) <= step:
            drawn = [torch.rand(1, dtype=torch.double, generator=one, device="cpu") for one in self._generators]
            self._drawn.append(torch.cat(drawn))
        upto = torch.softmax(logits.float() / self.temperature, -1).double().cumsum(-1)
        wanted = to_device(self._drawn[step], logits.device)[:, None] * upto[:, -1:]
        return torch.searchsorted(upto, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
