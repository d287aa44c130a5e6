"""Tiny random models of each architecture for speed, and the embedded 135M model for truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prompts.lm import FrozenLM, LMConfig, answer_cache, probe, state_store
from lightning_prompts.template import Template
from lightning_prompts.types import Example

SMALL = "hidden_size=32,intermediate_size=48,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2"
SHAPES = {
    "llama": f"random:llama,{SMALL},max_position_embeddings=256",
    "gpt2": "random:gpt2,n_embd=32,n_layer=3,n_head=4,n_positions=256",
    "qwen2": f"random:qwen2,{SMALL},max_position_embeddings=256",
    "qwen3": f"random:qwen3,{SMALL},head_dim=8,max_position_embeddings=256",
    # A window of 6 is shorter than prompt and text, so what lies outside of it matters.
    "gemma3": f"random:gemma3_text,{SMALL},head_dim=8,sliding_window=6,sliding_window_pattern=2,"
    "max_position_embeddings=256",
    "gemma2": f"random:gemma2,{SMALL},head_dim=8,sliding_window=6,attn_logit_softcapping=0.05,"
    "max_position_embeddings=256",
    "mistral": f"random:mistral,{SMALL},sliding_window=6,max_position_embeddings=256",
}
TINY = SHAPES["llama"]

# Tests run side by side, so each process gets one thread: on a busy machine, threads that wait for each other take
# several times as long as one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(scope="session", autouse=True)
def _states_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hidden states, servers' answers and probes of the tests are nothing for the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (state_store, answer_cache, probe):
            patch.setattr(module, "cache_root", lambda: tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(scope="session")
def shapes() -> Callable[[str], FrozenLM]:
    """A tiny model by the name of its architecture."""
    loaded: dict[str, FrozenLM] = {}

    def get(name: str) -> FrozenLM:
        if name not in loaded:
            loaded[name] = FrozenLM.load(LMConfig(SHAPES[name]))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def tiny(shapes: Callable[[str], FrozenLM]) -> FrozenLM:
    return shapes("llama")


@pytest.fixture(scope="session")
def real() -> FrozenLM:
    """The embedded 135M model."""
    return FrozenLM.load(LMConfig())


@pytest.fixture(scope="session")
def antonyms() -> list[Example]:
    """Rows of different lengths, prompt inside the text."""
    template = Template("Here are two{prompt} {question} and {answer}", stop=r"[^\w'-]")
    pairs = ["hot cold", "unquestionably questionably", "in out", "able unable", "overt covert", "a b", "day night"]
    return [template.render(dict(zip(("question", "answer"), pair.split(), strict=True)), pair) for pair in pairs]


@pytest.fixture(scope="session")
def prompt_first() -> list[Example]:
    """Rows that share nothing but the prompt, which comes first."""
    template = Template("{prompt}{question}: {answer}")
    pairs = [("What is two and two?", "four"), ("Why?", "because it must be so"), ("Which one?", "x")]
    return [template.render({"question": question, "answer": answer}) for question, answer in pairs]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """A user's own file."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"question": "q{n} is?", "answer": "{n % 7}"}}\n' for n in range(40)))
    return path


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


@pytest.fixture(scope="session")
def _server_process() -> Iterator[ServerProcess]:
    process = ServerProcess()
    yield process
    process.close()


@pytest.fixture
def server(_server_process: ServerProcess) -> ServerProcess:
    """A server without faults or memory."""
    _server_process.set(clear=True)
    return _server_process
