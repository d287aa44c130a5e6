"""Class scoring: an LM chooses the class whose label texts are likeliest after the example."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm.encoding import LabelTokens
from lightning_prompts.lm.key_values import Prompt
from lightning_prompts.lm.language_model import Continuation, LabelSums, LanguageModel, Scored
from lightning_prompts.lm.plan import distinct_feeds
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.types import Example

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
MOST_LOGITS = 1 << 28  # of a pass over several rows, about: 1 GiB in float32
HIDDEN = "hidden"  # the field with the reasoning about a question


@dataclass(frozen=True)
class LabelScores:
    """Class probabilities of examples.

    Attributes:
        log_probs: Log-probabilities of the classes in nats, ``[B, Y]`` float32; negative infinity beyond an example's
            last class.
        nll: Mean negative log-likelihood of the reference answer's tokens in nats, ``[B]``; ``None`` without one.
    """

    log_probs: Tensor
    nll: list[float | None]


def class_log_probs(sums: Tensor, owners: Sequence[int]) -> Tensor:
    """Add up the probabilities of each class's texts, and normalise over the classes.

    Args:
        sums: Log-probabilities of ``W`` texts, ``[..., W]``.
        owners: The class of each text, ``[W]``; every class has at least one.

    Returns:
        Log-probabilities ``[..., Y]``.
    """
    texts: list[list[int]] = [[] for _ in range(max(owners) + 1)]  # of each class
    for index, owner in enumerate(owners):
        texts[owner].append(index)
    parts = [torch.logsumexp(sums[..., to_device(several, sums.device)], -1) for several in texts]
    return torch.log_softmax(torch.stack(parts, -1), -1)


def calibrated(log_probs: Tensor, content_free: Tensor) -> Tensor:
    """Contextual calibration (Zhao et al. 2021): divide by the class probabilities without a question.

    Args:
        log_probs: ``[..., Y]``.
        content_free: Log-probabilities of the same classes for ``n`` inputs without content, ``[..., n, Y]``.

    Returns:
        Log-probabilities ``[..., Y]``.
    """
    bias = torch.logsumexp(content_free, -2)  # of their mean, up to a constant
    bias = bias.masked_fill(torch.isinf(log_probs), 0.0)  # beyond the last class
    return torch.log_softmax(log_probs - bias, -1)


# Of a word: not an underscore, nor a character of a script without spaces (Thai to Khmer, Chinese, Japanese).
LETTER = r"[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]"


def without_content(example: Example) -> list[Example]:
    """Replace the question, and the reasoning about it, by inputs without content.

    Raises:
        UserError: The text contains neither of them.
    """
    # The top layer of a network may read the reasoning alone.
    texts = [str(example.fields[name]) for name in ("question", HIDDEN) if name in example.fields]
    parts = sorted(filter(str.strip, texts), key=len, reverse=True)
    # A question may be as short as "on": what is part of a word counts only if nothing else is found.
    for kind in (_whole, re.escape):
        pattern = re.compile("|".join(map(kind, parts)))
        if parts and (pattern.search(example.before) or pattern.search(example.after)):
            return [_replaced(example, pattern, empty) for empty in CONTENT_FREE]
    if len(parts) < len(texts):  # an empty text is without content as it is
        return [example] * len(CONTENT_FREE)
    raise UserError(
        f"{example.source or 'example'}: calibrated labels need the field 'question' in the template, whose text "
        "is replaced by one without content"
    )


def _whole(part: str) -> str:
    """A regular expression for a text that is no part of a word."""
    before, after = f"(?<!{LETTER})" if part[0].isalnum() else "", f"(?!{LETTER})" if part[-1].isalnum() else ""
    return f"{before}{re.escape(part)}{after}"


def _replaced(example: Example, old: re.Pattern[str], new: str) -> Example:
    before, after = (old.sub(lambda _: new, text) for text in (example.before, example.after))
    return replace(example, before=before, after=after)


def split_by_labels(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """The places of examples whose answer is a class, and of those whose answer is free text."""
    labelled = [b for b, example in enumerate(examples) if example.labels]
    return labelled, [b for b, example in enumerate(examples) if not example.labels]


def label_scores(
    lm: LanguageModel, examples: Sequence[Example], prompt: Prompt | str, calibrate: bool = False
) -> LabelScores:
    """Score the classes of examples.

    Args:
        lm: The model.
        examples: ``B`` examples with labels, not necessarily the same ones.
        prompt: See `LanguageModel.generate`.
        calibrate: Divide by the class probabilities without a question; see `calibrated`.

    Raises:
        UserError: See `FrozenLM.encode`, `LanguageModel.label_texts`, `LanguageModel.check_texts` and
            `without_content`.
    """
    per_row = isinstance(prompt, Tensor) and prompt.dim() == 3

    def score(part: Sequence[Example], rows: Sequence[int] | None) -> LabelSums:
        own = prompt
        if rows is not None and isinstance(prompt, Tensor) and per_row:
            own = prompt[to_device(rows, prompt.device)]
        return lm.label_sums(part, own)

    return score_classes(examples, score, calibrate, per_row)


@torch.no_grad()
def score_classes(
    examples: Sequence[Example],
    score: Callable[[Sequence[Example], Sequence[int] | None], LabelSums],
    calibrate: bool,
    per_row: bool = False,
) -> LabelScores:
    """Turn scores of label texts into class probabilities, calibrated if asked for.

    Args:
        examples: ``B`` examples with labels.
        score: Scores the label texts of some examples. Its second argument is ``None`` for ``examples`` themselves, and
            else the place in ``examples`` that each one without content comes from.
        calibrate: See `label_scores`.
        per_row: Whether each example has a prompt of its own.

    Returns:
        Log-probabilities ``[..., B, Y]`` in the precision and on the device of the sums, and the NLL of the answers.
    """
    scored = score(examples, None)
    log_probs = _padded(scored)
    if calibrate:
        bare, rows, places = _distinct_without_content(examples, per_row)
        bias = _padded(score(bare, rows))
        log_probs = calibrated(log_probs, bias[..., to_device(places, bias.device).view(len(examples), -1), :])
    return LabelScores(log_probs, scored.nll)


def text_label_sums(
    lm: LanguageModel,
    examples: Sequence[Example],
    prompts: Sequence[str],
    score: Callable[[Sequence[Example], Sequence[str], Sequence[Sequence[Continuation]]], list[list[list[Scored]]]],
    answers: bool,
) -> LabelSums:
    """Score the label texts of examples under text prompts.

    Args:
        lm: Gives the label texts.
        examples: ``B`` examples with labels.
        prompts: ``C`` prompts.
        score: See `LanguageModel.text_scores`.
        answers: Whether to score the reference answers too, under the first prompt.

    Returns:
        Sums ``[C, W]`` of each example, float64 on the CPU.
    """
    labels = [lm.label_texts(example) for example in examples]
    own = [lm.continuation(example.answer or "") if answers else "" for example in examples]
    texts = [[text for text, _ in known] for known in labels]
    asked = [
        [*several, answer] if answer and answer not in several else several
        for several, answer in zip(texts, own, strict=True)
    ]
    grid = score(examples, prompts, asked)
    sums = [
        torch.tensor([[total for total, _ in line[n][: len(known)]] for line in grid], dtype=torch.double, device="cpu")
        for n, known in enumerate(labels)
    ]
    nll: list[float | None] = []
    for scored, several, answer in zip(grid[0], asked, own, strict=True):
        total, count = scored[several.index(answer)] if answer else (0.0, 0)
        nll.append(-total / max(count, 1) if answer else None)
    return LabelSums(sums, [tuple(owner for _, owner in known) for known in labels], nll)


def _padded(scored: LabelSums) -> Tensor:
    """Log-probabilities of classes ``[..., B, Y]``, negative infinity beyond an example's last class."""
    most = max(max(owners) + 1 for owners in scored.owners)
    first = scored.sums[0]
    result = first.new_full((*first.shape[:-1], len(scored.sums), most), float("-inf"))
    for owners in dict.fromkeys(scored.owners):
        places = [b for b, own in enumerate(scored.owners) if own == owners]
        classes = class_log_probs(torch.stack([scored.sums[b] for b in places], -2), owners)
        result[..., to_device(places, result.device), : classes.shape[-1]] = classes
    return result


def _distinct_without_content(examples: Sequence[Example], per_row: bool) -> tuple[list[Example], list[int], list[int]]:
    """Examples without content, without answers, each once; where each comes from, and those of each example."""
    place: dict[tuple[object, ...], int] = {}
    bare: list[Example] = []
    rows: list[int] = []
    places: list[int] = []
    for b, example in enumerate(examples):
        for one in without_content(example):
            key = (one.before, one.after, one.labels, one.end, one.chat, one.system, b if per_row else 0)
            if key not in place:
                place[key] = len(bare)
                bare.append(replace(one, answer=None))
                rows.append(b)
            places.append(place[key])
    return bare, rows, places


def rows_of_a_pass(labels: Sequence[LabelTokens], vocabulary: int) -> int:
    """How many rows `FrozenLM.label_sums` runs together, at least one.

    Args:
        labels: Of each row.
        vocabulary: ``V``.
    """
    positions = max(1 + sum(map(len, distinct_feeds(known.tokens))) for known in set(labels))
    return max(1, MOST_LOGITS // (vocabulary * positions))
