"""Measure time and memory of training steps, generation and candidate grids against PEFT and Hugging Face.

The weights are random and made on the device. PEFT repeats the prompt in every row and computes logits at every
position. The times of this project include the packing of the rows. They are measured with CUDA graphs only, as in the
first steps of a run, and with compiled layers, as from step 500 on.
"""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_check_parts.base import ROOT, clean, methods_lm, peak_gib, pretend_device, relative, synchronize
from gpu_check_parts.methods import default_callbacks, small_data, trainer
from gpu_check_parts.rows import Row, Settings
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.attention import ATTENTION_NAME
from lightning_prompts.lm.encoding import Row as TextRow
from lightning_prompts.lm.loading import byte_tokenizer
from lightning_prompts.lm.passes import fill
from lightning_prompts.methods import SoftPromptTuning
from lightning_prompts.search.scoring import CandidateScorer

SECONDS = 120  # for one job
GRADIENT = 0.25  # largest relative difference of two bfloat16 gradients; deeper models have larger differences
WORSE = 1.5  # largest error of our gradient relative to PEFT's, against float32, on short rows

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.2B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
# P, B, tokens of context, tokens of answer, and the target speedup over PEFT.
Step = tuple[int, int, int, int, float]
STEPS: dict[str, tuple[str, Step]] = {
    f"{shape}, P {step[0]}, B {step[1]}, T {step[2] + step[3]}": (shape, step)
    for shape, step in (
        ("tiny", (5, 4, 8, 2, 0.0)),
        ("135M", (20, 32, 8, 2, 10.0)),
        ("1.2B", (20, 32, 8, 2, 5.0)),
        ("7B", (20, 32, 8, 2, 4.0)),
        ("7B", (100, 32, 8, 2, 8.0)),
        ("7B", (100, 128, 32, 8, 1.0)),
        ("7B", (20, 16, 128, 128, 1.0)),
        ("1.2B", (100, 32, 8, 2, 1.0)),
        ("1.2B", (20, 16, 128, 128, 1.5)),
        ("1.2B", (100, 128, 32, 8, 1.0)),
        ("135M", (100, 32, 8, 2, 1.0)),
        ("135M", (20, 16, 128, 128, 1.0)),
        ("135M", (100, 128, 32, 8, 1.0)),
    )
}
GENERATION, GRID, WAITS = "generation", "candidate grid", "waits of the host"
WANTED = {GENERATION: {"135M": 3.0, "1.2B": 3.0, "7B": 1.0}, GRID: {}}


def jobs(settings: Settings) -> list[str]:
    """List steps, generation and grids in an order that makes and compiles each model once."""
    if settings.small:
        return [*(name for name in STEPS if "tiny" in name), f"tiny, {GENERATION}", f"tiny, {GRID}", WAITS]
    names = [WAITS]
    for shape in ("135M", "1.2B", "7B"):
        first, *rest = (name for name, (own, _) in STEPS.items() if own == shape)
        names += [first, f"{shape}, {GENERATION}", *([f"{shape}, {GRID}"] if shape != "7B" else []), *rest]
    return names


def run(name: str, settings: Settings) -> list[Row]:
    """Run one measurement."""
    if name == WAITS:
        return [_waits(settings)]
    shape, _, what = name.partition(", ")
    lm = _model(shape, settings.device)
    lm.unfuse()
    clean(settings.device)
    try:
        if name in STEPS:
            return [_step(name, lm, STEPS[name][1], settings)]
        return [{GENERATION: _generation, GRID: _grid}[what](name, lm, shape, settings)]
    finally:
        clean(settings.device)


_made: dict[str, FrozenLM] = {}


def _model(shape: str, device: str) -> FrozenLM:
    """Make a model with random bfloat16 weights on the device; keep only the last one."""
    if shape not in _made:
        _made.clear()
        torch.compiler.reset()  # drop the compiled code of another model
        clean(device)
        config = AutoConfig.for_model("llama", max_position_embeddings=8192, **SHAPES[shape])
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME)
        _made[shape] = FrozenLM(model.requires_grad_(False).eval(), byte_tokenizer(), shape, compile=False)
        _made[shape].end_tokens = set  # type: ignore[method-assign]  # random texts must not end early
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return _made[shape]


def texts(lm: FrozenLM, length: int, count: int, context: int, answer: int, seed: int = 0) -> list[TextRow]:
    """Make rows of random tokens after a prompt slot of ``length`` tokens."""
    draw, tokens = random.Random(seed), range(100, lm.vocabulary)
    slot = [-1 - p for p in range(length)]
    return [TextRow(slot + draw.choices(tokens, k=context), draw.choices(tokens, k=answer)) for _ in range(count)]


def _timed(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _measure(work: Callable[[], Any], settings: Settings, repeats: int = 8, warm: int = 3) -> dict[str, float]:
    """Measure the seconds of the first call, the median of later calls, and the peak memory in GiB."""
    if settings.small:
        repeats, warm = 2, 1
    clean(settings.device)
    first = _timed(work, settings.device)
    for _ in range(warm - 1):
        work()
    times = [_timed(work, settings.device) for _ in range(repeats)]
    return {"first_s": first, "s": statistics.median(times), "GiB": peak_gib(settings.device)}


def _both(
    lm: FrozenLM, work: Callable[[], Any], settings: Settings, repeats: int = 8, warm: int = 3
) -> dict[str, float]:
    """Run `_measure` with and without compiled layers; ``plain_s`` is the time without."""
    plain = _measure(work, settings, repeats, warm)
    lm.fuse()
    return _measure(work, settings, repeats, warm) | {"plain_s": plain["s"], "plain_first_s": plain["first_s"]}


def _in_words(ours: dict[str, float], theirs: dict[str, float] | None, name: str) -> str:
    if theirs is None:
        return f"ours {ours['s'] * 1e3:.1f} ms, {ours['GiB']:.2f} GiB; {name} out of memory"
    ratio = theirs["s"] / ours["s"]
    plain = f", {ours['plain_s'] * 1e3:.1f} not compiled" if "plain_s" in ours else ""
    return (
        f"{name} / ours {ratio:.2f} ({theirs['s'] * 1e3:.1f} / {ours['s'] * 1e3:.1f} ms{plain}, "
        f"{theirs['GiB']:.2f} / {ours['GiB']:.2f} GiB)"
    )


def _goal(wanted: float) -> str:
    return f"goal {wanted:g}, " if wanted else ""


def _figures(ours: dict[str, float], theirs: dict[str, float] | None, wanted: float, **more: Any) -> dict[str, Any]:
    ratio = None if theirs is None else theirs["s"] / ours["s"]
    return {"ours": ours, "theirs": theirs, "ratio": ratio, "goal": wanted, **more}


# --- a training step --------------------------------------------------------------------------------------------------


def _step(name: str, lm: FrozenLM, step: Step, settings: Settings) -> Row:
    """Measure forward and backward passes of a soft prompt."""
    length, count, context, answer, wanted = step
    batches = [texts(lm, length, count, context, answer, seed) for seed in range(4)]
    ids = torch.randint(100, lm.vocabulary, (length,), generator=torch.Generator().manual_seed(0), device="cpu")
    initial = lm.embedding_matrix()[ids.to(lm.device)].float()
    prompt, turns = torch.nn.Parameter(initial.clone()), itertools.cycle(batches)

    def ours(rows: Sequence[TextRow] | None = None) -> Tensor:
        prompt.grad = None
        return _backward(lm, next(turns) if rows is None else rows, prompt)

    our_time = _both(lm, ours, settings)
    launched = _kernels(ours) if settings.device == "cuda" else None
    our_loss, our_gradient = float(ours(batches[0])), prompt.grad.clone()  # type: ignore[union-attr]
    prompt.grad = None
    lm.unfuse()
    try:
        their_time, their_loss, gradient = _peft_step(lm, initial, batches, settings)
    except torch.OutOfMemoryError:
        their_time = None
    finally:
        lm.model.set_attn_implementation(ATTENTION_NAME)
    if their_time is None:
        clean(settings.device)
        return Row(
            "speed",
            name,
            _in_words(our_time, None, "PEFT"),
            _goal(wanted),
            True,
            figures=_figures(our_time, None, wanted),
        )
    apart, loss_apart = relative(our_gradient, gradient), abs(our_loss - their_loss)
    figures = _figures(our_time, their_time, wanted, gradient=apart, losses=(our_loss, their_loss), kernels=launched)
    said = f"{_in_words(our_time, their_time, 'PEFT')}, gradient {apart:.3f} apart, loss {loss_apart:.3f}"
    expected = f"{_goal(wanted)}gradient <= {GRADIENT}, loss <= 0.05"
    good = apart <= GRADIENT and loss_apart <= 0.05
    if count * (context + answer) <= 320:  # float32 needs twice the memory
        clean(settings.device)
        exact = _exact_gradient(lm, batches[0], initial)
        mine, theirs = relative(our_gradient, exact), relative(gradient, exact)
        figures |= {"from_float32": (mine, theirs)}
        said += f", from float32 {mine:.3f} / PEFT {theirs:.3f}"
        expected += f", ours <= {WORSE} x PEFT's"
        good = good and mine <= WORSE * theirs
    return Row("speed", name, said, expected, good, figures=figures)


def _kernels(work: Callable[[], Any]) -> int:
    """Count the kernels and copies of one call on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA)


def _backward(lm: FrozenLM, rows: Sequence[TextRow], prompt: torch.nn.Parameter) -> Tensor:
    """Compute the mean loss over all answer tokens, and its gradient with respect to the prompt."""
    scores = lm.score_rows(rows, prompt)
    loss = (scores.nll * scores.tokens).sum() / scores.tokens.sum()
    loss.backward()
    return loss.detach()


def _exact_gradient(lm: FrozenLM, rows: Sequence[TextRow], initial: Tensor) -> Tensor:
    """Compute the float32 gradient with this project, whose float32 results the part ``packed`` checks."""
    exact = FrozenLM(copy.deepcopy(lm.model).float(), lm.tokenizer, lm.name)
    prompt = torch.nn.Parameter(initial.clone())
    _backward(exact, rows, prompt)
    assert prompt.grad is not None
    return prompt.grad


def _peft_step(
    lm: FrozenLM, initial: Tensor, batches: Sequence[Sequence[TextRow]], settings: Settings
) -> tuple[dict[str, float], float, Tensor]:
    lm.model.set_attn_implementation("sdpa")
    length = len(initial)
    wrapped = get_peft_model(lm.model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length))
    assert isinstance(wrapped, PeftModel)
    wrapped.to(lm.device).eval()
    prompt = wrapped.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prompt.copy_(initial)
    inputs = [_labelled(rows, length, lm.device) for rows in batches]
    turns = itertools.cycle(inputs)

    def step(given: dict[str, Tensor] | None = None) -> Tensor:
        prompt.grad = None
        loss: Tensor = wrapped(**(next(turns) if given is None else given)).loss
        loss.backward()
        return loss.detach()

    measured = _measure(step, settings)
    return measured, float(step(inputs[0])), prompt.grad.clone()


def _labelled(rows: Sequence[TextRow], length: int, device: torch.device) -> dict[str, Tensor]:
    """Make the inputs of Hugging Face models from texts of equal length, without prompt slots."""
    ids = torch.tensor([row.context[length:] + row.answer for row in rows], device=device)
    labels = torch.full_like(ids, -100)
    answer = len(rows[0].answer)
    labels[:, -answer:] = ids[:, -answer:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# --- generation and grids ---------------------------------------------------------------------------------------------


def _generation(name: str, lm: FrozenLM, shape: str, settings: Settings) -> Row:
    """Measure greedy generation after a prompt."""
    length, count, context, new = (3, 4, 5, 4) if settings.small else (20, 32, 32, 64)
    rows = [TextRow(row.context, []) for row in texts(lm, length, count, context, 1)]
    prompt = lm.embedding_matrix()[torch.arange(200, 200 + length, device=lm.device)].float()
    found: list[list[int]] = []

    def ours() -> None:
        found[:] = lm.generate_tokens(rows, prompt, new)

    our_time = _both(lm, ours, settings, 3, 2)
    lm.unfuse()
    ids = torch.tensor([row.context[length:] for row in rows], device=lm.device)
    inputs = torch.cat([prompt.to(lm.model.dtype)[None].expand(count, -1, -1), lm.embed(ids)], 1)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=lm.device)
    theirs: list[Tensor] = []

    @torch.no_grad()
    def hugging_face() -> None:
        theirs[:] = [
            lm.model.generate(
                inputs_embeds=inputs, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        ]

    lm.model.set_attn_implementation("sdpa")
    try:
        their_time = _measure(hugging_face, settings, 2, 1)
    finally:
        lm.model.set_attn_implementation(ATTENTION_NAME)
    wanted = WANTED[GENERATION].get(shape, 0.0)
    first = sum(one[0] == other[0] for one, other in zip(found, theirs[0].tolist(), strict=True)) / count
    return Row(
        "speed",
        name,
        f"{_in_words(our_time, their_time, 'generate')}, {first:.0%} of first tokens the same",
        f"{_goal(wanted)}first tokens >= 50% (bfloat16, random weights)",
        first >= 0.5 and all(len(text) == new for text in found),
        figures=_figures(our_time, their_time, wanted, same_first_token=first),
    )


def _grid(name: str, lm: FrozenLM, shape: str, settings: Settings) -> Row:
    """Measure scoring of candidate prompts on examples without other common tokens, against batches of 256 rows."""
    length, candidates, count, context, answer = (4, 4, 3, 8, 2) if settings.small else (20, 64, 32, 8, 2)
    rows = texts(lm, length, count, context, answer)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, lm.vocabulary, (candidates, length), generator=draw, device="cpu").to(lm.device)
    scorer = CandidateScorer(lm, memory_mb=4096.0)
    found: list[Tensor] = []

    def ours() -> None:
        found[:] = [scorer.score(rows, ids).nll]

    our_time = _measure(ours, settings, 3, 3)
    lm.release()
    whole = [row for line in fill(rows, ids.tolist()) for row in line]
    inputs = torch.tensor([row.context + row.answer for row in whole], device=lm.device)
    wanted: list[Tensor] = []

    @torch.no_grad()
    def repeated() -> None:
        losses = []
        for part in inputs.split(256):
            logits = lm.model(input_ids=part, logits_to_keep=answer + 1, use_cache=False).logits[:, :-1].float()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), part[:, -answer:].flatten(), reduction="none"))
        wanted[:] = [torch.cat(losses).view(candidates, count, answer).mean(-1)]

    lm.model.set_attn_implementation("sdpa")
    try:
        their_time = _measure(repeated, settings, 2, 1)
    finally:
        lm.model.set_attn_implementation(ATTENTION_NAME)
    apart = (found[0] - wanted[0]).abs().max().item()
    return Row(
        "speed",
        name,
        f"{_in_words(our_time, their_time, 'repeated rows')}, losses {apart:.3f} apart",
        "losses <= 0.1 (bfloat16)",
        apart <= 0.1,
        figures=_figures(our_time, their_time, 0.0, apart=apart),
    )


# --- waits of the host ------------------------------------------------------------------------------------------------


class _Waits(L.Callback):
    """Records the waits of the host before each step of the Trainer."""

    def __init__(self, places: Callable[[], Counter[str]]) -> None:
        """Start without steps."""
        self.places = places
        self.seen: list[Counter[str]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the waits so far."""
        self.seen.append(self.places().copy())


def _waits(settings: Settings) -> Row:
    """Count the waits of a whole training step of a soft prompt with the default callbacks."""
    if settings.device == "cpu":
        return Row("speed", WAITS, "not run: there are no waits on a CPU", ok=None)
    method = SoftPromptTuning(5, lm=LMConfig(methods_lm(settings)))
    folder = settings.scratch / "waits"
    if settings.device == "pretend":
        module = pretend_device()
        seen = _fit(
            lambda: Counter({f"{place} ({kind})": n for (kind, place), n in module.waits.items()}),
            method,
            folder,
            settings,
        )
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                seen = _fit(lambda: _places(caught), method, folder, settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    steps = [later - earlier for earlier, later in itertools.pairwise(seen[1:])]  # skip the setup in the first step
    each = [sum(step.values()) for step in steps]
    total: Counter[str] = sum(steps, Counter())
    return Row(
        "speed",
        WAITS,
        f"{statistics.median(each):g} per training step; "
        + ", ".join(f"{place} {count / len(steps):.1f}" for place, count in total.most_common(6)),
        "goal 0 between two logged steps",
        figures={"each": each, "places": dict(total)},
    )


def _fit(places: Callable[[], Counter[str]], method: SoftPromptTuning, folder: Path, settings: Settings) -> list[Any]:
    watch = _Waits(places)
    fit = trainer(
        folder,
        settings.device,
        max_steps=9,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=[*default_callbacks(method, folder), watch],
    )
    fit.fit(method, datamodule=small_data(settings, 20), weights_only=True)
    return watch.seen


def _places(caught: Sequence[warnings.WarningMessage]) -> Counter[str]:
    """Count the calls of synchronising operations by place."""
    found: Counter[str] = Counter()
    for warning in caught:
        if "synchroniz" in str(warning.message):
            path = Path(warning.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
            found[f"{name}:{warning.lineno}"] += 1
    return found
