"""The packed path against two references: the padded path, and one row at a time with eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prompts.datamodules import Antonyms
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, layout
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.lm.plan import Plan
from lightning_prompts.objectives import Likelihood
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.models import SHAPES
from support.references import score_plain

Models = Callable[[str], FrozenLM]


def make_prompt(lm: FrozenLM, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = lm.embedding_matrix().float().std()
    return (torch.randn(*shape, lm.width, generator=generator) * scale).requires_grad_()


def one_by_one(lm: FrozenLM, examples: Sequence[Example], prompt: Tensor) -> Tensor:
    """Independent of everything in `lightning_prompts.lm.attention`: a model of its own, eager, no batch, no mask."""
    if lm.name == LMConfig().name:
        model = AutoModelForCausalLM.from_pretrained(embedded_folder(lm.name), attn_implementation="eager").eval()
    else:
        config = copy.deepcopy(lm.model.config)  # from_config writes the attention's name into it
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.load_state_dict(lm.model.state_dict())
    embed = model.get_input_embeddings()
    nlls = []
    for b, example in enumerate(examples):
        own = prompt if prompt.dim() == 2 else prompt[b]
        ids = [torch.tensor(lm.encoder.tokens(text), dtype=torch.long) for text in (example.before, example.after)]
        answer = torch.tensor(lm.encoder.tokens(example.answer or ""))
        vectors = torch.cat([embed(ids[0]), own, embed(ids[1]), embed(answer)])
        logits = model(inputs_embeds=vectors[None]).logits[0, -len(answer) - 1 : -1]
        nlls.append(-torch.log_softmax(logits, -1)[torch.arange(len(answer)), answer].mean())
    return torch.stack(nlls)


def gradient(nll: Tensor, prompt: Tensor) -> Tensor:
    return torch.autograd.grad(nll.mean(), prompt)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "explicit"), [("antonyms", True), ("antonyms", False), ("prompt_first", False)])
def test_packed_equals_references(
    shape: str,
    rows: str,
    explicit: bool,
    shapes: Models,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not explicit:
        monkeypatch.setattr(layout, "EXPLICIT_LIMIT", 0)
    lm, examples = shapes(shape), request.getfixturevalue(rows)
    prompt = make_prompt(lm, 9)
    packed = lm.score(examples, prompt)
    reference = one_by_one(lm, examples, prompt)
    torch.testing.assert_close(packed.nll, reference, atol=1e-4, rtol=0)
    expected = gradient(reference, prompt)
    assert (gradient(packed.nll, prompt) - expected).norm() / expected.norm() < 1e-4
    for padding in ("left", "right"):
        plain = score_plain(lm, examples, prompt, padding)
        torch.testing.assert_close(plain.nll, reference, atol=1e-4, rtol=0)
        assert torch.equal(plain.greedy, packed.greedy)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_and_order_change_nothing(shape: str, shapes: Models, antonyms: list[Example]) -> None:
    lm = shapes(shape)
    prompt = make_prompt(lm, 5)
    together = lm.score(antonyms, prompt).nll
    single = torch.cat([lm.score([example], prompt).nll for example in antonyms])
    bucketed = sorted(range(len(antonyms)), key=lambda index: len(antonyms[index].after))
    sorted_nll = torch.cat([lm.score([antonyms[i] for i in bucketed[k : k + 3]], prompt).nll for k in (0, 3, 6)])
    torch.testing.assert_close(single, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(sorted_nll, together[bucketed], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_per_row(shape: str, shapes: Models, antonyms: list[Example]) -> None:
    lm = shapes(shape)
    prompts = make_prompt(lm, len(antonyms), 4)
    packed, reference = lm.score(antonyms, prompts).nll, one_by_one(lm, antonyms, prompts)
    torch.testing.assert_close(packed, reference, atol=1e-4, rtol=0)
    expected = gradient(reference, prompts)
    assert (gradient(packed, prompts) - expected).norm() / expected.norm() < 1e-4
    torch.testing.assert_close(score_plain(lm, antonyms, prompts).nll, reference, atol=1e-4, rtol=0)


def test_empty_prompt(tiny: FrozenLM, antonyms: list[Example]) -> None:
    empty = torch.zeros(0, tiny.width)
    torch.testing.assert_close(tiny.score(antonyms, empty).nll, one_by_one(tiny, antonyms, empty), atol=1e-4, rtol=0)


def test_same_question_different_answers(tiny: FrozenLM) -> None:
    """All context is shared then, and yet the first answer token needs a position that predicts it."""
    template = Template("Is it{prompt} so? {answer}")
    examples = [template.render({"answer": answer}) for answer in ("yes", "no", "yes, certainly")]
    prompt = make_prompt(tiny, 3)
    torch.testing.assert_close(tiny.score(examples, prompt).nll, one_by_one(tiny, examples, prompt), atol=1e-4, rtol=0)


def test_the_real_model(real: FrozenLM, antonyms: list[Example]) -> None:
    prompt = make_prompt(real, 20)
    packed = real.score(antonyms, prompt)
    left, right = (score_plain(real, antonyms, prompt, side) for side in ("left", "right"))
    torch.testing.assert_close(packed.nll, right.nll, atol=1e-4, rtol=0)
    torch.testing.assert_close(left.nll, right.nll, atol=1e-4, rtol=0)
    expected = gradient(right.nll, prompt)
    assert (gradient(packed.nll, prompt) - expected).norm() / expected.norm() < 1e-4
    static = real.embed(torch.tensor(real.encoder.tokens(" antonyms")))
    torch.testing.assert_close(real.score(antonyms, static).nll, one_by_one(real, antonyms, static), atol=1e-4, rtol=0)


def test_a_batch_on_the_real_model(real: FrozenLM) -> None:
    examples = Antonyms().examples("train")[:8]
    prompt = make_prompt(real, 4).detach()
    with torch.no_grad():
        together = real.score(examples, prompt).nll
        single = torch.cat([real.score([example], prompt).nll for example in examples])
        by_length = sorted(range(8), key=lambda index: len(examples[index].answer or ""))
        bucketed = torch.cat([real.score([examples[i] for i in by_length[k : k + 4]], prompt).nll for k in (0, 4)])
    torch.testing.assert_close(single, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(bucketed, together[by_length], atol=1e-4, rtol=0)


def test_only_the_needed_tokens_are_run(tiny: FrozenLM, antonyms: list[Example]) -> None:
    before = tiny.tokens_forwarded
    tiny.score(antonyms, make_prompt(tiny, 50))
    shared = len("Here are two") + 50 + len(" ")
    own = sum(len(f"{example.question} and {example.reference}") - 1 for example in antonyms)
    assert tiny.tokens_forwarded - before == shared + own


def test_scores_say_how_many_tokens(tiny: FrozenLM, antonyms: list[Example]) -> None:
    scores = tiny.score(antonyms, make_prompt(tiny, 2))
    assert scores.tokens.tolist() == [len(example.answer or "") for example in antonyms]


def test_too_long_for_the_context_window(tiny: FrozenLM) -> None:
    example = Template("{prompt}{question} {answer}").render({"question": "x" * 240, "answer": "y"}, "my.csv row 5")
    tiny.check_examples([example], 10)
    with pytest.raises(UserError, match=r"my.csv row 5: prompt \(30\), text and answer are 272 tokens"):
        tiny.check_examples([example], 30)


def test_no_answer_to_score(tiny: FrozenLM) -> None:
    example = Template("{prompt}{question} {answer}").render({"question": "x"}, "row 2")
    with pytest.raises(UserError, match="row 2 has no answer to score"):
        tiny.score([example], make_prompt(tiny, 1))


def test_another_attention_is_noticed(antonyms: list[Example]) -> None:
    lm = FrozenLM.load(LMConfig(SHAPES["llama"]))
    lm.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attention implementation"):
        lm.score(antonyms, make_prompt(lm, 2))


def test_the_lm_is_frozen_and_never_trains(tiny: FrozenLM) -> None:
    tiny.train()
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    assert tiny.state_dict() == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_scores_are_close(dtype: str, real: FrozenLM, antonyms: list[Example]) -> None:
    lm = FrozenLM.load(LMConfig(dtype=dtype))  # type: ignore[arg-type]
    prompt, rows = make_prompt(real, 4), antonyms[:3]  # a few tokens: a CPU is slow at float16
    half, full = lm.score(rows, prompt).nll, real.score(rows, prompt).nll
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.15, rtol=0.02)
    ours, theirs = gradient(half, prompt), gradient(full, prompt)
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_flow_through_a_quantised_lm(quantization: str, antonyms: list[Example]) -> None:
    lm = FrozenLM.load(LMConfig(quantization=quantization))  # type: ignore[arg-type]
    prompt = lm.embed(torch.tensor(lm.encoder.tokens(" antonyms"))).detach().requires_grad_()
    rows = antonyms[:3]
    packed, plain = lm.score(rows, prompt).nll, score_plain(lm, rows, prompt).nll
    ours, theirs = gradient(packed, prompt), gradient(plain, prompt)
    assert torch.isfinite(ours).all()
    assert ours.norm() > 0
    # LLM.int8 keeps those columns in half precision in which any token of the pass is large, so that its results depend
    # on what else is in the batch; nf4 quantises weights only.
    similarity = torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert similarity > {"int8": 0.8, "nf4": 0.999}[quantization]
    torch.testing.assert_close(packed, plain, atol={"int8": 1.0, "nf4": 1e-3}[quantization], rtol=0)


def test_the_end_of_answers_is_scored_apart(tiny: FrozenLM) -> None:
    rows = [("hot", "cold"), ("a", "b"), ("over", "under")]
    with_end, without = (
        [Template("{prompt} {q} and {answer}" + end).render({"q": q, "answer": a}) for q, a in rows]
        for end in ("!?", "")
    )
    whole = [Template("{prompt} {q} and {answer}").render({"q": q, "answer": f"{a}!?"}) for q, a in rows]
    prompt = make_prompt(tiny, 3)
    scores, plain, joint = (
        tiny.score(with_end, prompt, with_end=True),
        tiny.score(without, prompt),
        tiny.score(whole, prompt),
    )
    torch.testing.assert_close(scores.nll, plain.nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny.score(with_end, prompt).nll, plain.nll)
    assert torch.equal(scores.tokens, plain.tokens)
    torch.testing.assert_close(
        scores.nll * scores.tokens + 2 * scores.end_nll, joint.nll * joint.tokens, atol=1e-4, rtol=0
    )
    assert torch.equal(tiny.score(with_end, prompt).end_nll, torch.zeros(3))
    torch.testing.assert_close(Likelihood(end_weight=0.5)(scores), plain.nll.mean() + 0.5 * scores.end_nll.mean())
    tokens = Likelihood("tokens", end_weight=0)(scores)
    torch.testing.assert_close(tokens, (plain.nll * plain.tokens).sum() / plain.tokens.sum())


def test_a_chat_answer_ends_with_the_turn(real: FrozenLM) -> None:
    example = Template("{prompt} {question}? {answer}", chat=True).render({"question": "hot", "answer": "cold"})
    assert real.encoder.row(example, 1, with_end=True).end == [real.tokenizer.eos_token_id]


def test_a_plan_runs_each_token_once() -> None:
    contexts = [[7, 8, 9], [7, 8, 5]]
    one_feed = Plan.of(contexts, [[[1, 2], [1, 3]], [[4]]], [], shared_prompt=True)
    assert one_feed.levels == [[[7, 8]], [[9, 1], [5]]], "what is fed ends its row"
    assert one_feed.predicted_by.tolist() == [0, 1, 0, 1, 2]
    assert one_feed.tokens.tolist() == [1, 2, 1, 3, 4]
    assert one_feed.owners.tolist() == [0, 0, 1, 1, 2]
    two_feeds = Plan.of(contexts, [[[1, 2], [3, 4, 6], [3]], [[4]]], [], shared_prompt=True)
    assert two_feeds.levels == [[[7, 8]], [[9], [5]], [[3, 4], [1], [], []]]
    assert [(level, places.tolist()) for level, places in two_feeds.heads] == [(1, [0, 1]), (2, [0, 1, 2])]
    assert two_feeds.predicted_by.tolist() == [0, 4, 0, 2, 3, 0, 1]
    assert (two_feeds.logits, two_feeds.continuations, two_feeds.tokens_to_run) == (5, 4, 7)
