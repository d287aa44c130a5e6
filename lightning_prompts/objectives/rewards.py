"""Rewards rate answers in [0, 1], in training (REINFORCE) and in evaluation."""

from __future__ import annotations

import contextlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_prompts.answers import same_answer, token_f1
from lightning_prompts.errors import UserError, check_finite, check_installed
from lightning_prompts.lm.embedded import EMBEDDED_SCORER, embedded_scorer

if TYPE_CHECKING:
    from bert_score import BERTScorer


class Reward(ABC):
    """Rates answers.

    Attributes:
        needs_text: Whether the reward needs generated answers.
        needs_likelihood: Whether it needs the likelihood of the reference answer.
    """

    needs_text = True
    needs_likelihood = False

    @property
    def name(self) -> str:
        """Name of the reward in metrics, by default the name of the class in snake case."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def check(self, device: torch.device) -> None:  # noqa: B027 - most rewards need nothing
        """Load models and packages that the reward needs, before the run starts.

        Args:
            device: Device of the run.

        Raises:
            UserError: A model or a package is not available.
        """

    @abstractmethod
    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        """Rate answers.

        Args:
            texts: ``B`` generated answers, of which `Example.extract` leaves the final result; may be empty if the
                reward needs no texts.
            references: The reference answers.
            likelihoods: Likelihood of the reference answers per token (geometric mean), in [0, 1]; may be empty if the
                reward needs none.

        Returns:
            ``B`` values in [0, 1].
        """

    def feedback(self, text: str, reference: str) -> str:
        """Say in words what is wrong with an answer, for an LM that improves the prompt (`Gepa`).

        Args:
            text: The generated answer.
            reference: The reference answer.

        Returns:
            One or a few sentences; empty if there is nothing to say beyond the value.
        """
        del text, reference
        return ""


class TextReward(Reward):
    """Rates each answer separately; subclasses implement `judge`.

    >>> class SameLength(TextReward):
    ...     def judge(self, text: str, reference: str) -> float:
    ...         return float(len(text) == len(reference))
    >>> reward = SameLength()
    >>> reward.name, reward(["abc", "ab"], ["xyz", "xyz"], [])
    ('same_length', [1.0, 0.0])
    """

    @abstractmethod
    def judge(self, text: str, reference: str) -> float:
        """Rate an answer.

        Args:
            text: The generated answer.
            reference: The reference answer.

        Returns:
            A value in [0, 1].
        """

    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        """See `Reward`."""
        return [self._checked(text, wanted) for text, wanted in zip(texts, references, strict=True)]

    def _checked(self, text: str, reference: str) -> float:
        value = float(self.judge(text, reference))
        if not 0 <= value <= 1:
            raise UserError(f"reward {self.name} is {value} for {text[:80]!r}; a reward must be from 0 to 1")
        return value


@dataclass(frozen=True)
class ExactMatch(TextReward):
    """1 for an answer that equals the reference exactly, except for white space around it, otherwise 0.

    >>> ExactMatch()(["cold", "Cold"], ["cold", "cold"], [])
    [1.0, 0.0]
    """

    def judge(self, text: str, reference: str) -> float:
        """See `TextReward`."""
        return float(text.strip() == reference.strip())


@dataclass(frozen=True)
class NumericMatch(TextReward):
    r"""1 for the same final number or formula: ``\boxed{1/2}``, ``#### 0.5`` and ``the answer is .5`` agree.

    >>> NumericMatch()(["2 + 2 = 4", "so it is 5"], ["#### 4", "#### 4"], [])
    [1.0, 0.0]
    """

    def judge(self, text: str, reference: str) -> float:
        """See `TextReward`."""
        return float(same_answer(text, reference))


@dataclass(frozen=True)
class TokenF1(TextReward):
    """F1 of the words that answer and reference have in common.

    >>> TokenF1()(["a red apple"], ["the apple is red"], [])
    [0.8]
    """

    def judge(self, text: str, reference: str) -> float:
        """See `TextReward`."""
        return token_f1(text, reference)


@dataclass(frozen=True)
class AnswerLikelihood(Reward):
    """Likelihood of the reference answer per token, a dense reward where exact match is nearly always 0."""

    needs_text = False
    needs_likelihood = True

    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        """See `Reward`."""
        return list(likelihoods)


@dataclass(frozen=True)
class BertScore(Reward):
    """BERTScore F1 of the authors' package (Zhang et al. 2020), clipped to [0, 1]; 0 for empty texts.

    Attributes:
        model: ``all-minilm-l6-v2`` (embedded), a hub id such as ``roberta-large``, or a local folder.
        layer: Layer of the model; ``None`` for the package's choice for the model, or the last one.
    """

    model: str = EMBEDDED_SCORER
    layer: int | None = None

    @property
    def name(self) -> str:
        """See `Reward`."""
        return "bertscore"

    def check(self, device: torch.device) -> None:
        """Load the model onto the device."""
        scorer = _bert_scorer(self.model, self.layer)
        scorer.device = device
        scorer._model.to(device)

    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        """See `Reward`."""
        values = [0.0] * len(texts)
        nonempty = [b for b, pair in enumerate(zip(texts, references, strict=True)) if all(map(str.strip, pair))]
        if nonempty:
            scorer = _bert_scorer(self.model, self.layer)
            with contextlib.redirect_stderr(io.StringIO()):  # hide warnings of texts with score 0
                found = scorer.score([texts[b] for b in nonempty], [references[b] for b in nonempty])[2]
            for b, value in zip(nonempty, found.tolist(), strict=True):
                values[b] = min(max(float(value), 0.0), 1.0)
        return values


@dataclass(frozen=True)
class Mixture(Reward):
    """A weighted mean of rewards.

    Attributes:
        rewards: At least one reward.
        weights: One weight per reward, at least 0.
    """

    rewards: list[Reward]
    weights: list[float]

    def __post_init__(self) -> None:
        """Check that the lists match."""
        if not self.rewards or len(self.rewards) != len(self.weights):
            raise UserError(f"reward: {len(self.rewards)} rewards and {len(self.weights)} weights; give each a weight")
        for weight in self.weights:
            check_finite("reward.weights", weight)
        if not any(self.weights):
            raise UserError("reward.weights must not all be 0")

    @property
    def name(self) -> str:
        """See `Reward`."""
        return "+".join(reward.name for reward in self.rewards)

    def check(self, device: torch.device) -> None:
        """Check all rewards."""
        for reward in self.rewards:
            reward.check(device)

    @property
    def needs_text(self) -> bool:  # type: ignore[override]
        """Whether any reward needs texts."""
        return any(reward.needs_text for reward in self.rewards)

    @property
    def needs_likelihood(self) -> bool:  # type: ignore[override]
        """Whether any reward needs the likelihood."""
        return any(reward.needs_likelihood for reward in self.rewards)

    def feedback(self, text: str, reference: str) -> str:
        """Return the feedback of all rewards."""
        return " ".join(filter(None, (reward.feedback(text, reference) for reward in self.rewards)))

    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        """See `Reward`."""
        parts = [reward(texts, references, likelihoods) for reward in self.rewards]
        total = sum(self.weights)
        return [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True)) / total
            for row in zip(*parts, strict=True)
        ]


@lru_cache(maxsize=2)
def _bert_scorer(model: str, layer: int | None) -> BERTScorer:
    check_installed("BertScore", "bertscore", "bert_score")
    import bert_score
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    folder = str(embedded_scorer()) if model == EMBEDDED_SCORER else model
    if (Path(folder).is_absolute() or folder.startswith(".")) and not Path(folder).is_dir():
        raise UserError(f"BERTScore model folder {folder!r} does not exist")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = int(config.num_hidden_layers)
        chosen = layer if layer is not None else bert_score.utils.model2layers.get(model, layers)
        if not 1 <= chosen <= layers:
            raise UserError(f"layer of the BERTScore model {model!r} must be from 1 to {layers}, got {chosen}")
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with torch.device("cpu"):  # `BertScore.check` moves it to its device
                scorer = bert_score.BERTScorer(model_type=folder, num_layers=chosen, device="cpu")
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"BERTScore model {model!r} does not load: {' '.join(str(error).split())[:200]}; "
            f"use {EMBEDDED_SCORER} (embedded), a local folder, or a hub id (with a network)"
        ) from error
    # A tokenizer without a limit has a model_max_length that is too large for truncation.
    limit = int(getattr(config, "max_position_embeddings", None) or 512) - _first_position(scorer._model)
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, limit)
    return scorer


def _first_position(model: torch.nn.Module) -> int:
    """Return the position of the first token; in models like RoBERTa, positions start after the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
