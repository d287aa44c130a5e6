"""Answers of servers on disk: one small file for each request, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root, write_atomic

log = logging.getLogger(__name__)


class ServerCache:
    """Keeps answers of servers by their requests. Several processes may use a folder at the same time.

    A file holds its request too, so that a clash of names is found out. It holds no key: the key is in no request's
    body. A damaged file is replaced.

    Args:
        folder: The folder; by default one in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Keep the folder's name."""
        self.folder = folder or cache_root() / "remote"

    def path(self, request: dict[str, Any]) -> Path:
        """The file of a request."""
        digest = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=20).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Look up the answer to a request; ``None`` if there is none."""
        path = self.path(request)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s); the server is asked again, and the file replaced", path, error)
            return None
        if not isinstance(kept, dict) or kept.get("request") != request or not isinstance(kept.get("answer"), dict):
            log.warning("%s holds another request; the server is asked again, and the file replaced", path)
            return None
        answer: dict[str, Any] = kept["answer"]
        return answer

    def put(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keep an answer.

        Raises:
            UserError: The folder cannot be written, or is full.
        """
        text = json.dumps({"request": request, "answer": answer}, ensure_ascii=False)
        try:
            write_atomic(self.path(request), text + "\n")
        except OSError as error:
            raise UserError(
                f"answers of the server cannot be kept in {self.folder} ({error.strerror or error}); set "
                "LIGHTNING_PROMPTS_CACHE to a folder that can be written, or server.cache to false"
            ) from error
