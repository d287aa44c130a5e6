"""Scores of answers from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.transfer import to_device_together


@dataclass(frozen=True)
class Scores:
    """Scores of ``B`` answers.

    Attributes:
        nll: Mean negative log-likelihood of each example's answer tokens in nats, ``[B]`` float32.
        tokens: Number of answer tokens of each example, ``[B]``.
        greedy: Whether every answer token is the LM's first choice, ``[B]`` bool.
        end_nll: Mean negative log-likelihood of the text after the answer in nats, ``[B]``; 0 if not asked for.
        mean_tokens: Answer tokens per example of the whole batch, if these scores are one process's part of it.
    """

    nll: Tensor
    tokens: Tensor
    greedy: Tensor
    end_nll: Tensor
    mean_tokens: float | None = None


def answer_scores(logits: Tensor, rows: Sequence[Row]) -> Scores:
    """Compute scores from the logits that predict the tokens of answers and of the texts after them.

    Args:
        logits: ``[N, V]`` float32, for the rows' answer and end tokens in order.
        rows: ``B`` rows with ``N`` answer and end tokens in all.
    """
    device, size = logits.device, len(rows)
    counts, slots = _slots(rows)
    tokens = np.array([token for row in rows for token in row.answer + row.end])
    targets, slot, answer, end = to_device_together([tokens, slots, counts[:, 0], counts[:, 1]], device)
    token_nll = functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(2 * size, device=device).index_add(0, slot, token_nll)
    misses = torch.zeros(2 * size, device=device).index_add(0, slot, (logits.argmax(-1) != targets).float())
    return Scores(
        nll=sums[:size] / answer,
        tokens=answer,
        greedy=misses[:size] == 0,
        end_nll=sums[size:] / end.clamp(min=1),
    )


def row_means(values: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Compute the means of numbers over the answer tokens and over the end tokens of each row.

    Args:
        values: ``[N]``, for the rows' answer and end tokens in order.
        rows: ``B`` rows with ``N`` answer and end tokens in all.

    Returns:
        The means over answers, ``[B]``, and over ends, ``[B]``; 0 for a row without an end.
    """
    counts, slots = _slots(rows)
    slot, answer, end = to_device_together([slots, counts[:, 0], counts[:, 1]], values.device)
    sums = values.new_zeros(2 * len(rows)).index_add(0, slot, values)
    return sums[: len(rows)] / answer, sums[len(rows) :] / end.clamp(min=1)


def _slots(rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the tokens of each row's answer and end, ``[B, 2]``, and number where each token is summed, ``[N]``.

    Slot ``b`` collects the tokens of row ``b``'s answer, slot ``B + b`` those of its end.
    """
    counts = np.array([[len(row.answer), len(row.end)] for row in rows])
    return counts, np.arange(2 * len(rows)).reshape(2, len(rows)).T.ravel().repeat(counts.ravel())
