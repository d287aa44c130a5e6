"""Candidates with their scores on each validation example, and their Pareto front (GEPA, arXiv 2507.19457)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PoolMember:
    """A candidate of the pool.

    Attributes:
        prompts: The prompts of all layers.
        scores: Its score on each validation example.
        parents: Indices of the candidates that it comes from: none for the first, two for a merge.
        turn: Number of times that the candidate and its ancestors have been drawn; decides which layer changes next.
    """

    prompts: list[str]
    scores: list[float]
    parents: list[int]
    turn: int = 0

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Merge:
    """Two candidates of different lineages combined.

    Attributes:
        prompts: The prompts of all layers.
        parents: Indices of the two candidates.
    """

    prompts: tuple[str, ...]
    parents: tuple[int, int]


class CandidatePool:
    """All candidates that were accepted; none is ever removed."""

    def __init__(self) -> None:
        """Start empty."""
        self.members: list[PoolMember] = []

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.members)

    @property
    def best(self) -> PoolMember:
        """The candidate with the largest mean score; the first of equals."""
        return max(self.members, key=lambda member: member.mean)

    def won(self) -> Tensor:
        """Which candidates have the best score on which examples, ``[C, N]`` bool; several can tie."""
        scores = torch.tensor([member.scores for member in self.members], dtype=torch.double, device="cpu")
        return scores == scores.max(0).values

    def frequencies(self) -> list[int]:
        """On how many examples each candidate of the Pareto front has the best score; 0 for dominated candidates.

        A candidate is dominated if another one is best on all examples where it is, and on more (algorithm 2).
        """
        won = self.won()
        within = (won[:, None] <= won[None]).all(-1)  # [C, C]: the other one is best wherever this one is
        dominated = (within & ~within.T).any(-1)
        return [0 if out else count for out, count in zip(dominated.tolist(), won.sum(-1).tolist(), strict=True)]

    def draw(self, generator: torch.Generator) -> int:
        """Draw a parent from the Pareto front, with probabilities proportional to `frequencies`; return its index."""
        weights = torch.tensor(self.frequencies(), dtype=torch.double, device="cpu")
        return int(torch.multinomial(weights, 1, generator=generator))

    def ancestors(self, index: int) -> set[int]:
        """Return the indices of the candidates that a candidate descends from."""
        found: set[int] = set()
        ahead = list(self.members[index].parents)
        while ahead:
            parent = ahead.pop()
            if parent not in found:
                found.add(parent)
                ahead += self.members[parent].parents
        return found

    def merges(self, tried: Sequence[Sequence[str]] = ()) -> list[Merge]:
        """Return all merges of two candidates of the Pareto front that give new prompts (the appendix on merges).

        Neither candidate descends from the other, and a common ancestor is not better than either. Each layer takes the
        prompt that has changed since the ancestor; if both have, the one of the better candidate.

        Args:
            tried: Prompts that were merged before.
        """
        known = {tuple(member.prompts) for member in self.members} | {tuple(prompts) for prompts in tried}
        front = [index for index, count in enumerate(self.frequencies()) if count]
        lines = {index: self.ancestors(index) for index in front}
        found: dict[tuple[str, ...], Merge] = {}
        for one, other in itertools.combinations(front, 2):
            if one in lines[other] or other in lines[one]:
                continue
            least = min(self.members[one].mean, self.members[other].mean)
            for ancestor in sorted(lines[one] & lines[other]):
                if self.members[ancestor].mean <= least:
                    prompts = self._merged(ancestor, one, other)
                    if prompts not in known:
                        found.setdefault(prompts, Merge(prompts, (one, other)))
        return list(found.values())

    def _merged(self, ancestor: int, one: int, other: int) -> tuple[str, ...]:
        better, worse = sorted((self.members[one], self.members[other]), key=lambda member: -member.mean)
        return tuple(
            second if first == start else first
            for start, first, second in zip(self.members[ancestor].prompts, better.prompts, worse.prompts, strict=True)
        )

    def state(self) -> list[dict[str, Any]]:
        """Return the state for a checkpoint."""
        return [asdict(member) for member in self.members]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore the state."""
        self.members = [PoolMember(**member) for member in state]
