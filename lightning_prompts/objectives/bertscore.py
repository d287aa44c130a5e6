"""BERTScore (Zhang et al. 2020), greedy matching of contextual embeddings, as a differentiable loss.

At each position of the answer, the scorer reads an embedding of the LM's distribution: the expected embedding (the
distribution times E), or the embedding of the likeliest token with the gradient of the expected embedding. The scorer
must therefore have the vocabulary of the LM. By default it is a layer of the frozen LM. To score finished texts with
any scorer, see `lightning_prompts.objectives.rewards.BertScore`.
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
from lightning_prompts.lm.transfer import padded
from lightning_prompts.objectives.base import Objective


def greedy_matching(
    candidate: Tensor, candidate_mask: Tensor, reference: Tensor, reference_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute precision, recall and F1 of contextual embeddings (Zhang et al. 2020, section 3, without idf weights).

    Args:
        candidate: ``[B, A, D]``.
        candidate_mask: Boolean mask ``[B, A]`` with at least one position per row.
        reference: ``[B, A', D]``.
        reference_mask: Boolean mask ``[B, A']`` with at least one position per row.

    Returns:
        Precision, recall and F1, each ``[B]`` float32 and at most 1.
    """
    similarity = torch.einsum(
        "bad,brd->bar", functional.normalize(candidate.float(), dim=-1), functional.normalize(reference.float(), dim=-1)
    )
    # Cosines are at least -1, so masked positions are never the best match.
    similarity = similarity.masked_fill(~candidate_mask[:, :, None] | ~reference_mask[:, None, :], -1.0)
    precision = _masked_mean(similarity.amax(2), candidate_mask)
    recall = _masked_mean(similarity.amax(1), reference_mask)
    total = precision + recall
    # If both are 0, F1 is 0, but the gradient of the quotient would be NaN.
    safe = torch.where(total.abs() < 1e-6, torch.ones_like(total), total)
    return precision, recall, torch.where(total.abs() < 1e-6, torch.zeros_like(total), 2 * precision * recall / safe)


@dataclass(frozen=True)
class BertScoreLoss(Objective):
    r"""``1 - F1`` between the LM's predictions under teacher forcing and the reference answers.

    Attributes:
        scorer: Name of the model whose hidden states are compared, which must have the vocabulary of the LM; ``None``
            for the LM.
        layer: Layer of the scorer: 0 for the embeddings, ``k`` below ``L`` for the output of layer ``k``, ``L`` or -1
            for the output of the last layer after the norm, ``None`` for a third of all layers. The last layers of a
            causal LM describe the next token more than the current one.
        lead: Text before both answers, which is not compared. The first token of a text is an attention sink, so
            without this text the states of all first tokens would be similar.
        estimator: How distributions become embeddings. The expected embedding of an uncertain LM lies between all
            tokens and resembles any of them; `StraightThrough` compares the tokens of greedy decoding.
        temperature: Temperature of the distributions.
    """

    scorer: str | None = None
    layer: int | None = None
    lead: str = "\n"
    estimator: ScoreRelaxation = Softmax()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the temperature and the estimator."""
        check_finite("objective.temperature", self.temperature, above=True)
        if not self.estimator.passes_gradient:
            raise UserError(
                f"objective.estimator {self.estimator} passes no gradient, so nothing would be learned; use "
                "StraightThrough() or Softmax()"
            )

    @property
    def name(self) -> str:
        """See `Objective`."""
        return "BERTScore"

    def check(self, lm: FrozenLM) -> None:
        """Load the scorer.

        Raises:
            UserError: The scorer has another vocabulary than the LM, or fewer layers than ``layer``.
        """
        scorer = self._scorer(lm)
        if scorer.vocabulary != lm.vocabulary or scorer.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise UserError(
                f"objective.scorer {self.scorer!r} has another vocabulary ({scorer.vocabulary} tokens) than "
                f"{lm.name} ({lm.vocabulary}), so it has no gradient; remove it to score with the LM itself, or use it "
                "as a reward of ReinforceRefiner"
            )
        if self.layer is not None and not -1 <= self.layer <= scorer.layers:
            raise UserError(
                f"objective.layer must be from -1 to {scorer.layers}, the scorer's number of layers, got {self.layer}"
            )

    def loss(self, lm: FrozenLM, rows: Sequence[Row], logits: Tensor, scores: Scores) -> Tensor:
        """See `Objective`."""
        matrix = self._scorer(lm).embedding_matrix().float()
        allowed_ids = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        parts = _answers_only(logits, rows)
        answers = [self.estimator.train_vectors(part, matrix, allowed_ids, self.temperature) for part in parts]
        return 1 - self.f1(lm, answers, [row.answer for row in rows]).mean()

    def f1(self, lm: FrozenLM, answers: Sequence[Tensor], references: Sequence[list[int]]) -> Tensor:
        """Compute the BERTScore F1 of embedded answers.

        Args:
            lm: The language model.
            answers: Embeddings ``[A, D]`` of ``B`` answers, in the embedding space of the scorer.
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
        candidate, reference = ([part[len(lead) :] for part in states] for states in (candidate, reference))
        return greedy_matching(*padded(candidate), *padded(reference))[2]

    def _scorer(self, lm: FrozenLM) -> FrozenLM:
        return lm if self.scorer is None else _load(self.scorer, str(lm.device))


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> FrozenLM:
    return FrozenLM.load(LMConfig(name), device=device)


def _answers_only(logits: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """Return the logits ``[A, V]`` of each row's answer, without those of the text after it."""
    parts = logits.split([len(row.answer) + len(row.end) for row in rows])
    return [part[: len(row.answer)] for part, row in zip(parts, rows, strict=True)]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)
