"""`openai_server.py` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from support.models import TINY


class ServerProcess:
    """`openai_server.py`, running: the tiny model as ``tiny`` and the embedded one under its own name."""

    def __init__(self, *args: str) -> None:
        models = [f"tiny={TINY},max_position_embeddings=2048", "smollm2-135m-instruct=smollm2-135m-instruct"]
        script = Path(__file__).parent / "openai_server.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), *args, *models], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _control(self, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/control", data)
        with urllib.request.urlopen(request, timeout=60) as answer:
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
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
