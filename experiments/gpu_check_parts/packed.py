"""Compare packed scoring with plain transformers for one text at a time, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from gpu_check_parts.base import SHAPES, attempt, load, normal, relative, twin
from gpu_check_parts.rows import Row, Settings
from lightning_prompts.lm import FrozenLM, KeyValues
from lightning_prompts.template import Template
from lightning_prompts.types import Example

SECONDS = 60  # for one job
DTYPES = ("float32", "bfloat16", "float16")
FRONT, INFILL = "{prompt}{question}: {answer}", "Here are two{prompt} {question} and {answer}"
PAIRS = [
    ("What is two and two?", "four"),
    ("unquestionably so", "questionably"),
    ("Why?", "because it must be so"),
    ("in", "out"),
    ("a", "b"),
]
CACHED = ("llama", "gpt2", "qwen2", "qwen3")  # without windows, the cache of transformers supports any prefix

Losses = Callable[[PreTrainedModel, Tensor], Tensor]


def jobs(settings: Settings) -> list[str]:
    """List every architecture in every precision."""
    del settings
    return [f"{shape} {dtype}" for dtype in DTYPES for shape in SHAPES]


def examples(template: str) -> list[Example]:
    """Make examples of different lengths."""
    made = Template(template)
    return [made.render({"question": question, "answer": answer}) for question, answer in PAIRS]


def run(name: str, settings: Settings) -> list[Row]:
    """Check losses and gradients of each kind of prompt."""
    shape, dtype = name.split()
    lm = load(SHAPES[shape], settings.device, dtype=dtype)
    plain, exact = twin(lm.model, lm.model.dtype), twin(lm.model, torch.float32)
    front, infill = examples(FRONT), examples(INFILL)
    cases: dict[str, tuple[list[Example], Tensor, Losses]] = {
        "in front": (front, normal(lm, 9), partial(alone, lm, front)),
        "infill": (infill, normal(lm, 9), partial(alone, lm, infill)),
        "one for each row": (infill, normal(lm, len(PAIRS), 4), partial(alone, lm, infill)),
    }
    rows = [
        attempt("packed", f"{name}, {case}", partial(_check, f"{name}, {case}", lm, plain, exact, *values))
        for case, values in cases.items()
    ]
    case = f"{name}, prefix"
    return [*rows, attempt("packed", case, partial(_prefix, case, lm, plain, exact, shape in CACHED))]


def alone(lm: FrozenLM, rows: Sequence[Example], model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Compute the loss of each text separately, without mask and padding, ``[B]``."""
    losses = []
    for b, example in enumerate(rows):
        own = prompt if prompt.dim() == 2 else prompt[b]
        row = lm.encoder.row(example, len(own))
        index = torch.tensor(row.context + row.answer, device=own.device)
        vectors = model.get_input_embeddings()(index.clamp(min=0))
        soft = own[(-1 - index).clamp(min=0)].to(vectors.dtype)
        vectors = torch.where((index < 0)[:, None], soft, vectors)
        losses.append(_answer_loss(model(inputs_embeds=vectors[None]).logits[0], row.answer))
    return torch.stack(losses)


def _answer_loss(logits: Tensor, answer: list[int]) -> Tensor:
    wanted = torch.tensor(answer, device=logits.device)
    return functional.cross_entropy(logits[-len(answer) - 1 : -1].float(), wanted)


def after_cache(
    lm: FrozenLM, widths: Sequence[tuple[torch.Size, torch.Size]], model: PreTrainedModel, flat: Tensor
) -> Tensor:
    """Compute the loss of each text after keys and values in a cache of transformers, ``[B]``."""
    losses = []
    for example in examples(FRONT):
        row, cache = lm.encoder.row(example, 0), DynamicCache()
        for layer, (key, value) in enumerate(KeyValues.unflatten(flat.to(model.dtype), widths).layers):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        ids = torch.tensor([row.context + row.answer], device=flat.device)
        places = torch.arange(len(flat), len(flat) + ids.shape[1], device=flat.device)[None]
        losses.append(_answer_loss(model(ids, past_key_values=cache, position_ids=places).logits[0], row.answer))
    return torch.stack(losses)


def _prefix(name: str, lm: FrozenLM, plain: PreTrainedModel, exact: PreTrainedModel, cached: bool) -> Row:
    """Check arbitrary keys and values with their gradient; with windows, compare those of a text with the text."""
    vectors = normal(lm, 9).detach()
    known = lm.key_values(vectors)
    if not cached:
        losses = partial(alone, lm, examples(FRONT))
        return _judge(
            name,
            [
                (run, None)
                for run in (lm.score(examples(FRONT), known).nll, losses(plain, vectors), losses(exact, vectors))
            ],
        )
    noise = torch.randn(known.flatten().shape, generator=torch.Generator().manual_seed(5), device="cpu")
    flat = (known.flatten() + 0.1 * noise.to(lm.device)).detach().requires_grad_()
    losses = partial(after_cache, lm, known.widths)

    def ours(given: Tensor) -> Tensor:
        return _replayed(lm, lambda: lm.score(examples(FRONT), KeyValues.unflatten(given, known.widths)).nll)

    return _judge(name, [_with_gradient(work, flat) for work in (ours, partial(losses, plain), partial(losses, exact))])


def _replayed(lm: FrozenLM, work: Callable[[], Tensor]) -> Tensor:
    """Return the third result of a pass, which CUDA replays after an eager pass and a captured one."""
    if not lm.static:
        return work()
    first = work().detach()
    work().sum().backward()  # while a pass waits for its backward pass, no pass is replayed
    result = work()
    slack = 64 * torch.finfo(lm.model.dtype).eps
    if lm.captured is None or not torch.allclose(result, first, rtol=slack, atol=slack):
        raise RuntimeError(f"replayed losses {result.tolist()}, at first {first.tolist()}; graphs: {lm.captured}")
    return result


def _check(
    name: str,
    lm: FrozenLM,
    plain: PreTrainedModel,
    exact: PreTrainedModel,
    rows: list[Example],
    prompt: Tensor,
    losses: Losses,
) -> Row:
    def ours(given: Tensor) -> Tensor:
        return _replayed(lm, lambda: lm.score(rows, given).nll)

    works = (ours, partial(losses, plain), partial(losses, exact))
    return _judge(name, [_with_gradient(work, prompt) for work in works])


def _with_gradient(work: Callable[[Tensor], Tensor], prompt: Tensor) -> tuple[Tensor, Tensor]:
    losses = work(prompt)
    return losses.detach(), torch.autograd.grad(losses.mean(), prompt)[0]


def _judge(name: str, results: list[tuple[Tensor, Tensor | None]]) -> Row:
    """Compare this project, and transformers in the same precision, with transformers in float32.

    Float32 errors must be at most 1e-4. Half-precision errors must be at most three times those of transformers plus
    one rounding error of the precision.
    """
    (ours, our_gradient), (plain, plain_gradient), (exact, gradient) = results
    dtype = name.split(",")[0].split()[1]
    slack = 1e-4 if dtype == "float32" else torch.finfo(getattr(torch, dtype)).eps
    times = 0 if dtype == "float32" else 3
    figures = {"loss": _largest(ours - exact), "loss_allowed": times * _largest(plain - exact) + slack}
    if our_gradient is not None and plain_gradient is not None and gradient is not None:
        figures["gradient"] = relative(our_gradient, gradient)
        figures["gradient_allowed"] = times * relative(plain_gradient, gradient) + slack
    kinds = [kind for kind in ("loss", "gradient") if kind in figures]
    return Row(
        "packed",
        name,
        ", ".join(f"{kind} {figures[kind]:.1e}" for kind in kinds),
        ", ".join(f"{kind} <= {figures[kind + '_allowed']:.1e}" for kind in kinds),
        all(figures[kind] <= figures[kind + "_allowed"] for kind in kinds),
        figures=figures,
    )


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()
