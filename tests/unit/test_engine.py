"""Attention in parts, padding to few shapes and replayed passes, each against the plain way."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prompts.lm import FrozenLM, KeyValues, LMConfig, label_scores
from lightning_prompts.lm.attention import packed_attention
from lightning_prompts.lm.cascade import parts_of
from lightning_prompts.lm.config import Attention
from lightning_prompts.lm.failures import first_not_finite
from lightning_prompts.lm.key_values import ahead_of, slot_length
from lightning_prompts.lm.layout import PackedLayout, bucket
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support import recorded_graphs
from support.models import SHAPES

Models = Callable[[str], FrozenLM]
CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 8
LEVELS = {
    "uneven rows": [[7], [3, 5, 2, 9]],
    "even rows": [[7], [5, 5, 5]],
    "rows alone": [[3, 1, 2]],
    "one text": [[9]],
    "groups": [[6], [3, 4], [2, 3, 1, 5]],
    "groups that share nothing more": [[4], [0, 3], [2, 3, 4, 5]],
    "rows without a token of their own": [[2], [5, 0, 3], [1, 2, 0, 3, 1, 1]],
    "long": [[700], [300, 900, 200]],
}


# --- attention --------------------------------------------------------------------------------------------------------


def attend(levels: Sequence[list[int]], attention: Attention, bucketed: bool, past: int) -> list[Tensor]:
    """Outputs and gradients of the tokens that are no padding."""
    draw = torch.Generator().manual_seed(1)
    tokens = sum(map(sum, levels))
    values = [torch.randn(tokens, heads, WIDTH, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    front = [torch.randn(past, KV_HEADS, WIDTH, generator=draw).requires_grad_() for _ in range(2)]
    keys = KeyValues([(front[0], front[1])]) if past else None
    layout = PackedLayout(levels, CPU, keys, attention=attention, bucketed=bucketed)
    own = torch.cat([torch.arange(level.offset, level.offset + level.used) for level in layout.passing])
    placed = []
    for part in values:
        placed.append(torch.randn(layout.tokens, *part.shape[1:], generator=draw))  # padding may hold anything
        placed[-1][own] = part
    query, key, value = (part.requires_grad_() for part in placed[:3])
    output = packed_attention(query, key, value, layout, 0, 0.3)
    upstream = torch.zeros_like(output)  # nothing asks for what padding has put out
    upstream[own] = values[3]
    output.backward(upstream)
    gradients = [part.grad for part in (query, key, value)]
    others = torch.ones(layout.tokens, dtype=torch.bool).index_fill(0, own, False)
    assert all(not part[others].any() for part in gradients if part is not None)
    return [output[own], *(part[own] for part in gradients if part is not None), *(part.grad for part in front if past)]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("attention", ["explicit", "cascade"])
@pytest.mark.parametrize("name", LEVELS)
def test_parts_and_padding_equal_explicit_attention(name: str, attention: Any, bucketed: bool, past: int) -> None:
    expected = attend(LEVELS[name], "explicit", False, past)
    for found, wanted in zip(attend(LEVELS[name], attention, bucketed, past), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_queries_dealt_to_copies_of_keys_equal_explicit_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prompts.lm.cascade.QUERIES_OF_A_COPY", 2)
    layout = PackedLayout([[7], [4, 4]], CPU, attention="cascade")
    assert layout.parts[1][0].copies == 4
    expected = attend([[7], [4, 4]], "explicit", False, 0)
    for found, wanted in zip(attend([[7], [4, 4]], "cascade", False, 0), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_all_levels_in_one_part_are_cut_where_segments_end() -> None:
    layout = PackedLayout([[6], [3, 4], [2, 3, 1, 5]], CPU, attention="cascade", bucketed=True)
    (own,), _ = parts_of(layout.above, layout.passing, together=True)
    separate, _ = parts_of(layout.above, layout.passing, together=False)
    cuts = [
        cut + level.offset for level, part in zip(layout.passing, separate, strict=True) for cut in part.cuts[0][1:]
    ]
    assert own.cuts[0].tolist() == [0, *cuts]
    assert cuts[-1] == layout.tokens
    assert max(own.cuts[0][1:] - own.cuts[0][:-1]) <= own.most_queries


def test_windows_that_hide_something_are_not_left_to_parts() -> None:
    layout = PackedLayout([[7], [3, 400]], CPU, attention="cascade")
    query, value = torch.zeros(layout.tokens, HEADS, WIDTH), torch.zeros(layout.tokens, KV_HEADS, WIDTH)
    assert layout.longest >= 407
    assert not layout.cascades(query, value, 406)
    assert layout.cascades(query, value, layout.longest)
    assert layout.cascades(query, value, None)


def test_parts_are_not_for_values_of_another_width_on_the_cpu() -> None:
    layout = PackedLayout([[700], [3, 400]], CPU)
    query, value = torch.zeros(layout.tokens, 300, 8), torch.zeros(layout.tokens, 300, 4)
    assert layout.cascades(query, torch.zeros_like(query), None)
    assert not layout.cascades(query, value, None)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1023, 1024, 1025, 5000])
def test_buckets_are_few_and_waste_little(count: int) -> None:
    assert count <= bucket(count) <= max(16, count * 1.34)
    assert bucket(bucket(count)) == bucket(count)
    assert len({bucket(n) for n in range(1025, 2049)}) == 8


# --- a whole language model -------------------------------------------------------------------------------------------


def rows(template: str) -> list[Example]:
    made = Template(template)
    pairs = [("hot", "cold"), ("a much longer question", "no"), ("x", "yes and no")]
    return [made.render({"question": question, "answer": answer}) for question, answer in pairs]


TEMPLATES = {
    "prompt first": "{prompt} {question}: {answer}\n",
    "infill": "Here are two{prompt} {question} and {answer}\n",
}
KINDS = ["shared", "one for each row", "keys and values"]


def prompts(lm: FrozenLM) -> dict[str, Tensor | KeyValues]:
    draw = torch.Generator().manual_seed(2)
    scale = lm.embedding_matrix().float().std()
    return {
        "shared": torch.randn(5, lm.width, generator=draw) * scale,
        "one for each row": torch.randn(3, 5, lm.width, generator=draw) * scale,
        "keys and values": lm.key_values(torch.randn(4, lm.width, generator=draw) * scale),
    }


def results(lm: FrozenLM, template: str, kind: str) -> list[Tensor]:
    """Losses, gradients, class scores and texts."""
    examples, prompt = rows(template), prompts(lm)[kind]
    leaves = [prompt] if isinstance(prompt, Tensor) else [part for pair in prompt.layers for part in pair]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=False))
    prompt = leaves[0] if isinstance(prompt, Tensor) else KeyValues(pairs)
    scores = lm.score(examples, prompt, with_end=True)
    gradients = torch.autograd.grad(scores.nll.sum() + scores.end_nll.sum(), leaves)
    labels = (("yes",), ("no", "nope"))
    scored = label_scores(lm, [replace(example, labels=labels) for example in examples], prompt).log_probs
    texts = lm.generate_tokens(lm.encode(asked(examples), slot_length(prompt), ahead=ahead_of(prompt)), prompt, 6)
    return [scores.nll.detach(), *gradients, scored, torch.tensor([[len(text), sum(text)] for text in texts]).float()]


def asked(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, answer=None) for example in examples]


class Static(FrozenLM):
    """Comes in few shapes, as on CUDA."""

    static = True  # type: ignore[assignment]


def again(lm: FrozenLM, kind: type[FrozenLM] = FrozenLM, **settings: Any) -> FrozenLM:
    """The same weights, run otherwise."""
    return kind(lm.model, lm.tokenizer, lm.name, **settings)


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# The place and the kind of a prompt interact with each other and with the windows of gemma3. What is particular to
# another architecture shows with any prompt.
CASES = [
    *(("gemma3", template, kind) for template in TEMPLATES for kind in KINDS),
    *((shape, "prompt first", "keys and values") for shape in SHAPES if shape != "gemma3"),
    *((shape, "infill", "one for each row") for shape in SHAPES if shape != "gemma3"),
]


@pytest.mark.parametrize(("shape", "template", "kind"), CASES)
def test_every_way_to_run_a_model_gives_the_same(shape: str, template: str, kind: str, shapes: Models) -> None:
    lm = again(shapes(shape), attention="explicit")
    expected = results(lm, TEMPLATES[template], kind)
    for attention, static in (("explicit", Static), ("cascade", FrozenLM), ("cascade", Static)):
        other = again(lm, static, attention=attention, graphs=False)
        check_same(results(other, TEMPLATES[template], kind), expected)
        assert other.usage == lm.usage  # padding is no use


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replayed(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> FrozenLM:
    """A model whose passes are captured and replayed."""
    recorded_graphs.install(monkeypatch)
    return again(tiny, Static, attention="explicit")


def batches() -> list[list[Example]]:
    """Rows of other lengths and tokens, in few shapes."""
    made = Template("Here are two{prompt} {question} and {answer}")
    words = ["hot cold", "big small", "up down", "unkind kind", "able unable", "day night", "in out", "a b"]
    pairs = [dict(zip(("question", "answer"), pair.split(), strict=True)) for pair in words]
    return [[made.render(pair) for pair in pairs[start : start + 4]] for start in (0, 2, 4, 1, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_passes_equal_others(kind: str, tiny: FrozenLM, replayed: FrozenLM) -> None:
    given = prompts(tiny)[kind]
    if isinstance(given, Tensor) and given.dim() == 3:
        given = torch.cat([given, given[:1]])

    def losses(lm: FrozenLM, examples: list[Example], scale: float) -> tuple[Tensor, ...]:
        flat = (given if isinstance(given, Tensor) else given.flatten()).detach() * scale
        flat.requires_grad_()
        prompt = flat if isinstance(given, Tensor) else KeyValues.unflatten(flat, given.widths)
        nll = lm.score(examples, prompt).nll
        return nll.detach(), torch.autograd.grad(nll.mean(), flat)[0]

    for turn in range(2):
        for examples in batches():
            expected = losses(again(tiny, attention="explicit"), examples, 1 + turn / 10)
            for found, wanted in zip(losses(replayed, examples, 1 + turn / 10), expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert replayed.captured is not None
    assert 1 <= replayed.captured <= 3  # of 10 batches


def test_a_graph_of_a_full_batch_replays_one_with_padding_tokens(tiny: FrozenLM, replayed: FrozenLM) -> None:
    def logits(lm: FrozenLM, lengths: list[int]) -> Tensor:
        levels = [[list(range(20, 27))], [list(range(30, 30 + length)) for length in lengths]]
        return lm.logits(*lm.pack(levels, lm.no_prompt()), list(range(13)))

    with torch.no_grad():
        for lengths in ([3, 5], [3, 5], [3, 5], [3, 4], [4, 4]):
            found, expected = logits(replayed, lengths), logits(again(tiny, attention="explicit"), lengths)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert replayed.captured == 1


def test_replayed_generation_equals_other_generation(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    for examples in batches():
        rows = tiny.encode(asked(examples), 5)
        assert replayed.generate_tokens(rows, prompt, 8) == tiny.generate_tokens(rows, prompt, 8)
    assert replayed.captured


def test_a_pass_runs_as_it_is_while_another_waits_for_its_backward_pass(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    assert isinstance(prompt, Tensor)
    prompt.requires_grad_()
    first, second = batches()[0], batches()[0][::-1]
    for _ in range(2):
        replayed.score(first, prompt).nll.sum().backward()
    captured = replayed.captured
    together = replayed.score(first, prompt).nll.sum() + 2 * replayed.score(second, prompt).nll.sum()
    found = torch.autograd.grad(together, prompt)[0]
    plain = tiny.score(first, prompt).nll.sum() + 2 * tiny.score(second, prompt).nll.sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, prompt)[0], atol=1e-6, rtol=1e-5)
    assert replayed.captured == captured == 1


def test_a_discarded_pass_holds_up_no_other(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    assert isinstance(prompt, Tensor)
    prompt.requires_grad_()
    graphs = replayed._graphs
    assert graphs is not None
    for _ in range(3):
        scores = replayed.score(batches()[0], prompt)
        assert graphs.busy == (replayed.captured == 1)
        del scores
        assert not graphs.busy


def test_a_second_backward_pass_is_refused(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    assert isinstance(prompt, Tensor)
    prompt.requires_grad_()
    for _ in range(2):
        replayed.score(batches()[0], prompt).nll.sum().backward()
    loss = replayed.score(batches()[0], prompt).nll.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran twice .* set model\.lm\.graphs to false"):
        loss.backward()


def test_weights_that_move_are_not_read_where_they_were(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graphs.install(monkeypatch)
    own = Static(copy.deepcopy(tiny.model), tiny.tokenizer, "own", attention="explicit")
    prompt = prompts(tiny)["shared"]
    before = [own.score(batches()[0], prompt).nll for _ in range(3)][-1]
    assert own.captured == 1
    own.to(torch.float64).to(torch.float32)
    for weight in own.parameters():  # where the weights are now
        weight.data.mul_(2)
    after = [own.score(batches()[0], prompt).nll for _ in range(3)]
    assert not torch.allclose(after[0], before, atol=1e-3)
    for found in after[1:]:
        torch.testing.assert_close(found, after[0], atol=1e-6, rtol=1e-5)


def test_a_copy_has_graphs_of_its_own(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    expected = [replayed.score(batches()[0], prompt).nll for _ in range(3)][-1]
    twin = copy.deepcopy(replayed)
    assert (replayed.captured, twin.captured) == (1, 0)
    for weight in replayed.parameters():
        assert weight.data_ptr() not in {other.data_ptr() for other in twin.parameters()}
    torch.testing.assert_close(twin.score(batches()[0], prompt).nll, expected, atol=1e-6, rtol=1e-5)


def test_graphs_of_a_validation_are_not_those_of_other_passes_without_gradient(
    tiny: FrozenLM, replayed: FrozenLM
) -> None:
    prompt = prompts(tiny)["shared"]
    expected = tiny.score(batches()[0], prompt).nll
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        for _ in range(3):
            with mode():
                found = replayed.score(batches()[0], prompt).nll
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert replayed.captured == 2


def test_a_pass_is_captured_once_one_of_its_shape_was_followed_back(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    assert isinstance(prompt, Tensor)
    prompt.requires_grad_()
    losses = [replayed.score(batches()[0], prompt).nll.sum() for _ in range(3)]
    assert replayed.captured == 0
    sum(losses).backward()  # type: ignore[union-attr]
    replayed.score(batches()[0], prompt).nll.sum().backward()
    assert replayed.captured == 1


def test_the_least_used_graphs_make_room(tiny: FrozenLM, replayed: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prompts.lm.graphs.MOST_BYTES", 1)
    prompt, graphs = prompts(tiny)["shared"], replayed._graphs
    assert graphs is not None
    captured = []
    for length, passes in ((1, 3), (200, 8), (200, 1), (1, 7), (1, 1)):
        rows = [Template("{prompt} {question} {answer}").render({"question": "a" * length, "answer": "so"})]
        for _ in range(passes):
            torch.testing.assert_close(replayed.score(rows, prompt).nll, tiny.score(rows, prompt).nll)
        captured.append(replayed.captured)
        assert len(graphs._known) == 1
    assert captured == [1, 1, 2, 2, 3]  # the second shape waits for eight passes, as the first one does when it is back


def test_modules_can_be_watched_although_passes_are_replayed(tiny: FrozenLM, replayed: FrozenLM) -> None:
    prompt = prompts(tiny)["shared"]
    for _ in range(3):
        replayed.score(batches()[0], prompt)
    broken = replayed.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    kept = broken.data.clone()
    try:
        broken.data[0, 0] = float("nan")
        found = first_not_finite(replayed, lambda: replayed.score(batches()[0], prompt))
    finally:
        broken.data.copy_(kept)
    assert found == "model.model.layers.1.mlp.up_proj"
    assert replayed.captured == 1


def test_what_cannot_be_captured_runs_as_before(
    tiny: FrozenLM, replayed: FrozenLM, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompts(tiny)["shared"]
    layer = next(module for name, module in tiny.model.named_modules() if name.endswith("layers.1"))

    def ask(module: Any, given: tuple[Tensor, ...]) -> None:
        assert given[0].sum().item() != 0.5

    asking = layer.register_forward_pre_hook(ask)
    try:
        with caplog.at_level(logging.WARNING):
            found = [replayed.score(batches()[0], prompt).nll for _ in range(4)]
    finally:
        asking.remove()
    for one in found:
        torch.testing.assert_close(one, tiny.score(batches()[0], prompt).nll, atol=1e-6, rtol=1e-5)
    assert replayed.captured is None
    assert [record.message.split(" (")[0] for record in caplog.records] == ["CUDA graphs are switched off"]


def test_graphs_make_room_when_memory_runs_out(
    tiny: FrozenLM, replayed: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(tiny)["shared"]
    for _ in range(2):
        replayed.score(batches()[0], prompt)
    assert replayed.captured == 1
    graphs, forward = replayed._graphs, replayed._logits
    assert graphs is not None
    calls = []

    def tight(*given: Any) -> Tensor:
        calls.append(len(given))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*given)

    monkeypatch.setattr(graphs, "_forward", tight)
    longer = [Template("{prompt} {question} {answer}").render({"question": "why " * 30, "answer": "so"})]
    torch.testing.assert_close(replayed.score(longer, prompt).nll, tiny.score(longer, prompt).nll)
    assert len(calls) == 2
    assert replayed.captured is None


def test_methods_that_train_weights_of_the_model_are_never_replayed(tiny: FrozenLM) -> None:
    own = FrozenLM(copy.deepcopy(tiny.model), tiny.tokenizer, "own")
    assert own._can_replay()
    next(own.model.parameters()).requires_grad_()
    assert not own._can_replay()


def test_settings_reach_the_model() -> None:
    lm = FrozenLM.load(LMConfig(SHAPES["llama"], attention="cascade", graphs=False, compile=False))
    assert (lm.attention, lm._graphs, lm._compile) == ("cascade", None, False)
    assert not lm.static


def test_a_layout_can_be_printed() -> None:
    layout = PackedLayout([[7], [3, 5, 2]], CPU, bucketed=True)
    assert repr(layout) == "PackedLayout(1 x at most 7 tokens; 3 x at most 8 tokens; 17 tokens and 6 of padding)"
