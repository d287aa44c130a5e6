"""A language model with a cache, which computes scores and greedy texts only once."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.lm import FrozenLM, LabelScores, LanguageModel, Sampling
from lightning_prompts.lm.labels import score_classes, text_label_sums
from lightning_prompts.lm.language_model import Continuation, LabelSums, Scored
from lightning_prompts.lm.precision import mixed_dtype
from lightning_prompts.processes import DataParallelRank, MapAcrossRanks
from lightning_prompts.types import Example

ENTRIES = 50_000


class CheckpointedCache:
    """Caches the latest scores and generated texts; checkpoints save them.

    A key is a 64-bit hash of everything that a result depends on: the LM's identity, the text with its prompt, and the
    continuation. The identity keeps other LMs from using the results in a checkpoint.

    Args:
        entries: Maximum number of scores; the limit for texts, which are larger, is a tenth of it.
    """

    def __init__(self, entries: int = ENTRIES) -> None:
        """Start empty."""
        self.entries = entries
        self.scores: OrderedDict[int, tuple[float, ...]] = OrderedDict()
        self.texts: OrderedDict[int, str] = OrderedDict()

    @staticmethod
    def key(lm: str, example: Example, prompt: str, what: object) -> int:
        """Compute the key of the continuation ``what`` of a placed example with a prompt."""
        parts = (lm, example.before, example.after, example.chat, example.system, prompt, what)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    def trim(self) -> None:
        """Forget the oldest entries beyond the limit."""
        while len(self.scores) > self.entries:
            self.scores.popitem(last=False)
        while len(self.texts) > self.entries // 10:
            self.texts.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """Return the content as tensors and strings, for a checkpoint."""
        values = list(self.scores.values())
        return {
            "score_keys": torch.tensor(list(self.scores), dtype=torch.long, device="cpu"),
            "score_counts": torch.tensor([len(value) for value in values], dtype=torch.int32, device="cpu"),
            "score_values": torch.tensor([*itertools.chain(*values)], dtype=torch.double, device="cpu"),
            "text_keys": torch.tensor(list(self.texts), dtype=torch.long, device="cpu"),
            "texts": list(self.texts.values()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the content from a checkpoint."""
        parts = state["score_values"].split(state["score_counts"].tolist())
        self.scores = OrderedDict(
            (key, tuple(part.tolist())) for key, part in zip(state["score_keys"].tolist(), parts, strict=True)
        )
        self.texts = OrderedDict(zip(state["text_keys"].tolist(), state["texts"], strict=True))


class CachedLM:
    """Gets scores and texts from a language model, and caches the results.

    Args:
        lm: The model, local or behind a server.
        identity: Key of the model in the cache, in this run and in runs that load the cache; see
            `LanguageModel.identity`.
        cache: The cache; several models may share it.
        memory_mb: Approximate memory of one scoring pass, in megabytes.
        calibrate: Whether to divide class probabilities by those without a question; see `calibrated`.
        map_across_ranks: Splits the work between processes that all make the same calls; by default, this process does
            all work.
    """

    def __init__(
        self,
        lm: LanguageModel,
        identity: str,
        cache: CheckpointedCache,
        memory_mb: float = 256.0,
        calibrate: bool = False,
        map_across_ranks: MapAcrossRanks = DataParallelRank().map_across_ranks,
    ) -> None:
        """Keep the settings."""
        self.lm, self.identity, self.cache = lm, identity, cache
        self.memory_mb, self.calibrate, self.map_across_ranks = memory_mb, calibrate, map_across_ranks
        self.calls = 0  # texts that the LM has scored or written

    def _identity(self) -> str:
        """The identity with the dtype of mixed precision, which changes all results."""
        mixed = mixed_dtype(self.lm.device) if isinstance(self.lm, FrozenLM) else None
        return f"{self.identity}{mixed or ''}"

    # --- scores -----------------------------------------------------------------------------------------------------

    def scores(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Continuation]],
        block: int = 1,
    ) -> list[list[list[Scored]]]:
        """Compute or look up the scores of texts after placed examples with prompts.

        Args:
            examples: ``N`` placed examples.
            prompts: ``C`` prompts.
            texts: For each example, one or more texts of at least one token each.
            block: Number of neighbouring examples with the same beginning.

        Returns:
            ``[C][N]`` lists with one score for each text of the example.

        Raises:
            UserError: See `LanguageModel.check_texts`.
        """
        entries: list[tuple[int, tuple[Continuation, ...]]] = []  # texts that are scored and cached together
        for n, several in enumerate(texts):
            entries += [(n, tuple(several))] if self.lm.scores_together else [(n, (text,)) for text in several]
        places = [n for n, _ in entries]
        found = self._entries([examples[n] for n in places], prompts, [text for _, text in entries], block)
        result: list[list[list[Scored]]] = [[[] for _ in examples] for _ in prompts]
        for mine, line in zip(result, found, strict=True):
            for n, flat in zip(places, line, strict=True):
                mine[n] += [(total, int(count)) for total, count in zip(flat[::2], flat[1::2], strict=True)]
        return result

    def _entries(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[tuple[Continuation, ...]],
        block: int,
    ) -> list[list[tuple[float, ...]]]:
        """Return alternating sums and token counts, ``[C][N]``, from the cache or the LM."""
        pairs = list(zip(examples, texts, strict=True))
        lm = self._identity()
        keys = [[self.cache.key(lm, example, prompt, text) for example, text in pairs] for prompt in prompts]
        known = self.cache.scores
        # Prompts that miss the same examples form a grid.
        grids: dict[tuple[int, ...], list[int]] = {}
        asked: set[int] = set()
        for c, line in enumerate(keys):
            first = {key: n for n, key in reversed(list(enumerate(line))) if key not in known and key not in asked}
            asked.update(first)
            if first:
                grids.setdefault(tuple(sorted(first.values())), []).append(c)
        fresh: dict[int, tuple[float, ...]] = {}
        for places, lines in grids.items():
            whole = len(places) == len(examples)  # blocks with known examples are incomplete
            scored = self._score(
                [examples[n] for n in places],
                [prompts[c] for c in lines],
                [texts[n] for n in places],
                block if whole else 1,
            )
            self.calls += len(lines) * sum(len(texts[n]) for n in places)
            for c, row in zip(lines, scored, strict=True):
                for n, several in zip(places, row, strict=True):
                    fresh[keys[c][n]] = tuple(float(value) for pair in several for value in pair)
        result = [[fresh[key] if key in fresh else known[key] for key in line] for line in keys]
        known.update(fresh)
        self.cache.trim()
        return result

    def _score(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        texts: Sequence[Sequence[Continuation]],
        block: int,
    ) -> list[list[list[Scored]]]:
        """Call `LanguageModel.text_scores`; processes share the prompts, or the blocks of examples if there is one."""
        self.lm.check_texts(examples, prompts, texts)
        if len(prompts) > 1:
            return self.map_across_ranks(
                prompts, lambda own: self.lm.text_scores(examples, own, texts, block, self.memory_mb)
            )

        def of_blocks(starts: Sequence[int]) -> list[list[list[Scored]]]:
            part = slice(starts[0], starts[-1] + block)
            (line,) = self.lm.text_scores(examples[part], prompts, texts[part], block, self.memory_mb)
            return [line[start : start + block] for start in range(0, len(line), block)]

        found = self.map_across_ranks(range(0, len(examples), block), of_blocks)
        return [[values for several in found for values in several]]

    def log_probs(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[str]], block: int = 1
    ) -> Tensor:
        """Compute the mean log-probability per token of texts, including their leading white space.

        Args:
            examples: ``N`` placed examples.
            prompts: ``C`` prompts.
            texts: ``K`` texts of each example; a text without tokens scores 0.
            block: See `scores`.

        Returns:
            ``[C, N, K]`` in nats, float64 on the CPU.
        """
        given = [[self.lm.continuation(text) for text in several] for several in texts]
        wanted = [tuple(dict.fromkeys(text for text in several if text)) for several in given]
        result = torch.zeros(len(prompts), len(examples), len(texts[0]), dtype=torch.double, device="cpu")
        asked = [n for n, several in enumerate(wanted) if several]
        if not asked:
            return result
        whole = len(asked) == len(examples)
        scored = self.scores([examples[n] for n in asked], prompts, [wanted[n] for n in asked], block if whole else 1)
        for c, line in enumerate(scored):
            for n, values in zip(asked, line, strict=True):
                means = {text: total / max(count, 1) for text, (total, count) in zip(wanted[n], values, strict=True)}
                own = [means.get(text, 0.0) for text in given[n]]
                result[c, n] = torch.tensor(own, dtype=torch.double, device="cpu")
        return result

    def class_log_probs(self, examples: Sequence[Example], prompts: Sequence[str], block: int = 1) -> Tensor:
        """Compute the log-probabilities of the classes of placed examples.

        Args:
            examples: ``N`` placed examples with labels.
            prompts: ``C`` prompts.
            block: See `scores`.

        Returns:
            ``[C, N, Y]`` in nats, float64 on the CPU; negative infinity beyond an example's last class.
        """
        return self._classes(examples, prompts, block, answers=False).log_probs

    def label_scores(self, examples: Sequence[Example], prompt: str) -> LabelScores:
        """Compute `lightning_prompts.lm.label_scores` of placed examples with a prompt, through the cache."""
        scores = self._classes(examples, [prompt], 1, answers=True)
        return LabelScores(scores.log_probs[0].float(), scores.nll)

    def _classes(self, examples: Sequence[Example], prompts: Sequence[str], block: int, answers: bool) -> LabelScores:
        def score(part: Sequence[Example], rows: Sequence[int] | None) -> LabelSums:
            own = block if rows is None else 1  # each example without content occurs once

            def cached(
                asked: Sequence[Example], lines: Sequence[str], texts: Sequence[Sequence[Continuation]]
            ) -> list[list[list[Scored]]]:
                return self.scores(asked, lines, texts, own)

            return text_label_sums(self.lm, part, prompts, cached, answers)

        return score_classes(examples, score, self.calibrate)

    # --- texts ------------------------------------------------------------------------------------------------------

    def write(self, examples: Sequence[Example], prompt: str, max_new_tokens: int) -> list[str]:
        """Generate or look up greedy texts after placed examples with a prompt."""
        lm = self._identity()
        keys = [self.cache.key(lm, example, prompt, (max_new_tokens, example.stop)) for example in examples]
        known = self.cache.texts
        missing = {key: example for key, example in zip(keys, examples, strict=True) if key not in known}
        written = self._generate(list(missing.values()), prompt, max_new_tokens, None, 0.0)
        fresh = dict(zip(missing, written, strict=True))
        result = [fresh[key] if key in fresh else known[key] for key in keys]
        known.update(fresh)
        self.cache.trim()
        return result

    def draw(
        self,
        examples: Sequence[Example],
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        group: int | None = None,
    ) -> list[str]:
        """Sample a text for each example at a temperature, with the example's seed; see `Sampling`."""
        if temperature == 0:
            return self.write(examples, prompt, max_new_tokens)
        return self._generate(examples, prompt, max_new_tokens, seeds, temperature, group)

    def _generate(
        self,
        examples: Sequence[Example],
        prompt: str,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        temperature: float,
        group: int | None = None,
    ) -> list[str]:
        each = group or 1  # samples of one context stay together
        size = max(1, self.lm.texts_at_once // each) * each

        def write(units: Sequence[int]) -> list[list[str]]:
            texts: list[str] = []
            end = min(units[-1] + each, len(examples))
            for start in range(units[0], end, size):
                part = slice(start, min(start + size, end))
                sampling = None if seeds is None else Sampling(temperature, seeds[part], group)
                texts += self.lm.generate(examples[part], prompt, max_new_tokens, sampling)
            return [texts[start : start + each] for start in range(0, len(texts), each)]

        self.calls += len(examples)
        return [text for unit in self.map_across_ranks(range(0, len(examples), each), write) for text in unit]
