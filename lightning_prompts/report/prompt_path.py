"""The path of a prompt's vectors, from the projections that a run has kept."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.report.charts import Track
from lightning_prompts.report.page import NONE
from lightning_prompts.report.statistics import Values
from lightning_prompts.runs.reader import Run


class PromptPath:
    """The path of a prompt's vectors, from the random projections in a run's ``prompt_path.jsonl``.

    Args:
        rows: The file's rows.

    Attributes:
        vectors: ``[steps, places, size]``.
        nearest: The vectors of the tokens that are nearest in the end, ``[places, size]``.
        vocabulary: Some of the vocabulary's vectors, ``[N, size]``.
        places: Of the vectors in the prompt, counted from 0.
        start: The token nearest to each at the first row.
        end: The token nearest to each at the last row.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """Unpack the vectors.

        Raises:
            ValueError: The rows are not what the callback writes. Or a `KeyError`, a `TypeError` or a `binascii.Error`.
        """
        size = int(rows[0]["size"])
        self.vectors = np.stack([_unpacked(row["vectors"], size) for row in rows])
        self.nearest = _unpacked(rows[-1]["token_vectors"], size)
        self.vocabulary = _unpacked(rows[0]["vocabulary"], size)
        self.places = [int(place) for place in rows[-1]["places"]]
        self.begins = rows[0]["step"] == 0
        self.start, self.end = ([str(token) for token in rows[index]["tokens"]] for index in (0, -1))
        counts = {len(self.nearest), len(self.places), len(self.start), len(self.end), self.vectors.shape[1]}
        if len(counts) > 1 or not np.isfinite(self.vectors).all():
            raise ValueError("sizes differ, or not finite")

    @classmethod
    def of(cls, run: Run) -> PromptPath | None:
        """Read a run's path.

        Returns:
            The path; ``None`` where the run has kept none.

        Raises:
            UserError: The file is not what the callback writes.
        """
        try:
            return cls(run.path) if run.path else None
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            where = run.folder / "prompt_path.jsonl"
            raise UserError(f"{where} is not what PromptPath writes ({error}); leave the file out") from error

    def started_from(self, tokens: Sequence[Any]) -> bool:
        """Whether the nearest tokens are those of the start, at the places whose path is known."""
        known = [(place, token) for place, token in zip(self.places, self.start, strict=True) if place < len(tokens)]
        return self.begins and bool(known) and all(str(tokens[place]) == token for place, token in known)

    def moves(self) -> list[list[str]]:
        """A row of cells for each place; none where the path does not begin at the start."""
        if not self.begins:
            return []
        moved = np.linalg.norm(self.vectors[-1] - self.vectors[0], axis=-1)
        left = np.linalg.norm(self.vectors[-1] - self.nearest, axis=-1)
        apart = np.linalg.norm(self.vocabulary[:, None] - self.vocabulary[None], axis=-1)
        apart = apart[np.triu_indices(len(apart), 1)]
        usual = f"{np.median(apart):.2f}" if len(apart) else NONE
        return [
            [
                str(place + 1),
                repr(first),
                "the same" if first == last else repr(last),
                f"{far:.2f}",
                f"{near:.2f}",
                usual,
            ]
            for place, first, last, far, near in zip(self.places, self.start, self.end, moved, left, strict=True)
        ]

    def tracks(self) -> tuple[list[Track], Values, float]:
        """Project the path on the plane in which the vectors vary most over places and steps (principal components).

        Returns:
            A track per place, the vocabulary ``[N, 2]``, and the share of the vectors' variance that the plane shows.
        """
        size = self.vectors.shape[-1]
        flat = self.vectors.reshape(-1, size)
        middle = flat.mean(0)
        _, strengths, axes = np.linalg.svd(flat - middle, full_matrices=False)
        plane = np.zeros((2, size))
        plane[: min(2, len(axes))] = axes[:2]
        share = float((strengths[:2] ** 2).sum() / max(float((strengths**2).sum()), 1e-30))
        drawn = (self.vectors - middle) @ plane.T
        tokens = (self.nearest - middle) @ plane.T
        names = [f"{place + 1}: {token!r}" for place, token in zip(self.places, self.end, strict=True)]
        found = [Track(name, drawn[:, index], tokens[index]) for index, name in enumerate(names)]
        return found, (self.vocabulary - middle) @ plane.T, share


def _unpacked(text: Any, size: int) -> Values:  # noqa: ANN401 - of a file
    """``[N, size]``."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(-1, size).astype(np.float64)
