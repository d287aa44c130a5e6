"""An LM that is asked about texts: scores and answers, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prompts.dln.cache import TextCache
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LabelScores, LMConfig, Sampling, TextModel
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.labels import calibrated, class_log_probs, without_content
from lightning_prompts.processes import MapAcrossRanks, Replica
from lightning_prompts.search.continuations import ContinuationScorer
from lightning_prompts.types import Example

Texts = tuple[tuple[int, ...], ...]  # token ids of what may follow


def identity(lm: FrozenLM, config: LMConfig) -> str:
    """What an LM's scores depend on beside the texts.

    The precision is the one that was loaded: what ``auto`` stands for depends on the machine.
    """
    return repr((config.name, config.revision, str(lm.model.dtype), config.quantization or "none"))


class Reader:
    """Asks an LM, and remembers.

    Args:
        lm: The frozen language model.
        identity: What tells the LM from all others, in this run and those that load its cache; see `identity`.
        cache: Shared by all that ask.
        memory_mb: Megabytes that one scoring pass may take, about.
        rows: Texts that are written side by side.
        calibrate: Take off what the LM says about labels without a question; see `calibrated`.
        map_across_ranks: How processes that all ask the same split the work; by default this one does it all.
    """

    def __init__(
        self, lm: FrozenLM, identity: str, cache: TextCache, memory_mb: float, rows: int = 64, calibrate: bool = False,
        map_across_ranks: MapAcrossRanks = Replica().map_across_ranks,  # noqa: B008
    ) -> None:  # fmt: skip
        """Nothing has been asked yet."""
        self.lm: TextModel = lm
        self.encoder, self.map_across_ranks = lm.encoder, map_across_ranks
        self.identity, self.cache = identity, cache
        self.rows, self.calibrate = rows, calibrate
        self.scorer = ContinuationScorer(lm, memory_mb)
        self.calls = 0  # texts that the LM has scored or written

    # --- scores -----------------------------------------------------------------------------------------------------

    def sums(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Texts], block: int = 1
    ) -> list[list[tuple[float, ...]]]:
        """Log-probabilities of texts after placed examples with prompts, those that are known looked up.

        Args:
            examples: ``N`` placed examples.
            prompts: ``C`` prompts.
            texts: Of each example, what may follow; at least one token each.
            block: Every so many examples are about the same input.

        Returns:
            Sums over tokens in nats, ``[C][N]``.

        Raises:
            UserError: A text does not fit the context window.
        """
        pairs = list(zip(examples, texts, strict=True))
        keys = [[self.cache.key(self.identity, example, prompt, text) for example, text in pairs] for prompt in prompts]
        known = self.cache.scores
        # Prompts that lack the same examples make a grid.
        grids: dict[tuple[int, ...], list[int]] = {}
        asked: set[int] = set()
        for c, line in enumerate(keys):
            first = {key: n for n, key in reversed(list(enumerate(line))) if key not in known and key not in asked}
            asked.update(first)
            if first:
                grids.setdefault(tuple(sorted(first.values())), []).append(c)
        fresh: dict[int, tuple[float, ...]] = {}
        for places, lines in grids.items():
            part = [examples[n] for n in places]
            ids = [self.encoder.tokens(prompts[c]) for c in lines]
            rows = self._rows(part, ids, [texts[n] for n in places])
            whole = len(places) == len(examples)  # where some are known, blocks are no longer whole
            found = self._score(rows, ids, [texts[n] for n in places], block if whole else 1)
            self.calls += len(ids) * sum(len(texts[n]) for n in places)
            for c, values in zip(lines, found, strict=True):
                fresh.update({keys[c][n]: tuple(value) for n, value in zip(places, values, strict=True)})
        result = [[fresh[key] if key in fresh else known[key] for key in line] for line in keys]
        known.update(fresh)
        self.cache.trim()
        return result

    def _score(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], texts: Sequence[Texts], block: int
    ) -> list[list[list[float]]]:
        """`ContinuationScorer.score`; processes share the prompts, or the blocks of examples where there is one."""
        if len(prompts) > 1:
            return self.map_across_ranks(prompts, lambda own: self.scorer.score(rows, own, texts, block))

        def of_blocks(starts: Sequence[int]) -> list[list[list[float]]]:
            part = slice(starts[0], starts[-1] + block)
            (line,) = self.scorer.score(rows[part], prompts, texts[part], block)
            return [line[start : start + block] for start in range(0, len(line), block)]

        found = self.map_across_ranks(range(0, len(rows), block), of_blocks)
        return [[values for several in found for values in several]]

    def _rows(self, examples: Sequence[Example], prompts: Sequence[list[int]], texts: Sequence[Texts]) -> list[Row]:
        """Examples with a slot of one place, all of which fit with the longest prompt."""
        length = max(map(len, prompts))
        rows = [self.encoder.row(example, 1) for example in examples]
        for example, row, several in zip(examples, rows, texts, strict=True):
            total = len(row.context) - 1 + length + max(map(len, several))
            self.scorer.lm.check_fits(example, total, length)
            if total == max(map(len, several)):
                raise UserError(
                    f"{example.source or 'example'}: nothing precedes the answer; give the template some text"
                )
        return rows

    def log_probs(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[str]], block: int = 1
    ) -> Tensor:
        """Mean token log-probabilities of texts, with the white space that they start with.

        Args:
            examples: ``N`` placed examples.
            prompts: ``C`` prompts.
            texts: ``K`` texts of each example; one without tokens scores 0.
            block: See `sums`.

        Returns:
            ``[C, N, K]`` in nats, float64 on the CPU.
        """
        ids = [[tuple(self.encoder.tokens(text)) for text in several] for several in texts]
        wanted = [tuple(dict.fromkeys(tokens for tokens in several if tokens)) for several in ids]
        result = torch.zeros(len(prompts), len(examples), len(texts[0]), dtype=torch.double, device="cpu")
        asked = [n for n, several in enumerate(wanted) if several]
        if not asked:
            return result
        whole = len(asked) == len(examples)
        texts_asked = [wanted[n] for n in asked]
        sums = self.sums([examples[n] for n in asked], prompts, texts_asked, block if whole else 1)
        for c, line in enumerate(sums):
            for n, values in zip(asked, line, strict=True):
                means = {tokens: value / len(tokens) for tokens, value in zip(wanted[n], values, strict=True)}
                own = [means.get(tokens, 0.0) for tokens in ids[n]]
                result[c, n] = torch.tensor(own, dtype=torch.double, device="cpu")
        return result

    def class_log_probs(self, examples: Sequence[Example], prompts: Sequence[str], block: int = 1) -> Tensor:
        """Log-probabilities of the classes of placed examples; ``block`` as in `sums`.

        Returns:
            ``[C, N, Y]`` in nats, float64 on the CPU; negative infinity behind an example's last class.
        """
        return self._calibrated(examples, prompts, self._classes(examples, prompts, block=block)[0])

    def label_scores(self, examples: Sequence[Example], prompt: str) -> LabelScores:
        """What `lm.label_scores` says of placed examples with a prompt."""
        classes, nll = self._classes(examples, [prompt], answers=True)
        return LabelScores(self._calibrated(examples, [prompt], classes)[0].float(), nll)

    def _calibrated(self, examples: Sequence[Example], prompts: Sequence[str], classes: Tensor) -> Tensor:
        """What the LM says without a question taken off ``[C, N, Y]``, where that is wanted."""
        if not self.calibrate:
            return classes
        bare = [one for example in examples for one in without_content(example)]
        bias, _ = self._classes(bare, prompts)
        return calibrated(classes, bias.unflatten(1, (len(examples), -1)))

    def _classes(
        self, examples: Sequence[Example], prompts: Sequence[str], answers: bool = False, block: int = 1
    ) -> tuple[Tensor, list[float | None]]:
        """Log-probabilities ``[C, N, Y]``; and, if wanted, the NLL of each answer under the first prompt."""
        labels = [self.encoder.label_tokens(example) for example in examples]
        own = [tuple(self.encoder.tokens(example.answer or "")) if answers else () for example in examples]
        texts = [
            (*known.tokens, answer) if answer and answer not in known.tokens else known.tokens
            for known, answer in zip(labels, own, strict=True)
        ]
        sums = self.sums(examples, prompts, texts, block)
        shape = (len(prompts), len(examples), max(known.classes for known in labels))
        result = torch.full(shape, float("-inf"), dtype=torch.double, device="cpu")
        for known in set(labels):
            places = [n for n, mine in enumerate(labels) if mine == known]
            found = [[line[n][: len(known.tokens)] for n in places] for line in sums]
            values = torch.tensor(found, dtype=torch.double, device="cpu")
            result[:, places, : known.classes] = class_log_probs(values, known)
        nll = [
            -values[several.index(answer)] / len(answer) if answer else None
            for values, several, answer in zip(sums[0], texts, own, strict=True)
        ]
        return result, nll

    # --- texts ------------------------------------------------------------------------------------------------------

    def write(self, examples: Sequence[Example], prompt: str, max_new_tokens: int) -> list[str]:
        """Greedy texts after placed examples with a prompt, those that are known looked up."""
        keys = [self.cache.key(self.identity, example, prompt, (max_new_tokens, example.stop)) for example in examples]
        known = self.cache.texts
        missing = {key: example for key, example in zip(keys, examples, strict=True) if key not in known}
        written = self._generate(list(missing.values()), prompt, max_new_tokens, None, 0.0)
        fresh = dict(zip(missing, written, strict=True))
        result = [fresh[key] if key in fresh else known[key] for key in keys]
        known.update(fresh)
        self.cache.trim()
        return result

    def draw(
        self, examples: Sequence[Example], prompt: str, max_new_tokens: int, temperature: float, seeds: Sequence[int],
        group: int | None = None,
    ) -> list[str]:  # fmt: skip
        """Texts drawn at a temperature, one for each example, by the example's seed; see `Sampling`."""
        if temperature == 0:
            return self.write(examples, prompt, max_new_tokens)
        return self._generate(examples, prompt, max_new_tokens, seeds, temperature, group)

    def _generate(
        self, examples: Sequence[Example], prompt: str, max_new_tokens: int, seeds: Sequence[int] | None,
        temperature: float, group: int | None = None,
    ) -> list[str]:  # fmt: skip
        each = group or 1  # draws for one context stay together
        size = max(1, self.rows // each) * each

        def write(units: Sequence[int]) -> list[list[str]]:
            texts: list[str] = []
            end = min(units[-1] + each, len(examples))
            for start in range(units[0], end, size):
                part = slice(start, min(start + size, end))
                sampling = None if seeds is None else Sampling(temperature, seeds[part], group)
                texts += self.lm.write(examples[part], prompt, max_new_tokens, sampling)
            return [texts[start : start + each] for start in range(0, len(texts), each)]

        self.calls += len(examples)
        return [text for unit in self.map_across_ranks(range(0, len(examples), each), write) for text in unit]
