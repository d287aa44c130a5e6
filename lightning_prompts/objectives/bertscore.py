"""BERTScore (Zhang et al. 2020): greedy matching of contextual embeddings; here as a loss that a gradient can pass.

The scorer reads embeddings of the answer, position by position, that the LM's distribution there becomes: the expected
one (the distribution times E), or the likeliest token's with the gradient of the expected one. So it must share the
LM's vocabulary; by default it is a layer of the frozen LM itself. For the score of finished texts, with any scorer,
see `lightning_prompts.objectives.rewards.BertScore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.estimators.relaxations import ScoreRelaxation, Softmax
from lightning_prompts.lm import FrozenLM, LMConfig, Scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.padding import padded
from lightning_prompts.objectives.base import Objective


def greedy_matching(
    candidate: Tensor, candidate_mask: Tensor, reference: Tensor, reference_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of contextual embeddings (Zhang et al. 2020, section 3, without idf weights).

    Args:
        candidate: ``[B, A, D]``.
        candidate_mask: Which positions count, ``[B, A]`` bool, at least one per row.
        reference: ``[B, A', D]``.
        reference_mask: ``[B, A']`` bool, at least one per row.

    Returns:
        Three of ``[B]`` float32, at most 1.
    """
    similarity = torch.einsum(
        "bad,brd->bar", functional.normalize(candidate.float(), dim=-1), functional.normalize(reference.float(), dim=-1)
    )
    # Cosines are at least -1, so what does not count is never the best match.
    similarity = similarity.masked_fill(~candidate_mask[:, :, None] | ~reference_mask[:, None, :], -1.0)
    precision = _masked_mean(similarity.amax(2), candidate_mask)
    recall = _masked_mean(similarity.amax(1), reference_mask)
    total = precision + recall
    # Where both vanish, F1 does; the quotient's gradient would not be a number there.
    safe = torch.where(total.abs() < 1e-6, torch.ones_like(total), total)
    return precision, recall, torch.where(total.abs() < 1e-6, torch.zeros_like(total), 2 * precision * recall / safe)


@dataclass(frozen=True)
class BertScoreLoss(Objective):
    r"""``1 - F1`` between what the LM would say under teacher forcing and the reference answers.

    Attributes:
        scorer: Whose hidden states are compared: a model name with the LM's own vocabulary, or ``None`` for the LM.
        layer: Which of its layers; 0 for the embeddings, -1 for the last, ``None`` for a third of the way up: a causal
            LM's last layers speak of the next token more than of this one.
        lead: Text ahead of both, which is not compared. The first token of a text attracts attention whatever it is, so
            that without anything ahead of it all first tokens would look alike.
        estimator: How the LM's distributions become embeddings. The expected embedding of an undecided LM lies
            between all tokens and so resembles any of them; `StraightThrough` compares what greedy generation writes.
        temperature: Of these distributions.
    """

    scorer: str | None = None
    layer: int | None = None
    lead: str = "\n"
    estimator: ScoreRelaxation = Softmax()  # noqa: RUF009 - it is frozen
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        check_finite("objective.temperature", self.temperature, above=True)

    @property
    def name(self) -> str:
        """See `Objective`."""
        return "BERTScore"

    def check(self, lm: FrozenLM) -> None:
        """Load the scorer.

        Raises:
            UserError: It has another vocabulary, or not so many layers.
        """
        scorer = self._scorer(lm)
        if scorer.vocabulary != lm.vocabulary or scorer.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise UserError(
                f"objective.scorer {self.scorer!r} has another vocabulary ({scorer.vocabulary} tokens) than "
                f"{lm.name} ({lm.vocabulary}), so no gradient can pass; leave it out to score with the LM itself, "
                "or use it as a reward of ReinforceRefiner"
            )
        if self.layer is not None and not -1 <= self.layer <= scorer.layers:
            raise UserError(
                f"objective.layer must be -1 or from 0 to {scorer.layers}, the scorer's layers; got {self.layer}"
            )

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """See `Objective`."""
        matrix = self._scorer(lm).embedding_matrix().float()
        allowed_ids = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        answers = [self.estimator.train_vectors(part, matrix, allowed_ids, self.temperature)
                   for part in _answers_only(logits, rows)]  # fmt: skip
        return 1 - self.f1(lm, answers, [row.answer for row in rows]).mean()

    def f1(self, lm: FrozenLM, answers: Sequence[Tensor], references: Sequence[list[int]]) -> Tensor:
        """BERTScore F1 of answers that are embeddings.

        Args:
            lm: The language model that wrote them.
            answers: Embeddings ``[A, D]`` of the scorer's tokens, or between them, for each of ``B`` answers.
            references: Token ids of the reference answers.

        Returns:
            ``[B]`` float32, differentiable in ``answers``.
        """
        scorer = self._scorer(lm)
        layer = max(1, scorer.layers // 3) if self.layer is None else self.layer
        lead = scorer.encoder.tokens(self.lead)
        vectors = padded(answers)[0]
        slots = [lead + [-1 - a for a in range(len(part))] for part in answers]
        candidate = scorer.hidden_states(slots, vectors, layer)
        with torch.no_grad():
            reference = scorer.hidden_states([lead + ids for ids in references], vectors[0, :0], layer)
        first = len(lead)
        return greedy_matching(*padded([part[first:] for part in candidate]),
                               *padded([part[first:] for part in reference]))[2]  # fmt: skip

    def _scorer(self, lm: FrozenLM) -> FrozenLM:
        return lm if self.scorer is None else _load(self.scorer, str(lm.device))


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> FrozenLM:
    return FrozenLM.load(LMConfig(name), device=device)


def _answers_only(logits: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Each row's logits ``[A, V]``, without those of what follows its answer."""
    parts = logits.split([len(row.answer) + len(row.end) for row in rows])
    return [part[: len(row.answer)] for part, row in zip(parts, rows, strict=True)]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)
