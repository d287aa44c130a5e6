"""A server's LM that is asked about texts, as a `Reader` asks one of our own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prompts.dln.cache import TextCache
from lightning_prompts.dln.reader import Reader
from lightning_prompts.lm import RemoteLM
from lightning_prompts.lm.encoding import LabelTokens, begin_alike, with_ends, written
from lightning_prompts.lm.labels import class_log_probs
from lightning_prompts.processes import MapAcrossRanks, Replica
from lightning_prompts.types import Example

Scored = tuple[float, int]  # the sum of a text's log-probabilities in nats, and its tokens


class RemoteReader(Reader):
    """Asks a server, and remembers. The server cuts texts into tokens, so texts are asked about as they are.

    Args:
        lm: The LM behind a server.
        cache: Shared by all that ask.
        calibrate: See `Reader`.
        map_across_ranks: See `Reader`.
    """

    def __init__(
        self, lm: RemoteLM, cache: TextCache, calibrate: bool = False,
        map_across_ranks: MapAcrossRanks = Replica().map_across_ranks,  # noqa: B008
    ) -> None:  # fmt: skip
        """Nothing has been asked yet."""
        parameters = sorted((lm.server.parameters or {}).items())
        self.lm: RemoteLM = lm
        self.identity = repr((lm.server.base_url, lm.name, parameters))
        self.cache, self.calibrate, self.map_across_ranks = cache, calibrate, map_across_ranks
        self.rows = 1 << 30  # the server makes its own batches
        self.calls = 0

    def _scored(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[str]]
    ) -> list[list[list[Scored]]]:
        """How likely texts are after placed examples with prompts, ``[C][N][K]``; those that are known looked up."""
        self.lm.check_scores(examples)
        asked = [
            (self.cache.key(self.identity, example, prompt, text), f"{example.before}{prompt}{example.after}", text)
            for prompt in prompts
            for example, several in zip(examples, texts, strict=True)
            for text in several
        ]
        known = self.cache.scores
        missing = {key: (context, text) for key, context, text in asked if key not in known}
        pairs = list(missing.values())
        found = self.map_across_ranks(
            pairs, lambda part: self.lm.log_probs([context for context, _ in part], [text for _, text in part])
        )
        self.calls += len(pairs)
        fresh = {key: (total, float(count)) for key, (total, count) in zip(missing, found, strict=True)}
        values = iter([fresh[key] if key in fresh else known[key] for key, _, _ in asked])
        result = [
            [[(total, int(count)) for total, count in (next(values) for _ in several)] for several in texts]
            for _ in prompts
        ]
        known.update(fresh)
        self.cache.trim()
        return result

    def log_probs(
        self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[Sequence[str]], block: int = 1
    ) -> Tensor:
        """See `Reader`; ``block`` makes no difference."""
        means = [
            [[total / max(count, 1) for total, count in several] for several in line]
            for line in self._scored(examples, prompts, texts)
        ]
        return torch.tensor(means, dtype=torch.double, device="cpu").view(len(prompts), len(examples), -1)

    def _classes(
        self, examples: Sequence[Example], prompts: Sequence[str], answers: bool = False, block: int = 1
    ) -> tuple[Tensor, list[float | None]]:
        """See `Reader`."""
        ways = [list(_ways(example).items()) for example in examples]
        own = [[example.answer] if answers and example.answer else [] for example in examples]
        texts = [[*(text for text, _ in mine), *answer] for mine, answer in zip(ways, own, strict=True)]
        scored = self._scored(examples, prompts, texts)
        most = max(len(example.labels) for example in examples)
        result = torch.full((len(prompts), len(examples), most), float("-inf"), dtype=torch.double, device="cpu")
        for n, (example, mine) in enumerate(zip(examples, ways, strict=True)):
            totals = [[total for total, _ in line[n][: len(mine)]] for line in scored]
            sums = torch.tensor(totals, dtype=torch.double, device="cpu")
            classes = LabelTokens((), tuple(owner for _, owner in mine), len(example.labels))
            result[:, n, : len(example.labels)] = class_log_probs(sums, classes)
        nll = [-scored[0][n][-1][0] / max(scored[0][n][-1][1], 1) if answer else None for n, answer in enumerate(own)]
        return result, nll


def _ways(example: Example) -> dict[str, int]:
    """Each way to write a class once, with its end where texts begin alike; see `Encoder.label_tokens`.

    Raises:
        UserError: They do, and the template has no text after the answer; a server scores no end token.
    """
    ways = dict(written(example.labels))
    return with_ends(ways, example.labels, example.end or "") if begin_alike(ways, example.labels) else ways
