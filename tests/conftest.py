"""Tiny random models of each architecture for speed, and the embedded 135M model for truth."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The process that distributes the tests reads this file, too, and needs neither torch nor the models.
if TYPE_CHECKING:
    from lightning_prompts.lm import FrozenLM
    from lightning_prompts.types import Example
    from support.server import ServerProcess

# Tests run side by side, so each process gets one thread: on a busy machine, threads that wait for each other take
# several times as long as one. Torch reads this when it is imported, and so do processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _states_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hidden states, distributions, servers' answers and probes of the tests are nothing for the user's cache."""
    from lightning_prompts.lm import distribution_store, probe, server_cache, state_store

    with pytest.MonkeyPatch.context() as patch:
        for module in (state_store, distribution_store, server_cache, probe):
            patch.setattr(module, "cache_root", lambda: tmp_path_factory.getbasetemp() / "cache")
        yield


class _Memory:
    """Gives back the memory of earlier tests' models.

    They are parts of cycles, which Python collects too rarely; and the C library keeps freed blocks of their size.
    """

    def __init__(self) -> None:
        self.limit = 0.0

    def free(self) -> None:
        """Collect garbage if the process has grown by a few hundred megabytes since the last time."""
        if self.resident() > self.limit:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.limit = self.resident() + 3e8

    @staticmethod
    def resident() -> float:
        """The resident memory of this process, in bytes."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_MEMORY = _Memory()


@pytest.fixture(autouse=True)
def _models_do_not_stay() -> Iterator[None]:
    yield
    _MEMORY.free()


@pytest.fixture(scope="session")
def shapes() -> Callable[[str], FrozenLM]:
    """A tiny model by the name of its architecture."""
    from lightning_prompts.lm import FrozenLM, LMConfig
    from support.models import SHAPES

    loaded: dict[str, FrozenLM] = {}

    def get(name: str) -> FrozenLM:
        if name not in loaded:
            loaded[name] = FrozenLM.load(LMConfig(SHAPES[name]))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def tiny(shapes: Callable[[str], FrozenLM]) -> FrozenLM:
    return shapes("llama")


@pytest.fixture(scope="module")
def real() -> FrozenLM:
    """The embedded 135M model; it takes 0.5 GB, so it does not outlive a file's tests."""
    from lightning_prompts.lm import FrozenLM, LMConfig

    return FrozenLM.load(LMConfig())


@pytest.fixture(scope="session")
def antonyms() -> list[Example]:
    """Rows of different lengths, prompt inside the text."""
    from lightning_prompts.template import Template

    template = Template("Here are two{prompt} {question} and {answer}", stop=r"[^\w'-]")
    pairs = ["hot cold", "unquestionably questionably", "in out", "able unable", "overt covert", "a b", "day night"]
    return [template.render(dict(zip(("question", "answer"), pair.split(), strict=True)), pair) for pair in pairs]


@pytest.fixture(scope="session")
def prompt_first() -> list[Example]:
    """Rows that share nothing but the prompt, which comes first."""
    from lightning_prompts.template import Template

    template = Template("{prompt}{question}: {answer}")
    pairs = [("What is two and two?", "four"), ("Why?", "because it must be so"), ("Which one?", "x")]
    return [template.render({"question": question, "answer": answer}) for question, answer in pairs]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """A user's own file."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"question": "q{n} is?", "answer": "{n % 7}"}}\n' for n in range(40)))
    return path


@pytest.fixture(scope="session")
def _server_process() -> Iterator[ServerProcess]:
    from support.server import ServerProcess

    process = ServerProcess()
    yield process
    process.close()


@pytest.fixture
def server(_server_process: ServerProcess) -> ServerProcess:
    """A server without faults or memory."""
    _server_process.set(clear=True)
    return _server_process
