"""Score grids of prompts x examples x texts, split into forward passes that fit into memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.failures import out_of_memory
from lightning_prompts.lm.plan import Plan

if TYPE_CHECKING:
    from lightning_prompts.lm.frozen import FrozenLM

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Tokens = Sequence[int]


class Passes:
    """Splits work into forward passes that fit into memory.

    Args:
        lm: The frozen language model.
        memory_mb: Megabytes that activations and logits of one pass take, about. 256 suits the caches of a CPU, where
            more is slower; a GPU wants more. If memory runs out all the same, passes are halved until they fit, with
            the same result.
    """

    def __init__(self, lm: FrozenLM, memory_mb: float = 256.0) -> None:
        """Keep the settings."""
        self.lm = lm
        self.memory_mb = memory_mb
        self.limit: int | None = None  # rows of a pass that fitted after memory ran out

    def fitting(self, tokens: int, logits: int) -> int:
        """How many items fit into one pass, at least one.

        Args:
            tokens: Tokens that one item runs.
            logits: Positions of one item with logits, each of the vocabulary's size in float32.
        """
        config = self.lm.model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or 4 * self.lm.width)
        each = 4 * (tokens * (3 * inner + 8 * self.lm.width) + 3 * logits * self.lm.vocabulary)
        return max(1, int(self.memory_mb * 2**20 / each))

    def run(self, items: Sequence[Item], size: int, rows: int, work: Callable[[list[Item]], Result]) -> list[Result]:
        """Run passes over ``size`` items each, or fewer once memory runs out, and return their results.

        Args:
            items: The items, in order.
            size: Items of one pass.
            rows: Rows of one item.
            work: Runs a pass.
        """
        size = max(1, min(len(items), size, len(items) if self.limit is None else self.limit // rows))
        results: list[Result] = []
        done = 0
        while done < len(items):
            try:
                result = work(list(items[done : done + size]))
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size //= 2
                self.limit = size * rows
                log.warning("out of memory: scoring %d candidates at a time from now on", size)
                continue
            results.append(result)
            done += size
        return results


def fill(rows: Sequence[Row], candidates: Sequence[list[int]]) -> list[list[Row]]:
    """Fill the prompt slots with token ids, ``[C][N]`` rows."""
    cuts = [row.around_slot() for row in rows]
    return [
        [Row(head + ids + tail, row.answer, row.end) for row, (head, tail) in zip(rows, cuts, strict=True)]
        for ids in candidates
    ]


def transposed(grid: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """``[C][N]`` -> ``[N][C]``."""
    return [list(column) for column in zip(*grid, strict=True)]


def tokens_to_run(groups: Sequence[Sequence[Row]], block: int = 1) -> int:
    """Count the tokens of one pass over groups of rows; what groups and every ``block`` rows share counts once."""
    rows = [row for group in groups for row in group]
    return Plan.of_answers(rows, [len(groups[0]), block], shared_prompt=True).tokens_to_run


class ContinuationScorer(Passes):
    """Scores prompts x examples x continuations in passes that fit into memory.

    Passes share what comes first: each prompt is run once in templates with the prompt first, each example in templates
    with the example first. Continuations, labels for instance, share both.
    """

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        continuations: Sequence[Sequence[Tokens]],
        block: int = 1,
    ) -> list[list[list[float]]]:
        """Score every continuation of every example under every prompt.

        Args:
            rows: ``N`` rows with a prompt slot; their answers are ignored.
            prompts: Token ids of ``C`` prompts, of any lengths.
            continuations: Of each example, token ids of one or more texts.
            block: Every ``block`` neighbouring examples share their beginning (a question with several latent samples).

        Returns:
            Log-probabilities summed over tokens, in nats: ``[C][N]`` lists of as many as the example has continuations.
        """
        # The longest text stands for all of an example's when work is measured.
        longest = [max(several, key=len) for several in continuations]
        grid = fill([Row(row.context, list(text)) for row, text in zip(rows, longest, strict=True)], prompts)
        logits = max(1 + sum(len(text) - 1 for text in several) for several in continuations)
        # A group of one prompt's examples, or of one example's prompts, must fit into a pass.
        widest = max((row for part in grid for row in part), key=lambda row: len(row.context))
        room = self.fitting(len(widest.context) + len(widest.answer), logits)
        room = room // block * block or room
        results: list[list[list[float]]] = [[] for _ in prompts]
        for start in range(0, len(rows), room):
            part = [line[start : start + room] for line in grid]
            texts = continuations[start : start + room]
            for line, new in zip(results, self._score(part, texts, logits, block), strict=True):
                line += new
        return results

    def _score(
        self, grid: list[list[Row]], continuations: Sequence[Sequence[Tokens]], logits: int, block: int
    ) -> list[list[list[float]]]:
        """``[C][N]`` rows -> ``[C][N]`` lists."""
        block = block if len(grid[0]) % block == 0 else 1
        by_prompt = tokens_to_run(grid[:2], block) <= tokens_to_run(transposed(grid[:2]))
        lines = grid if by_prompt else transposed(grid)
        # All prompts have the same continuations.
        texts = [continuations] * len(grid) if by_prompt else [[several] * len(grid) for several in continuations]
        groups = [len(lines[0]), block] if by_prompt and block > 1 else [len(lines[0])]
        size = self.fitting(max(tokens_to_run([line], groups[-1]) for line in lines), logits * len(lines[0]))
        work = functools.partial(self._pass, groups)
        passes = self.run(list(zip(lines, texts, strict=True)), size, len(lines[0]), work)
        scored = [line for part in passes for line in part]
        return scored if by_prompt else transposed(scored)

    @torch.no_grad()
    def _pass(
        self, groups: Sequence[int], lines: list[tuple[list[Row], Sequence[Sequence[Tokens]]]]
    ) -> list[list[list[float]]]:
        """Run lines of rows with their continuations in one forward pass."""
        contexts = [row.context for line, _ in lines for row in line]
        texts = [several for _, part in lines for several in part]
        sums = self.lm.continuation_scores(contexts, texts, self.lm.no_prompt(), groups).tolist()
        values = iter(sums)
        rows = iter([[next(values) for _ in several] for several in texts])
        return [[next(rows) for _ in line] for line, _ in lines]
