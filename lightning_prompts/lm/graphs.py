"""CUDA graphs of passes: the host launches one graph instead of thousands of kernels.

A decoder layer launches about a hundred kernels, and a modern GPU finishes each before Python launches the next. The
second pass of a shape is captured, forward and backward; later passes of the shape replay the graphs. The inputs that
change between batches (embeddings, keys and values before all tokens, the index arrays of a `PackedLayout`) are copied
to the addresses that the graphs read. All graphs share one memory pool, which a replay overwrites. While a replayed
forward pass waits for its backward pass, other passes run without graphs.
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
from lightning_prompts.lm.failures import out_of_memory
from lightning_prompts.lm.key_values import KeyValues
from lightning_prompts.lm.layout import PackedLayout

log = logging.getLogger(__name__)

# Limits of the number of graphs for training and validation, and of the bytes of their inputs and outputs. The least
# recently used graph is evicted.
MOST_GRAPHS = 32
MOST_BYTES = 4 << 30
# Passes of a shape without a graph before a capture that evicts another graph, so that rare shapes do not evict each
# other in turn.
PASSES_TO_MAKE_ROOM = 8
Pass: TypeAlias = Callable[[Tensor, PackedLayout, Tensor], Tensor]


class Graphs:
    """Runs passes, and replays CUDA graphs for shapes that it has captured.

    Args:
        forward: Computes logits ``[N, V]`` from packed embeddings ``[M, D]``, their layout and ``N`` places.
        most: Maximum number of graphs.
    """

    def __init__(self, forward: Pass, most: int = MOST_GRAPHS) -> None:
        """Start without graphs."""
        self._forward = forward
        self._most = most
        self._seen: Counter[object] = Counter()  # passes of each shape without a graph
        self._known: OrderedDict[object, _Graph] = OrderedDict()
        # The graphs of a generation read its `KVCache` and are freed with it.
        self._decoding: weakref.WeakKeyDictionary[object, dict[object, _Graph]] = weakref.WeakKeyDictionary()
        self._pool: Any = None
        self._keeper: torch.cuda.CUDAGraph | None = None  # an empty graph, because CUDA frees a pool without graphs
        self._stream: torch.cuda.Stream | None = None
        self._waiting: weakref.ref[_Ticket] | None = None
        self.off: str | None = None  # why no more graphs are captured
        self.captured = 0  # total number of captured shapes

    def __reduce__(self) -> tuple[type[Graphs], tuple[Pass, int]]:
        """Copy without graphs."""
        return Graphs, (self._forward, self._most)

    def run(self, embeddings: Tensor, layout: PackedLayout, places: Tensor) -> Tensor:
        """Compute float32 logits ``[N, V]``, differentiable in the embeddings and in the keys and values before them.

        Args:
            embeddings: Packed embeddings ``[M, D]``.
            layout: Their layout.
            places: Places of the logits, ``[N]``.
        """
        inputs = [embeddings, *_tensors(layout.past)]
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if self.off is not None or self.busy or torch.cuda.is_current_stream_capturing():
            return self._eager(embeddings, layout, places)
        cache = layout.cache
        if cache is not None and not layout.later:
            return self._eager(embeddings, layout, places)  # the first pass of a generation does not recur
        kinds = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs)
        # Tensors that are captured in inference mode can be written only in inference mode.
        key = (layout.shape, len(places), gradient, kinds, _autocast(), torch.is_inference_mode_enabled())
        known = self._known if cache is None else self._decoding.setdefault(cache, {})
        graph = known.get(key)
        if graph is None:
            full = cache is None and (len(self._known) >= self._most or self._bytes() > MOST_BYTES)
            if self._seen[key] < (PASSES_TO_MAKE_ROOM if full else 1):
                # The first pass of a shape, and its backward pass if it has one, run without a graph, so that one-time
                # setup (library handles, compiled kernels) is not captured.
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
            self._seen[key] = 1  # after an eviction, the shape waits again
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
        """Bytes of the inputs and outputs of all graphs, outside of their memory pool."""
        return sum(graph.bytes for graph in self._known.values())

    def forget(self) -> None:
        """Free all graphs and their memory."""
        self._seen.clear()
        self._known.clear()
        self._decoding.clear()
        self._pool = self._keeper = None

    @property
    def busy(self) -> bool:
        """Whether a replayed forward pass still waits for its backward pass."""
        ticket = None if self._waiting is None else self._waiting()
        return ticket is not None and not ticket.used

    def _eager(self, embeddings: Tensor, layout: PackedLayout, places: Tensor) -> Tensor:
        try:
            return self._forward(embeddings, layout, places).float()
        except RuntimeError as error:
            if not out_of_memory(error) or not self._known or self.busy:
                raise
        log.warning("out of memory: freeing all CUDA graphs and capturing no more")
        self.off = "out of memory"
        self.forget()
        torch.cuda.empty_cache()
        return self._forward(embeddings, layout, places).float()

    def _captured(self, embeddings: Tensor, layout: PackedLayout, places: Tensor, gradient: bool) -> _Graph | None:
        """Capture the graphs of a pass; ``None`` if this fails."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._keeper = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream), _capturing(self._keeper, self._pool):
                torch.zeros(1, device=embeddings.device)
        assert self._stream is not None
        try:
            graph = _Graph(self._forward, embeddings, layout, places, gradient, self._pool, self._stream)
        except Exception as error:  # noqa: BLE001 - a capture can fail with any error
            self.off = in_one_line(error)
            log.warning("CUDA graphs are switched off (%s); steps run without them", self.off)
            torch.cuda.synchronize()
            self.forget()
            torch.cuda.empty_cache()
            return None
        self.captured += 1
        return graph


class _Ticket:
    """Marks a replayed forward pass until its backward pass has run, or its result is freed."""

    used = False


class _Graph:
    """The captured graphs of one shape.

    Attributes:
        numbers: Input buffer of the layout's index arrays.
        places: Input buffer of the places of logits.
        inputs: Input buffers of the other tensors.
        output: Output buffer of the logits.
        gradient: Input buffer of the gradient of the logits.
        gradients: Output buffers of the gradients of ``inputs``; ``None`` for inputs without a gradient.
        bytes: Total size of these buffers except ``numbers`` and ``places``.
    """

    def __init__(
        self,
        forward: Pass,
        embeddings: Tensor,
        layout: PackedLayout,
        places: Tensor,
        gradient: bool,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        """Capture the forward pass, and with a gradient the backward pass."""
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
        """Replay the forward pass and return a copy of the logits in float32."""
        torch._foreach_copy_([self.numbers, self.places, *self.inputs], [numbers, places, *inputs])
        self._forward_graph.replay()
        return self.output.to(torch.float32, copy=True)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Replay the backward pass and return copies of the gradients of the inputs."""
        assert self.gradient is not None
        assert self._backward_graph is not None
        self.gradient.copy_(gradient)
        self._backward_graph.replay()
        return [None if found is None else found.clone() for found in self.gradients]


class _Replay(torch.autograd.Function):
    """Both graphs as one differentiable operation."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, ticket: _Ticket, numbers: Tensor, places: Tensor, *inputs: Tensor) -> Tensor:
        ctx.graph, ctx.ticket = graph, ticket
        return graph.forward(numbers, places, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ticket.used:
            raise RuntimeError(
                "backward() ran twice through one pass of the LM, which CUDA graphs do not support; set "
                "model.lm.graphs to false"
            )
        ctx.ticket.used = True
        return (None, None, None, None, *ctx.graph.backward(gradient))


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:
    """Capture a graph like `torch.cuda.graph`, without emptying the allocator's cache or stopping other threads."""
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


def _same_autocast() -> Any:
    """Use the current autocast settings without a cache, whose tensors a graph would overwrite."""
    enabled, dtype = _autocast()
    return torch.autocast("cuda", dtype, cache_enabled=False) if enabled else contextlib.nullcontext()
