"""Which class does the LM choose? Whole label strings are scored, each way to write them, over one shared context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_prompts.errors import UserError
from lightning_prompts.lm.encoding import LabelTokens
from lightning_prompts.lm.frozen import FrozenLM
from lightning_prompts.lm.key_values import Prompt, prompt_length, slot_length
from lightning_prompts.lm.plan import distinct_feeds
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.types import Example

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
MOST_LOGITS = 1 << 28  # in a pass, about, where several rows are scored: 1 GiB in float32
HIDDEN = "hidden"  # the field with what was thought about a question


@dataclass(frozen=True)
class LabelScores:
    """What the LM thinks of each example's classes.

    Attributes:
        log_probs: Of the classes, in nats, ``[B, Y]`` float32; negative infinity behind an example's last class.
        nll: Mean negative log-likelihood of the reference answer's tokens, in nats; ``None`` without one.
    """

    log_probs: Tensor
    nll: list[float | None]


def class_log_probs(sums: Tensor, labels: LabelTokens) -> Tensor:
    """From sequences to classes: a class has the probability of all ways to write it, and there is no other class.

    Args:
        sums: Log-probabilities of the sequences, ``[..., n]``.
        labels: What they stand for.

    Returns:
        Log-probabilities ``[..., Y]``.
    """
    written: list[list[int]] = [[] for _ in range(labels.classes)]  # the sequences of each class
    for index, owner in enumerate(labels.owners):
        written[owner].append(index)
    parts = [torch.logsumexp(sums[..., to_device(several, sums.device)], -1) for several in written]
    return torch.log_softmax(torch.stack(parts, -1), -1)


def calibrated(log_probs: Tensor, content_free: Tensor) -> Tensor:
    """Contextual calibration (Zhao et al. 2021): what the LM says without knowing the question is taken off.

    Args:
        log_probs: ``[..., Y]``.
        content_free: Log-probabilities of the same classes for ``n`` inputs without content, ``[..., n, Y]``.

    Returns:
        Log-probabilities ``[..., Y]``.
    """
    bias = torch.logsumexp(content_free, -2)  # of their mean, but for a constant
    bias = bias.masked_fill(torch.isinf(log_probs), 0.0)  # there is no such class
    return torch.log_softmax(log_probs - bias, -1)


def without_content(example: Example) -> list[Example]:
    """The example with inputs that say nothing in the place of its question, and of what was thought about it.

    Raises:
        UserError: The text has neither of them in it.
    """
    # The top layer of a network may read the thoughts alone.
    shown = [example.question, *([str(example.fields[HIDDEN])] if HIDDEN in example.fields else [])]
    if not any(text in example.before + example.after for text in shown):
        raise UserError(
            f"{example.source or 'example'}: calibrated labels need the field 'question' in the template, whose text "
            "is replaced by one without content"
        )
    texts = [str(example.fields[name]) for name in ("question", HIDDEN) if str(example.fields.get(name, "")).strip()]
    return [
        replace(example, before=_replaced(example.before, texts, empty), after=_replaced(example.after, texts, empty))
        for empty in CONTENT_FREE
    ]


def _replaced(text: str, old: Sequence[str], new: str) -> str:
    for part in old:
        text = text.replace(part, new)
    return text


@torch.no_grad()
def label_scores(lm: FrozenLM, examples: Sequence[Example], prompt: Prompt, calibrate: bool = False) -> LabelScores:
    """Score the classes of examples over what all share, each example's context, and the tokens of its labels.

    One pass takes all examples, or as many as `MOST_LOGITS` allows where there are many labels.

    Args:
        lm: The model.
        examples: ``B`` examples with labels, not necessarily the same ones.
        prompt: See `FrozenLM.score`.
        calibrate: Take off what the LM says without a question; see `calibrated`.

    Raises:
        UserError: See `FrozenLM.encode`, `Encoder.label_tokens` and `without_content`.
    """
    scored = _scores(lm, examples, prompt)
    if not calibrate:
        return scored
    per_row = isinstance(prompt, Tensor) and prompt.dim() == 3
    place: dict[tuple[object, ...], int] = {}  # where nothing of an example is left, one of a kind is enough
    empty: list[Example] = []
    rows: list[int] = []
    for b, example in enumerate(examples):
        for bare in without_content(example):
            key = (bare.before, bare.after, bare.labels, bare.end, b if per_row else 0)
            if key not in place:
                place[key] = len(empty)
                empty.append(bare)
            rows.append(place[key])
    count = len(rows) // len(examples)
    of_row = {index: n // count for n, index in enumerate(rows)}
    own = prompt
    if isinstance(prompt, Tensor) and per_row:
        own = prompt[to_device([of_row[index] for index in range(len(empty))], prompt.device)]
    bias = _scores(lm, [replace(bare, answer=None) for bare in empty], own).log_probs
    owner = to_device(rows, lm.device).view(len(examples), count)
    return LabelScores(calibrated(scored.log_probs, bias[owner]), scored.nll)


def _scores(lm: FrozenLM, examples: Sequence[Example], prompt: Prompt) -> LabelScores:
    labels = [lm.encoder.label_tokens(example) for example in examples]
    length = prompt_length(prompt)
    ahead = length - slot_length(prompt)
    rows = lm.encode(examples, slot_length(prompt), ahead=ahead)
    for example, known, row in zip(examples, labels, rows, strict=True):
        lm.check_fits(example, ahead + len(row.context) + max(map(len, known.tokens)), length)
    continuations = [
        [*known.tokens, *([row.answer] if row.answer else [])] for known, row in zip(labels, rows, strict=True)
    ]
    size = rows_of_a_pass(labels, lm.vocabulary)
    passes = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        own = prompt[part] if isinstance(prompt, Tensor) and prompt.dim() == 3 else prompt
        passes.append(lm.continuation_scores([row.context for row in rows[part]], continuations[part], own))
    sums = torch.cat(passes)
    parts = sums.split([len(several) for several in continuations])
    log_probs = [class_log_probs(part[: len(known.tokens)], known) for part, known in zip(parts, labels, strict=True)]
    last = torch.stack([part[-1] for part in parts]).tolist()  # the answer's, where there is one
    return LabelScores(
        pad_sequence(log_probs, batch_first=True, padding_value=float("-inf")),
        [-value / len(row.answer) if row.answer else None for value, row in zip(last, rows, strict=True)],
    )


def rows_of_a_pass(labels: Sequence[LabelTokens], vocabulary: int) -> int:
    """How many rows `label_scores` runs together; one at least, whatever its logits take.

    Args:
        labels: Of each row.
        vocabulary: ``V``.
    """
    positions = max(1 + sum(map(len, distinct_feeds(known.tokens))) for known in set(labels))
    return max(1, MOST_LOGITS // (vocabulary * positions))
