"""A disk cache of next-token distributions along answers: one small file for each row, written whole or not at all.

The name of a file is a digest of everything that its distributions depend on: the model's configuration, weights, dtype
and kind of device, mixed precision, the number of kept tokens, and the token ids of the row, its context included. A
changed context, template, example or model therefore has another file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic
from lightning_prompts.lm.distributions import Distributions
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.frozen import FrozenLM
from lightning_prompts.lm.precision import mixed_dtype
from lightning_prompts.lm.state_store import fingerprint
from lightning_prompts.lm.transfer import to_device

log = logging.getLogger(__name__)

FORMAT = 1


class DistributionStore:
    """Distributions of a frozen LM at the answer and end tokens of rows. Several processes may share a folder.

    Rows without a file run through the LM together, as they do without a cache, and are stored in float32 as they are.
    A file is the result of the batch that it was computed in; other batches round differently, by about 1e-6 nats.

    Args:
        lm: The frozen language model.
        top_k: See `Distributions.of`.
        cached: Whether to read and write files.
        folder: Folder of the files; ``None`` for one in the user's cache folder.
    """

    def __init__(self, lm: FrozenLM, top_k: int | None, cached: bool, folder: Path | None = None) -> None:
        """Keep the settings."""
        self.lm = lm
        self.top_k = top_k
        # Processes that share an LM must run the same passes, so each would have to find the same files.
        self.cached = cached and lm.shards is None
        self.folder = folder or cache_root() / "distributions"

    def __call__(self, rows: Sequence[Row]) -> Distributions:
        """Return the distributions at the answer and end tokens of rows, in order, without a gradient.

        Args:
            rows: ``B`` rows of token ids, without prompt positions.

        Raises:
            UserError: The folder cannot be written, or is full.
        """
        if not self.cached:
            return self.compute(rows)
        found = [self._read(row) for row in rows]
        missing = [row for row, known in zip(rows, found, strict=True) if known is None]
        if missing:
            new = iter(self.compute(missing).split([_positions(row) for row in missing]))
            for index, row in enumerate(rows):
                if found[index] is None:
                    found[index] = part = next(new)
                    self._write(row, part)
        return Distributions.join([part for part in found if part is not None])

    @torch.no_grad()
    def compute(self, rows: Sequence[Row]) -> Distributions:
        """Run the rows through the LM in one pass, which runs their common context once."""
        return Distributions.of(self.lm.answer_logits(rows, self.lm.no_prompt()), self.top_k)

    @functools.cached_property
    def _model(self) -> list[object]:
        """What distributions depend on beside the row."""
        lm = self.lm
        return [FORMAT, lm.model.config.to_json_string(), fingerprint(lm), str(lm.model.dtype), lm.device.type]

    def _key(self, row: Row) -> str:
        parts = [*self._model, mixed_dtype(self.lm.device), self.top_k, row.context, row.answer, row.end]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()

    def path(self, row: Row) -> Path:
        """Return the file of a row."""
        key = self._key(row)
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, row: Row) -> Distributions | None:
        path = self.path(row)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                key = (file.metadata() or {}).get("key")
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); it is computed again, and the file replaced", path, error)
            return None
        known = {"log_probs"} if self.top_k is None else {"log_probs", "tokens"}
        if key != path.stem or parts.keys() != known or len(parts["log_probs"]) != _positions(row):
            log.warning("%s holds other distributions; they are computed again, and the file replaced", path)
            return None
        here = {name: to_device(part, self.lm.device) for name, part in parts.items()}
        return Distributions(here["log_probs"], here.get("tokens"))

    def _write(self, row: Row, part: Distributions) -> None:
        path = self.path(row)
        tensors = {"log_probs": part.log_probs} | ({} if part.tokens is None else {"tokens": part.tokens})
        # Copies, as the tensors are views of those of the whole batch.
        content = save({name: value.cpu().clone() for name, value in tensors.items()}, {"key": path.stem})
        try:
            write_atomic(path, content)
        except OSError as error:
            raise UserError(
                f"cannot write distributions of the teacher to {self.folder} ({error.strerror or error}); set "
                "LIGHTNING_PROMPTS_CACHE to a folder with enough space, or model.cache to false"
            ) from error


def _positions(row: Row) -> int:
    return len(row.answer) + len(row.end)
