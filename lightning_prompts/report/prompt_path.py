"""A prompt's path in two dimensions, from the projections that a run has kept."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.report.charts import Track
from lightning_prompts.report.statistics import Values
from lightning_prompts.runs.reader import Run


def tracks(run: Run) -> tuple[list[Track], Values, float] | None:
    """What to draw of a run's ``prompt_path.jsonl``.

    The plane is the one in which the vectors vary most over places and steps (principal components).

    Args:
        run: The run.

    Returns:
        A track per place, some of the vocabulary ``[N, 2]``, and the share of the vectors' variance that the plane
        shows; ``None`` where the run has kept no path.

    Raises:
        UserError: The file is not what the callback writes.
    """
    rows = run.path
    if not rows:
        return None
    where = str(run.folder / "prompt_path.jsonl")
    try:
        size = int(rows[0]["size"])
        vectors = np.stack([_unpacked(row["vectors"], size) for row in rows])
        nearest = _unpacked(rows[-1]["token_vectors"], size)
        vocabulary = _unpacked(rows[0]["vocabulary"], size)
        names = [f"{place + 1}: {token!r}" for place, token in zip(rows[-1]["places"], rows[-1]["tokens"], strict=True)]
    except (KeyError, ValueError, TypeError, binascii.Error) as error:
        raise UserError(f"{where} is not what PromptPath writes ({error}); leave the file out") from error
    if vectors.shape[1:] != nearest.shape or len(names) != len(nearest) or not np.isfinite(vectors).all():
        raise UserError(f"{where} is not what PromptPath writes (sizes differ, or not finite); leave the file out")
    flat = vectors.reshape(-1, size)
    middle = flat.mean(0)
    _, strengths, axes = np.linalg.svd(flat - middle, full_matrices=False)
    plane = np.zeros((2, size))
    plane[: min(2, len(axes))] = axes[:2]
    share = float((strengths[:2] ** 2).sum() / max(float((strengths**2).sum()), 1e-30))
    drawn = (vectors - middle) @ plane.T
    tokens = (nearest - middle) @ plane.T
    found = [Track(name, drawn[:, index], tokens[index]) for index, name in enumerate(names)]
    return found, (vocabulary - middle) @ plane.T, share


def _unpacked(text: Any, size: int) -> Values:  # noqa: ANN401 - of a file
    """``[N, size]``."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(-1, size).astype(np.float64)
