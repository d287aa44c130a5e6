"""A disk cache of the hidden states of questions, which the frozen LM computes once per set of questions.

The files are safetensors: memory-mapped, without code, and checked for truncation when they are opened. The name of a
file is a digest of everything that the states depend on: the model's configuration and weights, their dtype, the layer
and the token ids.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root
from lightning_prompts.lm.frozen import FrozenLM
from lightning_prompts.lm.transfer import padded, to_device
from lightning_prompts.types import Example

FORMAT = 2
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Query:
    """Which hidden states of the question the refiner reads.

    Attributes:
        instruction: Text before the question. The states of the question depend on it; its own states are left out.
        layer: 0 for the embeddings, ``k`` below ``L`` for the output of layer ``k``, ``L`` or -1 for the output of the
            last layer after the norm.
    """

    instruction: str = "Write a prompt that helps to answer this question.\nQuestion: "
    layer: int = -1

    def check(self, lm: FrozenLM) -> None:
        """Raise a `UserError` if the LM has no such layer."""
        if not -1 <= self.layer <= lm.layers:
            raise UserError(f"query.layer must be from -1 to {lm.layers}, the number of layers, got {self.layer}")

    def check_question(self, lm: FrozenLM, example: Example) -> None:
        """Raise a `UserError` with the row of an unusable question; tokenise only questions that might be unusable."""
        length = len(example.question.encode()) + len(self.instruction.encode()) + 8
        if length > lm.context or not example.question.strip():
            self.tokens(lm, example.question, f"{example.source}: " if example.source else "")

    def tokens(self, lm: FrozenLM, question: str, where: str = "") -> tuple[list[int], int]:
        """Encode the instruction and the question.

        Args:
            lm: The language model.
            question: The question.
            where: Prefix of error messages.

        Returns:
            The token ids, and the number of tokens before the question.

        Raises:
            UserError: They exceed the context window, or the question has no tokens.
        """
        head = list(lm.encoder.bos_ids) + lm.encoder.tokens(self.instruction, start=True)
        ids = lm.encoder.tokens(question, start=not head)
        if not ids:
            raise UserError(f"{where}the question is empty, so no prompt can be refined from it; drop the row")
        if len(head) + len(ids) > lm.context:
            raise UserError(
                f"{where}question {question[:40]!r}... has {len(head) + len(ids)} tokens with the query's instruction, "
                f"more than the context window of {lm.name} ({lm.context}); drop the row"
            )
        return head + ids, len(head)


class StateStore:
    """Hidden states of questions, ``[T, D]`` each, or their mean ``[1, D]``.

    Args:
        lm: The frozen language model.
        query: Which hidden states to store.
        pooled: Whether to store only the mean over the tokens of a question, in about a hundredth of the space.
        folder: Folder of the files; ``None`` for the user's cache folder.
    """

    def __init__(self, lm: FrozenLM, query: Query, pooled: bool, folder: Path | None = None) -> None:
        """Start without files; see `prepare`."""
        self.lm = lm
        self.query = query
        self.pooled = pooled
        self.folder = folder or cache_root() / "states"
        self._files: list[_File] = []

    def prepare(self, questions: Sequence[str], progress: bool = True) -> Path:
        """Open the file of the states of questions; compute the states if the file does not exist.

        A lock makes this safe for concurrent processes, and an atomic rename makes it safe against interruption.

        Args:
            questions: Questions in any order; duplicates are stored once.
            progress: Whether to show a progress bar.

        Returns:
            The path of the file.

        Raises:
            UserError: The folder cannot be written, or see `Query.tokens`.
        """
        wanted = sorted(set(questions))
        encoded = [self.query.tokens(self.lm, question) for question in wanted]
        key = self._key([ids for ids, _ in encoded])
        path = self.folder / f"{key}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                file = _File.open(path, key, wanted)
                if file is None:
                    self._write(path, key, encoded, progress)
                    file = _File.open(path, key, wanted)
        except OSError as error:
            raise UserError(
                f"cannot write hidden states to {self.folder} ({error.strerror or error}); set "
                "LIGHTNING_PROMPTS_CACHE to a folder with enough space, or --model.cache_states false"
            ) from error
        assert file is not None, f"{path} was written and is not readable"
        self._files.append(file)
        return path

    def __call__(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the states of questions; compute states that were not prepared.

        Returns:
            The states ``[B, T, D]`` in float32 on the LM's device, padded with zeros, and their boolean mask ``[B,
            T]``.
        """
        found = {
            question: states
            for question in set(questions)
            for file in self._files
            if (states := file.get(question)) is not None
        }
        missing = sorted(set(questions) - set(found))
        found.update(zip(missing, self.compute(missing), strict=True))
        parts = [found[question] for question in questions]
        here = [to_device(part, self.lm.device) if part.device.type == "cpu" else part for part in parts]
        return padded([part.float() for part in here])

    def compute(self, questions: Sequence[str]) -> list[Tensor]:
        """Compute the states of questions with the LM, in its dtype."""
        return self._compute([self.query.tokens(self.lm, question) for question in questions])

    @torch.no_grad()
    def _compute(self, encoded: Sequence[tuple[list[int], int]]) -> list[Tensor]:
        parts = []
        for batch in _batches(encoded):
            states = self.lm.hidden_states([ids for ids, _ in batch], self.lm.no_prompt(), self.query.layer)
            parts += [part[start:] for part, (_, start) in zip(states, batch, strict=True)]
        if self.pooled:
            return [part.float().mean(0, keepdim=True).to(part.dtype) for part in parts]
        return parts

    def _key(self, rows: list[list[int]]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        model = self.lm.model
        parts = [FORMAT, model.config.to_json_string(), fingerprint(self.lm), str(model.dtype)]
        parts += [self.pooled, self.query.layer, rows, self.query.tokens(self.lm, "a")[1]]
        digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    def _write(self, path: Path, key: str, encoded: list[tuple[list[int], int]], progress: bool) -> None:
        """Write a file batch by batch, so that it does not need to fit into memory."""
        for left_over in path.parent.glob(f"{path.name}.*.part"):  # from a killed process; we hold the lock
            left_over.unlink(missing_ok=True)
        counts = [1 if self.pooled else len(ids) - start for ids, start in encoded]
        dtype = self.lm.model.dtype
        size = sum(counts) * self.lm.width * dtype.itemsize
        offsets = np.array([0, *itertools.accumulate(counts)], dtype="<i8")
        tail = offsets.tobytes()
        header = {
            "__metadata__": {"key": key},
            "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, len(tail)]},
            "states": {
                "dtype": _DTYPES[dtype],
                "shape": [sum(counts), self.lm.width],
                "data_offsets": [len(tail), len(tail) + size],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text + tail)
                batches = list(_batches(encoded))
                title = f"hidden states of {len(encoded):,} questions"
                for batch in track(batches, title, console=Console(stderr=True), disable=not progress):
                    for part in self._compute(batch):
                        file.write(_bytes(part))
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


class _File:
    """An open file of states. Copying or unpickling it opens the file again."""

    def __init__(self, path: Path, handle: Any, spans: dict[str, tuple[int, int]]) -> None:  # noqa: ANN401
        self.path, self.rows, self.spans = path, handle.get_slice("states"), spans

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.spans)

    @classmethod
    def open(cls, path: Path, key: str, questions: list[str]) -> _File | None:
        """Open a file; return ``None`` if it is missing, damaged, or for other questions."""
        if not path.is_file():
            return None
        try:
            handle = _open(path)
            if (handle.metadata() or {}).get("key") != key:
                return None
            offsets = handle.get_tensor("offsets").tolist()
            file = cls(path, handle, dict(zip(questions, itertools.pairwise(offsets), strict=False)))
            return file if len(offsets) == len(questions) + 1 and file.rows.get_shape()[0] == offsets[-1] else None
        except (SafetensorError, KeyError, OSError):
            return None

    def get(self, question: str) -> Tensor | None:
        """Read the states ``[T, D]`` of a question; ``None`` if the file does not contain it."""
        span = self.spans.get(question)
        return None if span is None else self.rows[span[0] : span[1]]


def _open(path: Path) -> Any:  # noqa: ANN401 - safe_open has no public type
    return safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]


def _open_again(path: Path, spans: dict[str, tuple[int, int]]) -> _File:
    return _File(path, _open(path), spans)


def _batches(encoded: Sequence[tuple[list[int], int]]) -> Iterator[Sequence[tuple[list[int], int]]]:
    """Divide questions into passes with a bounded number of tokens."""
    start = tokens = 0
    for index, (ids, _) in enumerate(encoded):
        if index > start and tokens + len(ids) > _TOKENS_PER_PASS:
            yield encoded[start:index]
            start, tokens = index, 0
        tokens += len(ids)
    if start < len(encoded):
        yield encoded[start:]


def fingerprint(lm: FrozenLM) -> str:
    """Compute a digest of the model from a sample of each of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(lm.model.named_parameters()):
        flat = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(flat[:: max(1, len(flat) // 64)]))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    """Return the raw bytes of a tensor."""
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
