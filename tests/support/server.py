"""`openai_server.py` in a process of its own."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from support import forks, openai_server
from support.models import TINY


class ServerProcess:
    """`openai_server.py`, running: the tiny model as ``tiny`` and the embedded one under its own name."""

    def __init__(self, key: str | None = None) -> None:
        models = {"tiny": f"{TINY},max_position_embeddings=2048", "smollm2-135m-instruct": "smollm2-135m-instruct"}
        ours, self.pipe = forks.context.Pipe()
        self.process = forks.start(openai_server.serve, models, key, ours, self.pipe)
        ours.close()
        self.port = int(self.pipe.recv())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _control(self, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/control", data)
        with urllib.request.urlopen(request, timeout=300) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def set(self, **wanted: object) -> None:
        """Order faults and abilities; see the server."""
        self._control(wanted)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What was asked since the test began; with ``usage`` where it was answered."""
        requests: list[dict[str, Any]] = self._control(None)["requests"]
        return requests

    @property
    def most_at_once(self) -> int:
        """Requests under way at the same time, at most."""
        return int(self._control(None)["most_at_once"])

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(60)
