"""The sections on prompts: texts, nearest tokens, what moved, and the paths of vectors."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prompts.errors import UserError
from lightning_prompts.report import charts
from lightning_prompts.report.charts import Track
from lightning_prompts.report.data import Task
from lightning_prompts.report.page import NONE, Block, Picture, Pictures, Table, Text, lacking, spread
from lightning_prompts.report.statistics import Values
from lightning_prompts.runs.names import CANDIDATES, PROMPT_PATH, READOUT
from lightning_prompts.runs.reader import Run

TOKENS = 16  # shown of a prompt of vectors


def prompts(task: Task, prefix: str) -> list[Block]:
    """Texts, nearest tokens, what moved, and paths."""
    rows: list[list[str]] = []
    moved: list[list[str]] = []
    pictures = []
    for number, method in enumerate(task.methods):
        for run in method.runs:
            if prompt := _prompt(run):
                rows.append([method.name, run.seed or NONE, *prompt])
        path = next((path for run in method.runs if (path := PromptPath.of(run))), None)
        if path:
            moved += [[method.name, *row] for row in path.moves()]
            lines, vocabulary, share = path.tracks()
            picture = charts.paths(f"{method.name} (the plane shows {share:.0%} of the variance)", lines, vocabulary)
            pictures.append(Picture(f"{prefix}-path-{number}", picture, f"path of the prompt's vectors, {method.name}"))
    blocks = lacking(f"{READOUT} though trained", task.lacking_if_trained(lambda run: run.readout))
    without = task.lacking(lambda run: bool(run.path) or not any("tokens" in row for row in run.readout))
    blocks += lacking(f"{PROMPT_PATH}, so without a picture of the path", without)
    diverged = task.lacking(lambda run: not run.path or PromptPath.of(run))
    blocks += lacking(f"finite vectors in {PROMPT_PATH}, so without a picture of the path", diverged)
    if rows:
        text = (
            "The prompt after the best validation: its text, or for vectors the nearest vocabulary tokens with their "
            "cosine similarity. The nearest tokens do not say what the vectors do: compare the NLL of these tokens "
            "used as words with that on validation. Distance from start is Euclidean, mean over the prompt's vectors."
        )
        judged = ["NLL as words", "NLL on validation", "exact match on validation", "distance from start"]
        blocks += [Text(text), Table(["method", "seed", "prompt", "step", *judged], rows, texts=3)]
    if moved:
        text = (
            "What moved: for some places of the prompt, the nearest token at the start and at the end of training, and "
            "how far the vector is from its start and from that token. For comparison, the distance between two tokens "
            "of the vocabulary (median). Distances are approximate, of vectors projected at random to a few numbers. "
            "First seed that kept its path."
        )
        distances = ["from its start", "from the nearest token", "between two tokens"]
        header = ["method", "place", "nearest at the start", "nearest at the end", *distances]
        blocks += [Text(text), Table(header, moved, texts=4)]
    if pictures:
        caption = (
            "From a ring (where training began) to a disc (where it ended), a dot per validation, for some places "
            "of the prompt; the number is the place, the cross and the text its nearest token in the end; grey: tokens "
            "of the vocabulary, drawn at random. The plane is that of the vectors' two principal components."
        )
        blocks.append(Pictures(pictures, caption))
    return [*blocks, *_own_prompts(task), *_tried(task)]


def _prompt(run: Run) -> list[str] | None:
    """Prompt, step, NLL as words, NLL, exact match and distance at the validation that chose the best checkpoint."""
    name, larger = run.monitor
    judged = {step: -value if larger else value for step, value in _finite(run, name).items()}
    readouts = {int(row["step"]): row for row in run.readout if isinstance(row.get("step"), int)}
    both = [step for step in readouts if step in judged]
    step = min(both, key=lambda step: judged[step]) if both else max(readouts, default=-1)
    row = readouts.get(step, {})
    nll, match = (_finite(run, f"val/{name}").get(step) for name in ("nll", "exact_match"))
    percent = NONE if match is None else spread([match], percent=True)
    numbers = [_cell(row.get("nll_as_words")), _cell(nll), percent, _cell(row.get("distance"))]
    shown = NONE if step < 0 else str(step)
    if run.text is not None:
        return [repr(run.text) if "\n" not in run.text else run.text, shown, *numbers]
    tokens = row.get("tokens")
    if not isinstance(tokens, list):
        return [NONE, shown, *numbers] if numbers[-1] != NONE else None
    cosines = row.get("cosine") if isinstance(row.get("cosine"), list) else []
    near = [f" ({value:.2f})" if isinstance(value, float) else "" for value in cosines or []]
    words = [f"{str(token)!r}{cosine}" for token, cosine in itertools.zip_longest(tokens, near, fillvalue="")]
    more = f" and {len(words) - TOKENS} more" if len(words) > TOKENS else ""
    path = PromptPath.of(run)
    begun = "\n(the tokens that the prompt started from)" if path and path.started_from(tokens) else ""
    return [", ".join(words[:TOKENS]) + more + begun, shown, *numbers]


def _finite(run: Run, metric: str) -> dict[int, float]:
    """A metric's curve, without what is not a number."""
    return {step: value for step, value in run.curves.get(metric, {}).items() if np.isfinite(value)}


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else NONE


def _own_prompts(task: Task) -> list[Block]:
    """Prompts of methods that write one for each question."""
    rows = []
    for method in task.methods:
        counts = Counter(row.prompt for row in itertools.chain(*method.rows.values()) if row.prompt is not None)
        for prompt, count in counts.most_common(4):
            rows.append([method.name, repr(prompt), f"{count:,} of {counts.total():,}", f"{len(counts):,}"])
    text = (
        "Prompts written for single questions (for vectors, the nearest tokens): the commonest, and how many different "
        "ones there are."
    )
    return [Text(text), Table(["method", "prompt", "questions", "different prompts"], rows, texts=2)] if rows else []


def _tried(task: Task) -> list[Block]:
    """Prompts of methods that propose them, of validations that were better than all before."""
    rows = []
    for method in task.methods:
        run = next((run for run in method.runs if run.candidates), None)
        best = float("-inf")
        for row in run.candidates if run else []:
            accuracy, prompts = row.get("accuracy"), row.get("prompts")
            if isinstance(accuracy, int | float) and isinstance(prompts, list) and accuracy > best:
                best = float(accuracy)
                text = "\n–\n".join(str(prompt) for prompt in prompts)
                rows.append([method.name, text, str(row.get("step", NONE)), f"{accuracy:.1%}"])
    text = f"Prompts that were better on validation than all before them ({CANDIDATES}; the first seed that has one)."
    return [Text(text), Table(["method", "prompts, layer by layer", "step", "accuracy"], rows, texts=2)] if rows else []


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
        finite: Whether all vectors are; float16 has no numbers above 65,504.
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
        if len(counts) > 1:
            raise ValueError("sizes differ")
        self.finite = all(np.isfinite(vectors).all() for vectors in (self.vectors, self.nearest, self.vocabulary))

    @classmethod
    def of(cls, run: Run) -> PromptPath | None:
        """Read a run's path.

        Returns:
            The path; ``None`` where the run has kept none, or the prompt has diverged.

        Raises:
            UserError: The file is not what the callback writes.
        """
        try:
            path = cls(run.path) if run.path else None
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            where = run.folder / PROMPT_PATH
            raise UserError(f"{where} is not what PromptPath writes ({error}); leave the file out") from error
        return path if path and path.finite else None

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
