"""Drawing tokens at a temperature, the same ones for a row whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prompts.errors import check_finite
from lightning_prompts.lm.transfer import to_device


class Sampling:
    """Draws the next token of each row by the inverse of its distribution function.

    One number in [0, 1) for each row and step decides, and it follows from the row's own seed: neither the other rows
    nor the length of the longest one matters.

    Args:
        temperature: Logits are divided by it; above 0.
        seeds: One of each row.
        group: So many rows next to each other are draws for one context, which is run once.

    Raises:
        UserError: The temperature is no number above 0.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], group: int | None = None) -> None:
        """Nothing is drawn yet."""
        check_finite("temperature", temperature, above=True)
        self.temperature = temperature
        self.group = group
        self.seeds = tuple(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: list[Tensor] = []

    def part(self, rows: slice) -> Sampling:
        """The same draws for some of the rows."""
        seeds = self.seeds[rows]
        group = self.group if self.group is not None and len(seeds) % self.group == 0 else None
        return Sampling(self.temperature, seeds, group)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Tokens ``[B]`` drawn from logits ``[B, V]``; steps count from 0, each is asked for once or more."""
        while len(self._drawn) <= step:
            drawn = [torch.rand(1, dtype=torch.double, generator=one, device="cpu") for one in self._generators]
            self._drawn.append(torch.cat(drawn))
        upto = torch.softmax(logits.float() / self.temperature, -1).double().cumsum(-1)
        wanted = to_device(self._drawn[step], logits.device)[:, None] * upto[:, -1:]
        return torch.searchsorted(upto, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
