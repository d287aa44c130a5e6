"""A pass of one shape as CUDA graphs: the host launches one thing, not thousands of kernels.

A decoder layer launches some hundred kernels, each of which a modern GPU finishes before Python asks for the next. The
second pass of a shape is captured, forward and backward, and replayed from then on: what changes between batches
(embeddings, keys and values in front, the numbers of a `Layout`) is copied to where the graphs read it. All graphs
share one pool of memory, which a replay overwrites; while a forward pass waits for its backward pass, other passes run
without graphs.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prompts.errors import in_one_line
from lightning_prompts.lm.attention import Layout
from lightning_prompts.lm.key_values import KeyValues
from lightning_prompts.lm.memory import out_of_memory

log = logging.getLogger(__name__)

# Of passes in training and validation, and what they read and write at most; the least used one makes room.
MOST_GRAPHS = 32
MOST_BYTES = 4 << 30
# So many passes of a shape run without a graph before one is captured where another has to make room: otherwise rare
# shapes would take turns at being captured.
PASSES_TO_MAKE_ROOM = 8
Pass: TypeAlias = Callable[[Tensor, Layout, Tensor], Tensor]


class Graphs:
    """Runs passes, and replays those of known shapes.

    Args:
        forward: From packed embeddings ``[M, D]``, their layout and ``N`` places to logits ``[N, V]``.
        most: Keep so many graphs.
    """

    def __init__(self, forward: Pass, most: int = MOST_GRAPHS) -> None:
        """Capture nothing yet."""
        self._forward = forward
        self._most = most
        self._seen: Counter[object] = Counter()  # passes of each shape that ran without a graph
        self._known: OrderedDict[object, _Graph] = OrderedDict()
        # Graphs of a generation read its `KVCache`, and are dropped with it.
        self._decoding: weakref.WeakKeyDictionary[object, dict[object, _Graph]] = weakref.WeakKeyDictionary()
        self._pool: Any = None
        self._keeper: torch.cuda.CUDAGraph | None = None  # empty; CUDA frees a pool that no graph uses
        self._stream: torch.cuda.Stream | None = None
        self._waiting: weakref.ref[_Ticket] | None = None
        self.off: str | None = None  # why no more graphs are captured
        self.captured = 0  # shapes, in all

    def __reduce__(self) -> tuple[type[Graphs], tuple[Pass, int]]:
        """A copy has captured nothing."""
        return Graphs, (self._forward, self._most)

    def run(self, embeddings: Tensor, layout: Layout, places: Tensor) -> Tensor:
        """Logits ``[N, V]`` in float32, differentiable in the embeddings and in what stands in front of them."""
        inputs = [embeddings, *_tensors(layout.past)]
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if self.off is not None or self.busy or torch.cuda.is_current_stream_capturing():
            return self._eager(embeddings, layout, places)
        cache = layout.cache
        if cache is not None and not layout.later:
            return self._eager(embeddings, layout, places)  # the first pass of a batch comes once
        kinds = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs)
        # What is captured in inference mode can be written to in inference mode alone.
        key = (layout.shape, len(places), gradient, kinds, _autocast(), torch.is_inference_mode_enabled())
        known = self._known if cache is None else self._decoding.setdefault(cache, {})
        graph = known.get(key)
        if graph is None:
            full = cache is None and (len(self._known) >= self._most or self._bytes() > MOST_BYTES)
            if self._seen[key] < (PASSES_TO_MAKE_ROOM if full else 1):
                # The first pass of a shape runs without a graph, so that one-time set-up (handles, compiled kernels) is
                # not captured; with a gradient, its backward pass as well.
                logits = self._eager(embeddings, layout, places)
                if gradient:
                    logits.register_hook(lambda gradient: self._seen.update([key]))
                else:
                    self._seen[key] += 1
                return logits
            graph = self._captured(embeddings, layout, places, gradient)
            if graph is None:
                return self._eager(embeddings, layout, places)
            known[key] = graph
            self._seen[key] = 1  # where it makes room, it waits again
            while len(self._known) > self._most or (len(self._known) > 1 and self._bytes() > MOST_BYTES):
                self._known.popitem(last=False)
        if cache is None:
            self._known.move_to_end(key)
        ticket = _Ticket()
        if gradient:
            self._waiting = weakref.ref(ticket)
        layout.followed = True
        replayed: Tensor = _Replay.apply(graph, ticket, layout.numbers, places, *inputs)  # type: ignore[no-untyped-call]
        return replayed

    def _bytes(self) -> int:
        """What graphs read and write, beside their common pool."""
        return sum(graph.bytes for graph in self._known.values())

    def forget(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        self._seen.clear()
        self._known.clear()
        self._decoding.clear()
        self._pool = self._keeper = None

    @property
    def busy(self) -> bool:
        """Whether a replayed forward pass still waits for its backward pass."""
        ticket = None if self._waiting is None else self._waiting()
        return ticket is not None and not ticket.used

    def _eager(self, embeddings: Tensor, layout: Layout, places: Tensor) -> Tensor:
        try:
            return self._forward(embeddings, layout, places).float()
        except RuntimeError as error:
            if not out_of_memory(error) or not self._known or self.busy:
                raise
        log.warning("out of memory: CUDA graphs are dropped, and no more are captured")
        self.off = "out of memory"
        self.forget()
        torch.cuda.empty_cache()
        return self._forward(embeddings, layout, places).float()

    def _captured(self, embeddings: Tensor, layout: Layout, places: Tensor, gradient: bool) -> _Graph | None:
        """Graphs of a pass, or ``None`` where it cannot be captured."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._keeper = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream), _capturing(self._keeper, self._pool):
                torch.zeros(1, device=embeddings.device)
        assert self._stream is not None
        try:
            graph = _Graph(self._forward, embeddings, layout, places, gradient, self._pool, self._stream)
        except Exception as error:  # noqa: BLE001 - whatever a model does that a graph cannot hold
            self.off = in_one_line(error)
            log.warning("no CUDA graphs from here on (%s); steps run as before", self.off)
            torch.cuda.synchronize()
            self.forget()
            torch.cuda.empty_cache()
            return None
        self.captured += 1
        return graph


class _Ticket:
    """Stands for a forward pass until its backward pass is done, or its result is gone."""

    used = False


class _Graph:
    """One shape, captured.

    Attributes:
        numbers: Where the graphs read the layout's numbers.
        places: Where they read the places of logits.
        inputs: Where they read the other tensors.
        output: Where the forward graph writes logits.
        gradient: Where the backward graph reads the gradient of the logits.
        gradients: Where it writes those of the inputs; ``None`` for those without.
        bytes: How large these are.
    """

    def __init__(
        self, forward: Pass, embeddings: Tensor, layout: Layout, places: Tensor, gradient: bool, pool: Any,  # noqa: ANN401
        stream: torch.cuda.Stream,
    ) -> None:  # fmt: skip
        """Capture."""
        past = _tensors(layout.past)
        self.numbers, self.places = layout.numbers.clone(), places.clone()
        self.inputs = [_like(tensor, gradient) for tensor in (embeddings, *past)]
        twin = layout.on(self.numbers)
        if layout.past is not None:
            twin.past = KeyValues(list(zip(self.inputs[1::2], self.inputs[2::2], strict=True)))

        def run() -> Tensor:
            with _same_autocast():
                return forward(self.inputs[0], twin, self.places)

        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), None
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.set_grad_enabled(gradient):
            with _capturing(self._forward_graph, pool):
                self.output = run()
            self.gradient: Tensor | None = None
            self.gradients: list[Tensor | None] = []
            if gradient:
                self.gradient = torch.zeros_like(self.output)
                wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
                self._backward_graph = torch.cuda.CUDAGraph()
                with _capturing(self._backward_graph, pool):
                    found = torch.autograd.grad(self.output, wanted, self.gradient, allow_unused=True)
                parts = iter(found)
                self.gradients = [next(parts) if tensor.requires_grad else None for tensor in self.inputs]
        current.wait_stream(stream)
        self.output = self.output.detach()
        held = [*self.inputs, self.output, self.gradient, *self.gradients]
        self.bytes = sum(tensor.nbytes for tensor in held if tensor is not None)

    @torch.no_grad()
    def forward(self, numbers: Tensor, places: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """A copy of the logits, in float32."""
        torch._foreach_copy_([self.numbers, self.places, *self.inputs], [numbers, places, *inputs])
        self._forward_graph.replay()
        return self.output.to(torch.float32, copy=True)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Copies of the inputs' gradients."""
        assert self.gradient is not None
        assert self._backward_graph is not None
        self.gradient.copy_(gradient)
        self._backward_graph.replay()
        return [None if found is None else found.clone() for found in self.gradients]


class _Replay(torch.autograd.Function):
    """The two graphs as one operation."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, ticket: _Ticket, numbers: Tensor, places: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ANN401
        ctx.graph, ctx.ticket = graph, ticket
        return graph.forward(numbers, places, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if ctx.ticket.used:
            raise RuntimeError(
                "backward() ran twice through one pass of the LM, which a CUDA graph cannot; set model.lm.graphs to "
                "false"
            )
        ctx.ticket.used = True
        return (None, None, None, None, *ctx.graph.backward(gradient))


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:  # noqa: ANN401
    """As `torch.cuda.graph`, which empties torch's cache of memory each time; other threads may go on meanwhile."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


def _tensors(past: KeyValues | None) -> list[Tensor]:
    return [] if past is None else [tensor for pair in past.layers for tensor in pair]


def _like(tensor: Tensor, gradient: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(gradient and tensor.requires_grad)


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _same_autocast() -> Any:  # noqa: ANN401
    """The autocast of the moment, without a cache: what it holds would be read after a graph has overwritten it."""
    enabled, dtype = _autocast()
    return torch.autocast("cuda", dtype, cache_enabled=False) if enabled else contextlib.nullcontext()
