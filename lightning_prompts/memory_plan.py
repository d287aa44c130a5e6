r"""How much memory a config needs, before anything is loaded; `cli.plan` is the command.

**The LM** is its parameters in their dtype; quantised linear layers count 1 byte (int8) or 0.5625 (nf4) a weight.

**Activations.** Weights of the frozen LM get no gradient, so a linear layer keeps nothing: the gradient of its input
needs its weights alone. What a decoder layer of Llama's kind keeps for the backward pass, for ``M`` packed tokens (what
rows share counted once), follows from what is left:

- the inputs of both norms, ``2 M D``, in float32 (which is what a norm computes in, whatever the dtype);
- queries, scaled and in the order of the products: ``H Dh`` for each place of a level, padded to its longest segment;
- keys and values as they are, ``2 M Hkv Dh``, as levels of one segment are read in place; and of rows, copies in the
  order of the products, ``2 n T Hkv Dh`` for ``n`` rows padded to ``T``;
- attention weights in float32, ``n H T`` times the keys that a segment sees, ``P`` and shared tokens included; above
  ``EXPLICIT_LIMIT`` none of them, but the output, and, where rows are longer than what they share, keys and values
  repeated for every row and head, ``2 n H (S + T) Dh``;
- of the feed-forward part the gate before and after its activation and the other factor, ``3 M I``; without a gate one
  number for each of the activation's steps, ``4 M I``.

With gradient checkpointing that is a layer's input alone, ``M D``, and all of the above for one layer at a time.
Beside them stands what comes and goes, of which the largest counts: at the head three times logits ``N V`` in float32
(log-probabilities, and two gradients), for ``N`` answer and end tokens; or a layer's gradients, ``4 M I``.

**Several LMs**, where layers or a proposer have their own, are all there at once, and pass in turn: of what a pass
takes, the largest counts. Each is taken to read the same rows, as hidden texts and requests are yet to be written.

**Classes** are scored without gradient, in passes of as many rows as `FrozenLM.label_sums` takes, with logits at the
end of each context and at every token of its labels that is run. Methods of text prompts bound their passes themselves.

**What is trained** is float32, with a gradient and the optimiser's state. **Generation** keeps keys and values of the
longest row for every row, new tokens included, and passes without gradient keep nothing from layer to layer.

What is not in it: PyTorch itself (on a GPU about half a gigabyte for its context), the allocator's fragmentation,
callbacks, and what a Refiner's own layers keep, which is little beside the LM's.
`experiments/benchmarks/memory_plan.py` compares with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMShape, MemoryEstimate
from lightning_prompts.lm.attention import EXPLICIT_LIMIT, EXPLICIT_LIMIT_NO_GRAD, long_prefix
from lightning_prompts.lm.encoding import Row, check_fits
from lightning_prompts.lm.labels import rows_of_a_pass
from lightning_prompts.lm.loading import weightless_model
from lightning_prompts.lm.plan import Plan
from lightning_prompts.lm.sharding import heads_plan
from lightning_prompts.methods import PromptMethod
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.types import Example

_FLOAT = 4
_MOST_BATCHES = 200  # of the first epoch, that are looked at


@dataclass(frozen=True)
class Processes:
    """How many there are, and what they share.

    Attributes:
        replicas: That have examples of their own.
        shards: That each weight is split over.
        heads: That the heads of each layer are split over.
    """

    replicas: int = 1
    shards: int = 1
    heads: int = 1


@dataclass(frozen=True)
class Packed:
    """One packed pass.

    Attributes:
        levels: Tokens of the segments of each level, the rows' own last.
        ahead: Keys and values in front of everything.
        logits: ``N``, positions at which there are logits.
    """

    levels: Sequence[Sequence[int]]
    ahead: int
    logits: int

    @classmethod
    def of(cls, rows: Sequence[Row], extra: MemoryEstimate) -> Packed:
        """What `FrozenLM.answer_logits` packs."""
        return cls._of(Plan.of_answers(rows, [], not extra.per_question), extra)

    @classmethod
    def of_classes(cls, shape: LMShape, examples: Sequence[Example], extra: MemoryEstimate) -> Packed:
        """What the first pass of `FrozenLM.label_sums` packs for examples with classes."""
        known = [shape.encoder.label_tokens(example) for example in examples]
        size = rows_of_a_pass(known, shape.vocabulary)
        rows = _rows(shape, examples[:size], extra, False)
        contexts, texts = [row.context for row in rows], [labels.tokens for labels in known[:size]]
        return cls._of(Plan.of(contexts, texts, [], not extra.per_question), extra)

    @classmethod
    def _of(cls, plan: Plan, extra: MemoryEstimate) -> Packed:
        return cls([level for level in plan.counts if any(level)], extra.ahead, plan.logits)

    @property
    def tokens(self) -> int:
        """``M``."""
        return sum(map(sum, self.levels))


@dataclass(frozen=True)
class Item:
    """A row of the plan.

    Attributes:
        name: What takes the memory.
        bytes: How much of it, in each process.
        when: ``always``, or in which phase: ``training`` or ``evaluation``.
    """

    name: str
    bytes: float
    when: str = "always"


@dataclass(frozen=True)
class MemoryPlan:
    """What a config needs in each process.

    Attributes:
        title: Of what.
        items: What takes memory.
    """

    title: str
    items: Sequence[Item]

    def of(self, name: str) -> float:
        """Bytes of the items whose name starts so."""
        return sum(item.bytes for item in self.items if item.name.startswith(name))

    def total(self, phase: str) -> float:
        """Bytes that a phase needs, with what is always there."""
        return sum(item.bytes for item in self.items if item.when in ("always", phase))

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs the most."""
        return max(self.total("training"), self.total("evaluation"))


# --- activations ------------------------------------------------------------------------------------------------------


def _attention(shape: LMShape, packed: Packed, heads: int, limit: int) -> tuple[int, int, int]:
    """How many numbers of one layer are queries, copied keys and values, and weights.

    ``heads`` are the processes that the heads are split over; above ``limit`` weights are not kept.
    """
    own, kv = shape.heads // heads, shape.kv_heads // heads
    queries = copies = weights = 0
    above = packed.ahead
    for level in packed.levels:
        n, longest = len(level), max(level)
        keys = above + longest
        queries += n * longest * own * shape.head_width
        if long_prefix(n * own, longest, above, limit):
            copies += n * longest * own * shape.head_width
        elif n * own * longest * keys > limit:
            copies += 2 * n * keys * own * shape.head_width + n * longest * own * shape.head_width
        else:
            weights += n * own * longest * keys
            if n > 1:
                copies += 2 * n * longest * kv * shape.head_width
        above += longest
    return queries, copies, weights


def layer_bytes(shape: LMShape, packed: Packed, heads: int = 1) -> float:
    """What one decoder layer keeps for the backward pass; derived at the top of this file."""
    m, each = packed.tokens, shape.bytes_each
    # On the CPU attention of half precision is computed in float32; plans are for where it is used, GPUs.
    queries, copies, weights = _attention(shape, packed, heads, EXPLICIT_LIMIT)
    norms = 2 * m * shape.width * _FLOAT
    whole = 2 * m * (shape.kv_heads // heads) * shape.head_width
    weights_each = _FLOAT if each == _FLOAT else _FLOAT + each  # the softmax's own, and what is multiplied
    inner = (3 if shape.gated else 4) * m * (shape.inner // heads)
    return norms + (queries + whole + copies + inner) * each + weights * weights_each


def kept_bytes(shape: LMShape, packed: Packed, extra: MemoryEstimate, heads: int = 1) -> float:
    """What a forward pass keeps for the backward pass, head included."""
    layer = layer_bytes(shape, packed, heads) + packed.tokens * extra.inputs_saved * _FLOAT
    head = packed.tokens * shape.width * _FLOAT + extra.saved * _FLOAT
    if not shape.gradient_checkpointing:
        return shape.layers * layer + head
    return shape.layers * packed.tokens * shape.width * shape.bytes_each + layer + head


def passing_bytes(shape: LMShape, packed: Packed, heads: int = 1, backward: bool = True) -> float:
    """The largest of what comes and goes in a pass."""
    m, each = packed.tokens, shape.bytes_each
    half = 0 if each == _FLOAT else each
    logits = packed.logits * shape.vocabulary * ((3 if backward else 2) * _FLOAT + half)
    inner = (4 if backward else 3) * m * (shape.inner // heads) * each + 2 * m * shape.width * _FLOAT
    limit = EXPLICIT_LIMIT if backward else EXPLICIT_LIMIT_NO_GRAD
    queries, copies, weights = _attention(shape, packed, heads, limit)
    attention = (2 * queries + copies) * each + 3 * weights * _FLOAT + 2 * m * shape.width * _FLOAT
    return max(logits, inner, attention)


def cache_bytes(shape: LMShape, packed: Packed, new_tokens: int, heads: int = 1) -> float:
    """Keys and values that a generation keeps: of every row as many places as the longest needs, and what is shared."""
    *shared, rows = packed.levels
    places = len(rows) * (max(rows) + new_tokens) + sum(map(sum, shared))
    return places * shape.key_value_width / heads * shape.bytes_each


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(
    method: PromptMethod, batches: Sequence[Sequence[Example]], questions: Sequence[Sequence[Example]],
    processes: Processes = Processes(), device: str = "cpu",
) -> MemoryPlan:  # fmt: skip
    """The plan of a method that nothing was loaded for.

    Args:
        method: As its config has it.
        batches: Training batches; the one that takes the most counts.
        questions: Evaluation batches, likewise.
        processes: How many share the work.
        device: The kind of device that it would run on, ``cpu`` or ``cuda``.

    Raises:
        UserError: See `LMShape.of`; or there are no batches, or a model cannot be split over the processes.
    """
    own = [_share(batch, processes) for batch in batches if len(batch)]
    judged = [_share(batch, processes) for batch in questions if len(batch)]
    if not own or not judged:
        raise UserError("there are no examples to plan for; give data a training and a validation split")
    heads = processes.heads
    asked_for = [method.lm_config, *method.other_lms()]
    servers = [
        Item(f"{config.name}: behind {config.server.base_url}, takes nothing here", 0)
        for config in asked_for
        if config.server is not None
    ]
    local = [config for config in asked_for if config.server is None]
    if not local:
        return MemoryPlan(f"{type(method).__name__} on {method.lm_config.name}", servers)
    shapes = [LMShape.of(config, device=device) for config in local]
    extra = method.memory_estimate(shapes[0], max(map(len, own)))
    if extra.shape:
        shapes[0] = extra.shape
    for config in local if heads > 1 and not extra.shape else ():
        heads_plan(weightless_model(config), heads, config.name)
    shape = shapes[0]
    trained = extra.trained * _FLOAT
    state = optimizer_state(method)
    items = [
        *(
            Item(
                f"LM weights {'' if config == method.lm_config else f'of {one.name} '}({_precision(one)})",
                one.weight_bytes(processes.shards, heads),
            )
            for config, one in zip(local, shapes, strict=True)
        ),
        *servers,
        Item("what is trained", 0 if extra.shape else trained),
        Item("what the method keeps beside it", extra.kept * _FLOAT),
        Item("gradients", trained, "training"),
        Item("optimiser", trained * state, "training"),
    ]
    if processes.replicas > processes.shards:
        items.append(Item("gradients on their way to the others", trained, "training"))
    if processes.shards > 1:
        layer = max((one.weight_bytes(heads=heads) - one.outside * one.bytes_each) / one.layers for one in shapes)
        items.append(Item("two layers, put together", 2 * layer))
    packed = [Packed.of(_rows(shape, batch, extra, True), extra) for batch in own]
    if extra.backward:
        kept = max(packed, key=lambda one: kept_bytes(shape, one, extra, heads))
        items.append(Item("activations kept for the backward pass",
                          kept_bytes(shape, kept, extra, heads), "training"))  # fmt: skip
        passing = passing_bytes(shape, kept, heads)
        items.append(Item("the largest of what comes and goes", passing, "training"))
    else:
        passing = max(
            passing_bytes(one, Packed.of(_rows(one, batch, extra, True), extra), heads, backward=False)
            for one in shapes
            for batch in own
        )
        if extra.rows is not None:  # some prompts for each question in a pass
            passing *= extra.rows / max(map(len, own))
        items.append(Item("activations of a pass", passing + extra.saved * _FLOAT, "training"))
    asked = [(one, Packed.of(_rows(one, batch, extra, False), extra)) for one in shapes for batch in judged]
    cache = max(cache_bytes(one, question, method.max_new_tokens, heads) for one, question in asked)
    items.append(Item("keys and values of a generation", cache, "evaluation"))
    if not isinstance(method, TextPromptMethod):
        classes = [few for batch in judged if (few := [example for example in batch if example.labels])]
        asked += [(one, Packed.of_classes(one, few, extra)) for one in shapes for few in classes]
    passing = max(passing_bytes(one, question, heads, backward=False) for one, question in asked)
    items.append(Item("activations of a pass without gradient", passing, "evaluation"))
    largest = max(packed, key=lambda one: one.tokens)
    title = (
        f"{type(method).__name__} on {extra.shape.name if extra.shape else method.lm_config.name}: "
        f"{max(map(len, own))} rows, {largest.tokens:,} packed tokens and "
        f"{largest.logits:,} answer tokens a step" + (" in each process" if processes != Processes() else "")
    )
    return MemoryPlan(title, items)


def _share(batch: Sequence[Example], processes: Processes) -> Sequence[Example]:
    """The examples of the process that has the most."""
    return batch[: -(-len(batch) // processes.replicas)]


def _rows(shape: LMShape, examples: Sequence[Example], extra: MemoryEstimate, with_answers: bool) -> list[Row]:
    rows = [shape.encoder.row(example, extra.length, with_end=with_answers) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        total = extra.ahead + len(row.context) + len(row.answer) + len(row.end)
        check_fits(example, total, extra.ahead + extra.length, shape.name, shape.context)
    # What a row without an answer is asked for is one token.
    return rows if with_answers else [replace(row, answer=row.answer or [0]) for row in rows]


def _precision(shape: LMShape) -> str:
    name = str(shape.dtype).removeprefix("torch.")
    return name if shape.quantization == "none" else f"{shape.quantization}, the rest {name}"


def optimizer_state(method: PromptMethod) -> float:
    """Numbers that the method's optimiser keeps for each parameter: 2 for Adam, 0 for plain SGD."""
    if method.optimizer is None:
        return 0.0
    probe = torch.nn.Parameter(torch.zeros(8, 8, device="cpu"))
    optimizer = method.optimizer([probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    values = optimizer.state[probe].values()
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) // probe.numel()


def batches_of(data: TextDataModule, split: str) -> list[list[Example]]:
    """The batches of a split, of training those of the first epoch; no more than a few hundred."""
    examples = data.examples(split)
    size = data.batch_size if split == "train" else data.eval_batch_size
    order = list(data.sampler(examples, torch.initial_seed() % 2**63)) if split == "train" else range(len(examples))
    starts = range(0, min(len(examples), _MOST_BATCHES * size), size)
    return [[examples[index] for index in order[start : start + size]] for start in starts]
