"""Score texts after C prompts on N examples; each context is run once for all texts that may follow it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.passes import Passes, fill, tokens_to_run, transposed

Tokens = Sequence[int]


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
