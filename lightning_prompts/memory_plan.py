r"""How much memory a config needs, estimated before anything is loaded; `cli.plan` is the command.

**LM weights** are the parameters in their dtype; quantised linear layers take 1 byte (int8) or 0.5625 (nf4) per weight.

**Activations.** The weights of the frozen LM get no gradient. So a linear layer keeps no input for the backward pass:
the gradient of its input needs its weights only. For ``M`` packed tokens (shared tokens count once), a decoder layer of
Llama's kind keeps

- the inputs of both norms, ``2 M D``, in float32, as norms are computed in float32;
- the queries, scaled and reordered for the matrix products: ``H Dh`` per token of a level, padded to its longest
  segment;
- the keys and values, ``2 M Hkv Dh``; levels of one segment are read in place. Rows need reordered copies,
  ``2 n T Hkv Dh`` for ``n`` rows padded to ``T``;
- the attention weights in float32, ``n H T`` times the keys that a segment attends to, including the prompt ``P`` and
  shared tokens. Above ``EXPLICIT_LIMIT`` a layer keeps the output instead and, if rows are longer than what they share,
  keys and values repeated for every row and head, ``2 n H (S + T) Dh``;
- in the feed-forward part the gate before and after its activation and the other factor, ``3 M I``; without a gate one
  tensor for each step of the activation, ``4 M I``.

With gradient checkpointing every layer keeps its input only, ``M D``, and one layer at a time keeps all of the above.
The largest temporary tensors are added: at the head three times the logits ``N V`` in float32 (log-probabilities and
two gradients) for ``N`` answer and end tokens, or the gradients inside a layer, ``4 M I``.

**Several LMs** (of layers or of a proposer) are loaded together, and run one after the other, so the largest pass
counts. Each is assumed to read the same rows, as hidden texts and requests do not exist yet.

**Classes** are scored without gradients, with as many rows in a pass as `FrozenLM.label_sums` takes, and with logits
at the end of each context and at each label token that is run. Methods of text prompts limit their passes themselves.

**Trained parameters** are float32, with a gradient and the state of the optimiser. **Generation** keeps keys and values
for every row, padded to the longest row with its new tokens. Passes without gradients keep nothing between layers.

The plan leaves out PyTorch itself (on a GPU its context takes about half a gigabyte), fragmentation of the allocator,
callbacks, the steps that `LatentSeek` takes in evaluation (passes with gradients of ``pass_rows`` questions), and the
layers of a refiner, which are small beside the LM.
`experiments/benchmarks/memory_plan.py` compares the plan with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMShape, MemoryEstimate
from lightning_prompts.lm.encoding import Row, check_fits
from lightning_prompts.lm.labels import rows_of_a_pass
from lightning_prompts.lm.layout import EXPLICIT_LIMIT, EXPLICIT_LIMIT_NO_GRAD, long_prefix
from lightning_prompts.lm.loading import weightless_model
from lightning_prompts.lm.plan import Plan
from lightning_prompts.lm.sharding import heads_plan
from lightning_prompts.methods import PromptMethod
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.types import Example

_FLOAT = 4
_MOST_BATCHES = 200  # how many batches of the first epoch are planned for


@dataclass(frozen=True)
class Processes:
    """How processes split the work.

    Attributes:
        replicas: How many process their own examples.
        shards: Over how many each weight is split.
        heads: Over how many the heads of each layer are split.
    """

    replicas: int = 1
    shards: int = 1
    heads: int = 1


@dataclass(frozen=True)
class Packed:
    """One packed pass.

    Attributes:
        levels: The number of tokens in each segment, by level; the rows are the last level.
        ahead: The number of keys and values in front of everything.
        logits: ``N``, the number of positions that logits are computed at.
    """

    levels: Sequence[Sequence[int]]
    ahead: int
    logits: int

    @classmethod
    def of(cls, rows: Sequence[Row], extra: MemoryEstimate) -> Packed:
        """The pass of `FrozenLM.answer_logits`."""
        return cls._of(Plan.of_answers(rows, [], not extra.per_question), extra)

    @classmethod
    def of_classes(cls, shape: LMShape, examples: Sequence[Example], extra: MemoryEstimate) -> Packed:
        """The first pass of `FrozenLM.label_sums` for examples with classes."""
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
        bytes: The memory in each process, in bytes.
        when: The phase, ``training`` or ``evaluation``; or ``always``.
    """

    name: str
    bytes: float
    when: str = "always"


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a config needs in each process.

    Attributes:
        title: The method, the LM and the size of a step.
        items: What takes memory.
    """

    title: str
    items: Sequence[Item]

    def of(self, name: str) -> float:
        """The bytes of all items whose name starts with ``name``."""
        return sum(item.bytes for item in self.items if item.name.startswith(name))

    def total(self, phase: str) -> float:
        """The bytes that a phase needs, including items that are always there."""
        return sum(item.bytes for item in self.items if item.when in ("always", phase))

    @property
    def peak(self) -> float:
        """The bytes of the phase that needs the most."""
        return max(self.total("training"), self.total("evaluation"))


# --- activations ------------------------------------------------------------------------------------------------------


def _attention(shape: LMShape, packed: Packed, heads: int, limit: int) -> tuple[int, int, int]:
    """The numbers of elements of one layer's queries, copied keys and values, and attention weights.

    The heads are split over ``heads`` processes; above ``limit`` elements, attention weights are not kept.
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
    """The bytes that one decoder layer keeps for the backward pass; derived at the top of this file."""
    m, each = packed.tokens, shape.bytes_each
    # On the CPU, attention in half precision is computed in float32. The plan assumes a GPU.
    queries, copies, weights = _attention(shape, packed, heads, EXPLICIT_LIMIT)
    norms = 2 * m * shape.width * _FLOAT
    whole = 2 * m * (shape.kv_heads // heads) * shape.head_width
    weights_each = _FLOAT if each == _FLOAT else _FLOAT + each  # the output of the softmax, and its cast
    inner = (3 if shape.gated else 4) * m * (shape.inner // heads)
    return norms + (queries + whole + copies + inner) * each + weights * weights_each


def kept_bytes(shape: LMShape, packed: Packed, extra: MemoryEstimate, heads: int = 1) -> float:
    """The bytes that a forward pass keeps for the backward pass, including the head."""
    layer = layer_bytes(shape, packed, heads) + packed.tokens * extra.inputs_saved * _FLOAT
    head = packed.tokens * shape.width * _FLOAT + extra.saved * _FLOAT
    if not shape.gradient_checkpointing:
        return shape.layers * layer + head
    return shape.layers * packed.tokens * shape.width * shape.bytes_each + layer + head


def passing_bytes(shape: LMShape, packed: Packed, heads: int = 1, backward: bool = True) -> float:
    """The bytes of the largest temporary tensors of a pass."""
    m, each = packed.tokens, shape.bytes_each
    half = 0 if each == _FLOAT else each
    logits = packed.logits * shape.vocabulary * ((3 if backward else 2) * _FLOAT + half)
    inner = (4 if backward else 3) * m * (shape.inner // heads) * each + 2 * m * shape.width * _FLOAT
    limit = EXPLICIT_LIMIT if backward else EXPLICIT_LIMIT_NO_GRAD
    queries, copies, weights = _attention(shape, packed, heads, limit)
    attention = (2 * queries + copies) * each + 3 * weights * _FLOAT + 2 * m * shape.width * _FLOAT
    return max(logits, inner, attention)


def cache_bytes(shape: LMShape, packed: Packed, new_tokens: int, heads: int = 1) -> float:
    """The bytes of the keys and values of a generation: shared tokens, and rows padded to the longest."""
    *shared, rows = packed.levels
    places = len(rows) * (max(rows) + new_tokens) + sum(map(sum, shared))
    return places * shape.key_value_width / heads * shape.bytes_each


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(
    method: PromptMethod,
    batches: Sequence[Sequence[Example]],
    questions: Sequence[Sequence[Example]],
    processes: Processes = Processes(),
    device: str = "cpu",
) -> MemoryPlan:
    """Plan the memory of a method without loading anything.

    Args:
        method: The method, as its config describes it.
        batches: Training batches; the largest counts.
        questions: Evaluation batches; the largest counts.
        processes: How processes split the work.
        device: The kind of device to plan for, ``cpu`` or ``cuda``.

    Raises:
        UserError: There are no batches, or the model cannot be split over the processes; see also `LMShape.of`.
    """
    own = [_share(batch, processes) for batch in batches if len(batch)]
    judged = [_share(batch, processes) for batch in questions if len(batch)]
    if not own or not judged:
        raise UserError("there are no examples to plan for; give data a training and a validation split")
    heads = processes.heads
    asked_for = [method.lm_config, *method.other_lms()]
    servers = [
        Item(f"{config.name}: behind {config.server.base_url}, takes no memory here", 0)
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
        Item("trained parameters", 0 if extra.shape else trained),
        Item("other tensors of the method", extra.kept * _FLOAT),
        Item("gradients", trained, "training"),
        Item("optimiser", trained * state, "training"),
    ]
    if processes.replicas > processes.shards:
        items.append(Item("gradients being exchanged", trained, "training"))
    if processes.shards > 1:
        layer = max((one.weight_bytes(heads=heads) - one.outside * one.bytes_each) / one.layers for one in shapes)
        items.append(Item("two gathered layers", 2 * layer))
    packed = [Packed.of(_rows(shape, batch, extra, True), extra) for batch in own]
    if extra.backward:
        kept = max(packed, key=lambda one: kept_bytes(shape, one, extra, heads))
        saved = kept_bytes(shape, kept, extra, heads)
        items.append(Item("activations kept for the backward pass", saved, "training"))
        passing = passing_bytes(shape, kept, heads)
        items.append(Item("largest temporary tensors", passing, "training"))
    else:
        passing = max(
            passing_bytes(one, Packed.of(_rows(one, batch, extra, True), extra), heads, backward=False)
            for one in shapes
            for batch in own
        )
        if extra.rows is not None:  # a pass scores several prompts for each question
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
    """The examples of the process with the most examples."""
    return batch[: -(-len(batch) // processes.replicas)]


def _rows(shape: LMShape, examples: Sequence[Example], extra: MemoryEstimate, with_answers: bool) -> list[Row]:
    rows = [shape.encoder.row(example, extra.length, with_end=with_answers) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        total = extra.ahead + len(row.context) + len(row.answer) + len(row.end)
        check_fits(example, total, extra.ahead + extra.length, shape.name, shape.context)
    # A row without an answer is asked for one token.
    return rows if with_answers else [replace(row, answer=row.answer or [0]) for row in rows]


def _precision(shape: LMShape) -> str:
    name = str(shape.dtype).removeprefix("torch.")
    return name if shape.quantization == "none" else f"{shape.quantization}, the rest {name}"


def optimizer_state(method: PromptMethod) -> float:
    """How many numbers the optimiser keeps for each parameter: 2 for Adam, 0 for plain SGD."""
    if method.optimizer is None:
        return 0.0
    probe = torch.nn.Parameter(torch.zeros(8, 8, device="cpu"))
    optimizer = method.optimizer([probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    values = optimizer.state[probe].values()
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor)) // probe.numel()


def batches_of(data: TextDataModule, split: str) -> list[list[Example]]:
    """The batches of a split, for training those of the first epoch; at most `_MOST_BATCHES`."""
    examples = data.examples(split)
    size = data.batch_size if split == "train" else data.eval_batch_size
    order = list(data.sampler(examples, torch.initial_seed() % 2**63)) if split == "train" else range(len(examples))
    starts = range(0, min(len(examples), _MOST_BATCHES * size), size)
    return [[examples[index] for index in order[start : start + size]] for start in starts]
