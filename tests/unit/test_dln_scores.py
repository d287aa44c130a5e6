"""Scores and weights of Deep Language Networks against plain loops over single texts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_prompts.dln.cached_lm import CheckpointedCache
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.sharpening import ArgMaxWeights, Sharpening, SoftmaxSharpening, UniformWeights
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, label_scores
from lightning_prompts.methods import DeepLanguageNetwork
from lightning_prompts.template import Template
from support.dln_toys import FORWARD, YES_NO, cached_of, examples, network, plain_mean, slot
from support.models import TINY
from support.odd_tokenizers import save_model
from support.references import alike, plain_classes


def test_cached_scores_equal_one_text_at_a_time(tiny: FrozenLM) -> None:
    prompts = ["Say it.", "", "Answer!"]
    cached = cached_of(tiny)
    classes = cached.class_log_probs(examples(), prompts)
    texts = [[" so", " because of it"], ["", " no"], [" x", " x"], [" it is", " y"]]
    means = cached.log_probs(examples(), prompts, texts)
    for c, prompt in enumerate(prompts):
        for n, example in enumerate(examples()):
            expected = plain_classes(tiny, example, slot(tiny, example, prompt)[1])
            assert torch.allclose(classes[c, n].float(), expected, atol=1e-4)
            for k, text in enumerate(texts[n]):
                assert means[c, n, k].item() == pytest.approx(plain_mean(tiny, example, prompt, text), abs=1e-4)


def test_cached_labels_that_begin_alike_are_those_of_evaluation(tiny: FrozenLM) -> None:
    """And those of texts one at a time, where a set of others stands beside them."""
    given = alike()
    vectors = tiny.embed(torch.tensor(tiny.encoder.tokens("Say it.")))
    for calibrate in (False, True):
        cached = cached_of(tiny, calibrate=calibrate)
        found, wanted = cached.label_scores(given, "Say it."), label_scores(tiny, given, vectors, calibrate)
        assert torch.allclose(found.log_probs, wanted.log_probs, atol=1e-4)
        assert found.nll == pytest.approx(wanted.nll, abs=1e-4)
    top = PlacedLayer(LanguageLayer(), 1, 2)
    given = [*given, *(top.place(example, "It must be so.") for example in given)]  # the layer keeps the task's end
    classes = cached_of(tiny).class_log_probs(given, ["Say it.", ""])
    for c, prompt in enumerate(("Say it.", "")):
        for n, example in enumerate(given):
            assert example.end == "\n"
            expected = plain_classes(tiny, example, slot(tiny, example, prompt)[1])
            assert torch.allclose(classes[c, n, : len(expected)].float(), expected, atol=1e-4)


def test_an_empty_prompt_leaves_no_slot(tmp_path: Path) -> None:
    """Its first text has the tokens that evaluation gives it, with a tokenizer that puts a space in front of a text."""
    lm = FrozenLM.load(LMConfig(save_model(tmp_path, "llama 2", TINY)))
    template = Template("{prompt}Is {question}?{answer}")
    asked = [
        template.render({"question": text, "answer": "yes"}, f"row {n}", labels=YES_NO)
        for n, text in enumerate(("hot cold", "cold"))
    ]
    assert lm.encoder.row(asked[0], 0).context != [token for token in lm.encoder.row(asked[0], 1).context if token >= 0]
    found, wanted = cached_of(lm).label_scores(asked, ""), label_scores(lm, asked, lm.no_prompt())
    assert torch.allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    assert found.nll == pytest.approx(wanted.nll, abs=1e-4)


def test_what_is_known_is_not_asked_again(tiny: FrozenLM) -> None:
    cached = cached_of(tiny)
    doubled = [*examples(), *examples()[:2]]
    before = tiny.tokens_forwarded
    first = cached.class_log_probs(doubled, ["Go.", "Say it.", "Go."])
    once = tiny.tokens_forwarded - before
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[:, :2], first[:, 4:])
    again = cached.class_log_probs(examples(), ["Say it."])
    assert tiny.tokens_forwarded - before == once, "no token more"
    assert torch.equal(again[0], first[1, :4])
    alone = cached_of(tiny)
    before = tiny.tokens_forwarded
    alone.class_log_probs(examples(), ["Go.", "Say it."])
    assert tiny.tokens_forwarded - before == once, "duplicates cost nothing"
    assert cached.calls == alone.calls == 2 * 4 * len(tiny.encoder.label_tokens(examples()[0]).tokens)
    partly = cached.class_log_probs([*examples(), replace(examples()[0], before="New. ")], ["Go.", "Other."])
    assert torch.allclose(partly[0, :4], first[0, :4])


def test_a_cache_goes_through_a_checkpoint(tiny: FrozenLM, tmp_path: Path) -> None:
    cache = CheckpointedCache()
    cached = cached_of(tiny, cache)
    scores = cached.class_log_probs(examples(), ["Go."])
    texts = cached.write(examples(), "Go.", 5)
    torch.save(cache.state(), tmp_path / "cache.ckpt")
    restored = CheckpointedCache()
    restored.load(torch.load(tmp_path / "cache.ckpt", weights_only=True))
    other, before = cached_of(tiny, restored), tiny.tokens_forwarded
    assert torch.equal(other.class_log_probs(examples(), ["Go."]), scores)
    assert other.write(examples(), "Go.", 5) == texts
    assert tiny.tokens_forwarded == before
    assert other.write(examples(), "Go.", 3) != texts, "another length is another question"


def test_a_cache_is_of_its_model(tiny: FrozenLM) -> None:
    cache = CheckpointedCache()
    other = FrozenLM.load(LMConfig(f"{TINY},num_hidden_layers=1"))
    for lm in (tiny, other):
        expected = cached_of(lm).class_log_probs(examples(), ["Go."])
        assert torch.equal(cached_of(lm, cache).class_log_probs(examples(), ["Go."]), expected)
    half = FrozenLM.load(LMConfig(TINY, dtype="bfloat16"))
    config = LMConfig(TINY)
    same = {
        tiny.identity(config),
        tiny.identity(replace(config, dtype="auto")),
        tiny.identity(replace(config, quantization="none", calibrate_labels=True)),
    }
    assert len(same) == 1
    assert (
        len(
            {
                *same,
                half.identity(replace(config, dtype="auto")),
                tiny.identity(replace(config, revision="a")),
                tiny.identity(replace(config, quantization="nf4")),
            }
        )
        == 4
    )


def test_scores_of_another_precision_are_not_looked_up() -> None:
    def build(**settings: object) -> DeepLanguageNetwork:
        method = network(lm=LMConfig(f"{TINY},max_position_embeddings=700", **settings))  # type: ignore[arg-type]
        method.configure_model()
        return method

    checkpoint: dict[str, object] = {}
    first, half, again = build(), build(dtype="bfloat16"), build()
    scores = first.network.lms[-1].class_log_probs(examples(), ["Go."])
    first.on_save_checkpoint(checkpoint)
    expected = half.network.lms[-1].class_log_probs(examples(), ["Go."])
    assert not torch.equal(expected, scores)
    half.cache.scores.clear()
    for method, wanted in ((half, expected), (again, scores)):
        method.on_load_checkpoint(checkpoint)
        assert torch.equal(method.network.lms[-1].class_log_probs(examples(), ["Go."]), wanted)
    assert again.calls == 0, "the same model's are"


def test_a_checkpoint_is_of_its_hidden_layers_models() -> None:
    def build(hidden: LMConfig | None) -> DeepLanguageNetwork:
        method = network(layers=[LanguageLayer("Think.", lm=hidden), LanguageLayer("Say.")])
        method.configure_model()
        return method

    checkpoint: dict[str, object] = {}
    build(LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")).on_save_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"for another hidden layers' model .*num_hidden_layers=1"):
        build(None).on_load_checkpoint(checkpoint)
    build(LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")).on_load_checkpoint(checkpoint)


def test_a_full_cache_forgets_the_oldest(tiny: FrozenLM) -> None:
    cache = CheckpointedCache(entries=6)
    cached = cached_of(tiny, cache)
    first = cached.class_log_probs(examples(), ["Go.", "Say it."])
    assert len(cache.scores) == 6
    before = tiny.tokens_forwarded
    assert torch.allclose(cached.class_log_probs(examples(), ["Say it."])[0], first[1])
    assert tiny.tokens_forwarded == before
    assert torch.allclose(cached.class_log_probs(examples(), ["Go."])[0], first[0], atol=1e-5)
    assert tiny.tokens_forwarded > before


def test_calibration_through_the_cache_is_that_of_evaluation(tiny: FrozenLM) -> None:
    scores = cached_of(tiny, calibrate=True).class_log_probs(examples(), ["Say it."])[0]
    vectors = tiny.embed(torch.tensor(tiny.encoder.tokens("Say it.")))
    assert torch.allclose(scores.float(), label_scores(tiny, examples(), vectors, calibrate=True).log_probs, atol=1e-4)
    assert not torch.allclose(scores.float(), label_scores(tiny, examples(), vectors).log_probs, atol=1e-3)


def test_calibration_knows_no_thoughts(tiny: FrozenLM) -> None:
    layer = PlacedLayer(LanguageLayer(), 1, 2)
    placed = [layer.place(example, "It must be so.") for example in examples()]
    bare = [layer.place(replace(example, fields={**example.fields, "question": ""}), "") for example in examples()]
    cached = cached_of(tiny, calibrate=True)
    own = cached_of(tiny).class_log_probs(placed, ["Go."])[0].exp()
    texts = ("N/A", "[MASK]", "")
    empty = [layer.place(replace(bare[0], fields={"question": text, "answer": "yes"}), text) for text in texts]
    bias = cached_of(tiny).class_log_probs(empty, ["Go."])[0].exp().mean(0)
    odds = own / bias
    expected = (odds / odds.sum(-1, keepdim=True)).log()
    assert torch.allclose(cached.class_log_probs(placed, ["Go."])[0], expected, atol=1e-4)


def test_a_text_beyond_the_window(tiny: FrozenLM) -> None:
    long = FORWARD.render({"question": "x" * 300, "answer": "yes"}, "train.jsonl row 7", labels=YES_NO)
    with pytest.raises(UserError, match=r"train\.jsonl row 7: .*more than the context window"):
        cached_of(tiny).class_log_probs([long], ["Go."])


@pytest.mark.parametrize(
    "sharpening",
    [
        SoftmaxSharpening(),
        SoftmaxSharpening(2.5),
        SoftmaxSharpening(prior=False),
        UniformWeights(),
        ArgMaxWeights(),
        ArgMaxWeights(prior=False),
    ],
)
def test_weights_by_the_definition(sharpening: Sharpening) -> None:
    answer = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.0, -1.0, -4.0, -2.0], [-1.0] * 4], dtype=torch.double)
    prior = torch.tensor([[-2.0, -0.1, -5.0, -1.0], [-3.0, -3.0, -0.5, -9.0], [-1.0] * 4], dtype=torch.double)
    there = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    weights = sharpening(answer, prior, there)
    for b in range(3):
        raw = []
        for k in range(4):
            total = float(answer[b, k]) + (float(prior[b, k]) if getattr(sharpening, "prior", False) else 0.0)
            if isinstance(sharpening, SoftmaxSharpening):
                total *= sharpening.alpha
            raw.append(0.0 if isinstance(sharpening, UniformWeights) else total)
        alive = [k for k in range(4) if there[b, k]]
        if isinstance(sharpening, ArgMaxWeights):
            best = max(alive, key=lambda k: raw[k], default=-1)
            expected = [float(k == best) for k in range(4)]
        else:
            mass = sum(math.exp(raw[k]) for k in alive)
            expected = [math.exp(raw[k]) / mass if k in alive else 0.0 for k in range(4)]
        assert weights[b].tolist() == pytest.approx(expected, abs=1e-9)
