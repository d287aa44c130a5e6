"""Score C candidate prompts on N examples; what candidates or examples share is run once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.passes import Passes, fill, tokens_to_run, transposed
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.objectives import Likelihood
from lightning_prompts.processes import DataParallelRank, MapAcrossRanks


@dataclass(frozen=True)
class Racing:
    """Scores all candidates on a few examples, and only the promising ones on more.

    After ``first`` examples, and after each doubling of them, a candidate is dropped if its loss exceeds the leader's
    by more than chance explains: a one-sided test at level ``error`` on the paired differences, corrected for the
    examples that remain. Candidates that stay are scored on all examples, so the winner's loss is exact.

    The level is that of one test against one given opponent. The leader is the luckiest of all candidates, so the best
    one is dropped more often: of 64 equally good ones, with 8 of 32 examples first and a level of 0.05, in three races
    of ten (simulated in the tests). The loss then is the difference to the next best, which is small if many are about
    equally good. The bound is ``error`` times the number of candidates times the number of rounds.

    Attributes:
        first: Number of examples in the first round, at least 2.
        error: Level of each test, above 0 and at most 0.5; larger values are faster.
    """

    first: int = 8
    error: float = 0.05

    def __post_init__(self) -> None:
        """Check the settings."""
        check_at_least("racing.first", self.first, 2)
        if not 0 < self.error <= 0.5:
            raise UserError(f"racing.error must be above 0 and at most 0.5, got {self.error}")

    def remaining(self, losses: Tensor, examples: int, keep: int = 1) -> Tensor:
        """Which candidates stay in the race.

        Args:
            losses: Losses on the examples so far, ``[C, n]``.
            examples: ``N``, the size of the batch.
            keep: Number of winners; with more than one, candidates are compared with the last of them so far.

        Returns:
            ``[C]`` bool; the ``keep`` best so far always stay.
        """
        seen = losses.shape[1]
        means = losses.mean(-1)
        rival = means.argmin() if keep == 1 else means.argsort(stable=True)[min(keep, len(means)) - 1]
        difference = losses - losses[rival]
        chance = difference.std(-1) * math.sqrt((1 / seen) * (examples - seen) / max(examples - 1, 1))
        quantile = statistics.NormalDist().inv_cdf(1 - self.error)
        return difference.mean(-1) <= quantile * chance


class CandidateScorer(Passes):
    """Scores candidates x examples in passes that fit into memory.

    Args:
        lm: See `Passes`.
        memory_mb: See `Passes`.
        map_across_ranks: Splits the candidates over processes; by default, this process scores them all.
    """

    def __init__(
        self,
        lm: FrozenLM,
        memory_mb: float = 256.0,
        map_across_ranks: MapAcrossRanks = DataParallelRank().map_across_ranks,
    ) -> None:
        """Keep the settings."""
        super().__init__(lm, memory_mb)
        self.map_across_ranks = map_across_ranks

    @torch.no_grad()
    def score(self, rows: Sequence[Row], candidates: Tensor) -> Scores:
        """Score every candidate on every example.

        Args:
            rows: ``N`` rows with a prompt slot of ``P`` places each.
            candidates: Token ids ``[C, P]``.

        Returns:
            Scores whose tensors are ``[C, N]``.
        """
        filled = fill(rows, candidates.tolist())
        by_candidate = tokens_to_run(filled[:2]) <= tokens_to_run(transposed(filled[:2]))
        answers = sum(len(row.answer) + len(row.end) for row in rows)
        size = self.fitting(tokens_to_run(filled[:1]), answers)

        def work(mine: Sequence[list[Row]]) -> list[Tensor]:
            scores = _joined(self.run(mine, size, len(rows), lambda part: self._pass(part, by_candidate)))
            return list(torch.stack([part.float() for part in _parts(scores)], 1).cpu())  # [4, N] of each candidate

        nll, tokens, greedy, end_nll = to_device(torch.stack(self.map_across_ranks(filled, work), 1), self.lm.device)
        return Scores(nll, tokens.long(), greedy.bool(), end_nll)

    def _pass(self, filled: list[list[Row]], by_candidate: bool) -> Scores:
        """``[C][N]`` rows in one forward pass -> scores ``[C, N]``."""
        none = self.lm.no_prompt()
        if by_candidate:
            scores = self.lm.score_rows([row for part in filled for row in part], none, group=len(filled[0]))
            return _shaped(scores, (len(filled), -1), transpose=False)
        columns = transposed(filled)
        scores = self.lm.score_rows([row for part in columns for row in part], none, group=len(filled))
        return _shaped(scores, (len(columns), -1), transpose=True)


@torch.no_grad()
def race(
    scorer: CandidateScorer,
    rows: Sequence[Row],
    candidates: Tensor,
    objective: Likelihood,
    racing: Racing | None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Losses of candidates on a batch, ``[C]``; infinite for those that dropped out of the race.

    Args:
        scorer: Scores the candidates.
        rows: ``N`` rows with a prompt slot.
        candidates: Token ids ``[C, P]``.
        objective: Turns scores into losses.
        racing: How to race; ``None`` scores all candidates on all examples.
        offsets: Costs of the candidates beside their losses on the examples, ``[C]``.
    """
    mean_tokens = sum(len(row.answer) for row in rows) / len(rows)

    def losses(alive: Tensor, part: slice) -> Tensor:
        return objective.per_example(scorer.score(rows[part], candidates[alive]), mean_tokens)

    if offsets is None:
        offsets = torch.zeros(len(candidates), device=candidates.device)
    return race_losses(losses, len(rows), racing, offsets)


def race_losses(
    losses_of: Callable[[Tensor, slice], Tensor],
    examples: int,
    racing: Racing | None,
    offsets: Tensor,
    keep: int = 1,
) -> Tensor:
    """Run a race on losses of any kind; see `race`.

    Args:
        losses_of: Returns the losses ``[c, n]`` of ``c`` candidates, given as indices, on a part of the examples.
        examples: ``N``, the number of examples.
        racing: See `race`.
        offsets: See `race`; they tell the number of candidates and the device.
        keep: See `Racing.remaining`.
    """
    alive = torch.arange(len(offsets), device=offsets.device)
    losses = torch.empty(len(offsets), 0, device=offsets.device)
    end = examples if racing is None else min(racing.first, examples)
    while True:
        losses = torch.cat([losses, losses_of(alive, slice(losses.shape[1], end))], -1)
        if end == examples or racing is None:
            break
        stays = racing.remaining(losses + offsets[alive, None], examples, keep)
        alive, losses = alive[stays], losses[stays]
        end = examples if len(alive) <= keep else min(2 * end, examples)
    result = torch.full((len(offsets),), float("inf"), device=offsets.device)
    result[alive] = losses.mean(-1) + offsets[alive]
    return result


def _parts(scores: Scores) -> list[Tensor]:
    """The tensors of scores with a value for each row."""
    return [scores.nll, scores.tokens, scores.greedy, scores.end_nll]


def _of_parts(parts: list[Tensor]) -> Scores:
    nll, tokens, greedy, end_nll = parts
    return Scores(nll, tokens, greedy, end_nll)


def _shaped(scores: Scores, shape: tuple[int, int], transpose: bool) -> Scores:
    parts = [part.view(shape) for part in _parts(scores)]
    return _of_parts([part.T if transpose else part for part in parts])


def _joined(parts: list[Scores]) -> Scores:
    return _of_parts([torch.cat(list(column)) for column in zip(*map(_parts, parts), strict=True)])
