"""CUDA graphs on a machine without CUDA: operations are recorded with their memory, and run again in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What asks the device for a number, or has a result whose size depends on numbers; CUDA refuses it in a capture.
REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if any(name in func.name() for name in REFUSED):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """Stands in for `torch.cuda.CUDAGraph`. Unlike CUDA's, a capture computes; its results are then spoilt."""

    def __init__(self) -> None:
        self.recorder = _Recorder()

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        del pool, capture_error_mode
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        known = {_memory(leaf) for _, args, kwargs, _ in self.recorder.operations for leaf in _tensors((args, kwargs))}
        for _, _, _, result in self.recorder.operations:
            for new in _tensors(result):
                if _memory(new) not in known and new.is_floating_point():
                    with torch.no_grad():
                        new.detach().fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.recorder.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if _memory(old) != _memory(new):
                    old.detach().copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Stream:
    def wait_stream(self, other: Any) -> None:
        del other


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    del stream
    yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `lightning_prompts.lm.graphs` capture and replay on the CPU."""
    fakes: dict[str, Any] = {
        "CUDAGraph": RecordedGraph,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": _on,
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
