"""Refiners: their parts, what each estimator lets through, and the hidden states they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_prompts.datamodules import Antonyms, QuestionAnswer
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.relaxations import (
    Argmax,
    GradientEstimator,
    GumbelSoftmax,
    Projected,
    Soft,
    Softmax,
    StraightThrough,
)
from lightning_prompts.lm import FrozenLM, LMConfig, Query, Server, StateStore
from lightning_prompts.lm.state_store import _TOKENS_PER_PASS
from lightning_prompts.methods import RefinerTuning, RelaxedPromptTuning
from lightning_prompts.objectives import BertScoreLoss, Likelihood, WeightedSum
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.refiners.heads import Factored, Full, Head, Tied
from lightning_prompts.refiners.networks import MLPRefiner, RefinerNetwork, TransformerRefiner, masked_mean
from lightning_prompts.refiners.refiner import ScoreRefiner, VectorRefiner
from lightning_prompts.types import Example
from support import forks
from support.models import TINY
from support.training import data, trainer

LM = LMConfig(TINY)
NETWORKS = [MLPRefiner(8), TransformerRefiner(8, 2, 2)]
QUESTIONS = ["hot", "What is two and two?", "a much longer question than the others", "hot"]


def refiner(**settings: Any) -> RefinerTuning:
    return RefinerTuning(**{"length": 3, "refiner": MLPRefiner(8), "lm": LM, "max_new_tokens": 2, **settings})


# --- networks and heads ----------------------------------------------------------------------------------------------


def test_padding_does_not_count_in_the_mean() -> None:
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = masked_mean(states, mask)
    assert torch.allclose(found[0], states[0].mean(0))
    assert torch.allclose(found[1], states[1, :2].mean(0))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: type(network).__name__)
def test_features_do_not_depend_on_padding_or_neighbours(network: RefinerNetwork) -> None:
    torch.manual_seed(0)
    module = network.build(6, 3)
    states = torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    together = module(states, mask)
    alone = module(states[1:, :2], mask[1:, :2])
    assert together.shape == (2, 3, network.features)
    assert torch.allclose(together[1:], alone, atol=1e-5)


def test_transformer_positions_differ() -> None:
    torch.manual_seed(0)
    features = TransformerRefiner(8, 1, 2).build(6, 3)(torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool))
    assert not torch.allclose(features[0, 0], features[0, 1])


@pytest.mark.parametrize("head", [Tied(), Factored(4), Full()], ids=lambda head: type(head).__name__)
def test_a_head_is_as_large_as_it_says_and_starts_at_zero(head: Head) -> None:
    module = head.build(8, 3, 6, 11)
    assert sum(parameter.numel() for parameter in module.parameters()) == head.size(8, 3, 6, 11)
    scores = module(torch.randn(2, 3, 8), torch.randn(11, 6))
    assert scores.shape == (2, 3, 11)
    assert torch.equal(scores, torch.zeros_like(scores))


def test_the_full_head_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match=r"164,480,000|164,\d{3},\d{3} parameters \(256 features x 20 positions"):
        Full().build(256, 20, 4096, 32_000)


def test_a_vector_refiner_starts_at_its_base_and_stays_near() -> None:
    torch.manual_seed(0)
    base = torch.randn(3, 6)
    module = VectorRefiner(base, 0.5, MLPRefiner(8), Tied(), 6, scale=2.0)
    states, mask = torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool)
    assert torch.equal(module(states, mask), base.expand(4, -1, -1))
    torch.nn.init.normal_(module.head.linear.weight, std=100.0)
    moved = (module(states, mask) - base).abs()
    assert 0.9 < moved.max() <= 1.0 + 1e-6, "at most scale * size"


def test_a_tied_score_is_the_product_with_the_embeddings_directions() -> None:
    torch.manual_seed(0)
    matrix, base = torch.randn(11, 6), torch.randn(3, 11)
    module = ScoreRefiner(base, matrix, MLPRefiner(8), Tied(), 6)
    torch.nn.init.normal_(module.head.linear.weight)
    states, mask = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    vectors = module.head.vectors(module.network(states, mask))
    for b in range(2):
        for p in range(3):
            for v in range(11):
                wanted = base[p, v] + vectors[b, p] @ (matrix[v] / matrix[v].norm())
                assert module(states, mask)[b, p, v].item() == pytest.approx(wanted.item(), abs=1e-4)


# --- training --------------------------------------------------------------------------------------------------------

LIKELIHOOD, BERTSCORE = Likelihood(), BertScoreLoss(layer=2)
SUM = WeightedSum([Likelihood(), BertScoreLoss(layer=-1)], [1.0, 0.5])


# An objective scores prompts in the same way, whatever they come from: vectors and tokens have each objective.
@pytest.mark.parametrize(
    ("estimator", "head", "network", "objective"),
    [
        pytest.param(Soft(), Tied(), NETWORKS[0], LIKELIHOOD, id="soft-mlp"),
        pytest.param(Soft(), Tied(), NETWORKS[0], BERTSCORE, id="soft-mlp-bertscore"),
        pytest.param(Soft(), Tied(), NETWORKS[1], SUM, id="soft-transformer-sum"),
        pytest.param(StraightThrough(), Factored(4), NETWORKS[1], SUM, id="straight-through-sum"),
        pytest.param(GumbelSoftmax(), Full(), NETWORKS[0], BERTSCORE, id="gumbel-bertscore"),
        pytest.param(Softmax(), Tied(), NETWORKS[0], LIKELIHOOD, id="softmax"),
    ],
)
def test_every_estimator_trains_every_part_and_comes_back(
    estimator: GradientEstimator, head: Head, network: RefinerNetwork, objective: Any, tmp_path: Path
) -> None:
    L.seed_everything(0)
    settings = {"estimator": estimator, "head": head, "refiner": network, "objective": objective}
    model = refiner(**settings)
    model.configure_model()
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    frozen = [value.clone() for value in model.lm.parameters()]
    fit = trainer(tmp_path, max_steps=4)
    fit.fit(model, datamodule=data())
    for name, value in model.named_parameters():
        if name in before:
            assert torch.isfinite(value).all(), name
            # MultiheadAttention's key bias shifts all scores alike, so it has no gradient but rounding.
            assert not torch.equal(value, before[name]) or "in_proj_bias" in name, f"{name} was not trained"
    assert all(torch.equal(a, b) for a, b in zip(model.lm.parameters(), frozen, strict=True))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {*before} | ({"refiner.initial"} if isinstance(estimator, Soft) else set())
    again = refiner(**settings)
    results = [
        trainer(tmp_path).test(each, datamodule=data(), verbose=False, ckpt_path=path, weights_only=True)[0]
        for each, path in ((model, None), (again, tmp_path / "x.ckpt"))
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert ("test/relaxed_nll" in results[0]) == (not isinstance(estimator, Soft))


def test_through_the_argmax_the_gradient_is_exactly_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    L.seed_everything(0)
    model = refiner(estimator=Argmax(), allow_no_gradient=True)
    model.configure_model()
    before = [value.clone() for value in model.trainable_parameters()]
    gradients: list[Tensor] = []
    model.on_before_optimizer_step = lambda optimizer: gradients.extend(  # type: ignore[method-assign]
        value.grad.clone() for value in model.trainable_parameters()
    )
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit.fit(model, datamodule=data())
    assert len(gradients) == 3 * len(before)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in gradients)
    assert all(torch.equal(a, b) for a, b in zip(model.trainable_parameters(), before, strict=True))
    lines = model.describe().splitlines()
    assert lines[-2].startswith("Nothing will be learned: the arg-max has no derivative")
    assert f"{sum(map(torch.numel, before)):,} weights is exactly zero" in lines[-2]
    assert "StraightThrough and GumbelSoftmax pass a gradient" in lines[-1]


def test_before_training_every_question_has_the_same_prompt(antonyms: list[Example]) -> None:
    for estimator in (Soft(), StraightThrough()):
        model = refiner(estimator=estimator, init=FromText("abc"), cache_states=False)
        model.configure_model()
        prompts = model.prompt_for(antonyms)
        assert prompts.shape == (len(antonyms), 3, 32)
        assert torch.allclose(prompts, model.lm.embed(FromText("abc").token_ids(model.lm)).float(), atol=1e-6)


def test_after_training_questions_have_prompts_of_their_own(tmp_path: Path, antonyms: list[Example]) -> None:
    L.seed_everything(0)
    model = refiner(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), cache_states=False)
    trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(model, datamodule=data())
    prompts = model.prompt_for(antonyms)
    assert (prompts[0] - prompts[1]).abs().max() > 1e-4
    rows = model.evaluate(antonyms, prompts)
    assert all(isinstance(row["prompt"], str) for row in rows)
    alone = model.evaluate(antonyms[2:3], model.prompt_for(antonyms[2:3]))
    assert alone[0]["nll"] == pytest.approx(rows[2]["nll"], abs=1e-4)


def test_the_base_has_a_rate_and_a_clipping_of_its_own(tmp_path: Path) -> None:
    L.seed_everything(0)
    model = refiner(base_lr=0.05)
    norms: list[float] = []
    model.on_before_zero_grad = lambda optimizer: norms.extend(  # type: ignore[method-assign]
        float(torch.cat([value.grad.flatten() for value in group["params"] if value.grad is not None]).norm())
        for group in optimizer.param_groups
        if any(value.grad is not None for value in group["params"])
    )
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0, gradient_clip_val=1e-3)
    fit.fit(model, datamodule=data())
    assert [group["initial_lr"] for group in fit.optimizers[0].param_groups] == [0.05, 3e-4]
    # Gradients are zeroed ahead of a step, so these are the first step's.
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3), "each group is clipped by itself"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"estimator": Argmax()}, "passes no gradient: every weight of the refiner would stay as it is"),
        ({"estimator": Projected()}, "has no scores of tokens"),
        ({"scale": -1.0}, "scale must be a finite number of at least 0, got -1.0"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"init_logit": float("inf")}, "init_logit must be a finite number"),
        ({"base_lr": 0.0}, "base_lr must be a finite number above 0"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=-1.0)}, "model.optimizer: Invalid learning rate"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    def build() -> None:
        model = refiner(**settings)
        model.configure_model()
        model.configure_optimizers()

    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": Full()}, "estimator Soft needs head: Tied"),
        ({"estimator": StraightThrough(), "head": Full(100)}, "the full head would have"),
        ({"query": Query(layer=9)}, "query.layer must be from -1 to 3"),
        ({"objective": BertScoreLoss(layer=9)}, "objective.layer must be from -1 to 3"),
        ({"objective": BertScoreLoss(scorer="smollm2-135m-instruct")}, "has another vocabulary"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refiner(**settings).configure_model()


def test_relaxed_prompts_refuse_the_argmax() -> None:
    with pytest.raises(UserError, match="passes no gradient"):
        RelaxedPromptTuning(estimator=Argmax())


def test_what_cannot_be_built() -> None:
    for build, message in (
        (lambda: MLPRefiner(0), "at least 1"),
        (lambda: TransformerRefiner(10, 1, 4), "a multiple of heads"),
        (lambda: Factored(0), "at least 1"),
        (lambda: WeightedSum([], []), "give each a weight"),
        (lambda: WeightedSum([Likelihood()], [0.0]), "must not all be 0"),
        (lambda: WeightedSum([Likelihood()], [float("nan")]), "must be a finite number"),
        (lambda: Likelihood(end_weight=float("nan")), "must be a finite number"),
        (lambda: GumbelSoftmax(float("nan")), "noise must be a finite number"),
        (lambda: StraightThrough(-1.0), "noise must be a finite number"),
        (lambda: Full(float("nan")).build(8, 1, 8, 8), "the full head would have"),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_only_answer_tokens_are_scored_whatever_the_lengths(tiny: FrozenLM) -> None:
    """The labels line up with the logits that predict them, for prompts, questions and answers of any length."""
    examples = [Example("", f": {'q' * n}\nAnswer:", f" {'a' * (4 - n)}", "\n", source=str(n)) for n in range(4)]
    for length in (0, 1, 5):
        prompt = torch.randn(4, length, tiny.width, generator=torch.Generator().manual_seed(0))
        rows = tiny.encode_answers(examples, prompt, with_end=True)
        logits = tiny.answer_logits(rows, prompt)
        assert len(logits) == sum(len(row.answer) + len(row.end) for row in rows)
        start = 0
        for b, row in enumerate(rows):
            fed = row.context + row.answer + row.end
            masked = [False] * len(row.context) + [True] * (len(row.answer) + len(row.end))
            embedded = torch.cat([prompt[b], tiny.embed(torch.tensor(fed[length:]))])
            plain = tiny.model(inputs_embeds=embedded[None], attention_mask=torch.ones(1, len(fed))).logits[0]
            wanted = torch.stack([plain[spot - 1] for spot, kept in enumerate(masked) if kept])
            assert torch.allclose(logits[start : start + len(wanted)], wanted, atol=1e-4)
            start += len(wanted)


# --- hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_kept_states_are_the_lms_own(pooled: bool, layer: int, tiny: FrozenLM, tmp_path: Path) -> None:
    store = StateStore(tiny, Query("Q: ", layer), pooled, tmp_path)
    store.prepare(QUESTIONS, progress=False)
    before = tiny.tokens_forwarded
    states, mask = store(QUESTIONS)
    assert tiny.tokens_forwarded == before, "nothing is computed again"
    head = tiny.encoder.tokens("Q: ", start=True)
    for b, question in enumerate(QUESTIONS):
        ids = torch.tensor([head + tiny.encoder.tokens(question)])
        plain = tiny.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[
            layer
        ][0, len(head) :]
        wanted = plain.mean(0, keepdim=True) if pooled else plain
        assert mask[b].sum() == len(wanted)
        assert torch.allclose(states[b, : len(wanted)], wanted, atol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_layer_is_the_output_of_that_layer_and_the_last_one_is_normed(
    shape: str, shapes: Callable[[str], FrozenLM]
) -> None:
    lm, outputs = shapes(shape), []
    layers = next(part for part in lm.model.modules() if isinstance(part, torch.nn.ModuleList))
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    states = [lm.hidden_states([[1, 2, 3]], lm.no_prompt(), layer)[0] for layer in (*range(1, lm.layers + 1), -1)]
    for hook in hooks:
        hook.remove()
    own = [output[0] if isinstance(output, tuple) else output for output in outputs[: lm.layers]]
    for layer in range(lm.layers - 1):
        torch.testing.assert_close(states[layer], own[layer][0])
    assert torch.equal(states[-2], states[-1])
    assert not torch.allclose(states[-1], own[-1][0], atol=1e-3)


def test_states_that_were_not_kept_are_computed(tiny: FrozenLM, tmp_path: Path) -> None:
    kept, fresh = StateStore(tiny, Query(), False, tmp_path), StateStore(tiny, Query(), False, tmp_path)
    kept.prepare(QUESTIONS[:2], progress=False)
    for one, other in zip(kept(QUESTIONS), fresh(QUESTIONS), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)


def test_many_questions_take_several_passes(tiny: FrozenLM, tmp_path: Path) -> None:
    questions = [f"{n} " + "x" * 90 for n in range(2 * _TOKENS_PER_PASS // 90)]
    store = StateStore(tiny, Query(), True, tmp_path)
    store.prepare(questions, progress=False)
    some = [questions[0], questions[-1], questions[50]]
    assert torch.allclose(store(some)[0], StateStore(tiny, Query(), True, tmp_path)(some)[0], atol=1e-4)


@pytest.mark.parametrize("damage", ["truncated", "empty", "another"])
def test_a_file_that_is_not_whole_is_made_again(damage: str, tiny: FrozenLM, tmp_path: Path) -> None:
    path = StateStore(tiny, Query(), False, tmp_path).prepare(QUESTIONS, progress=False)
    whole = path.read_bytes()
    if damage == "another":
        other = StateStore(tiny, Query(), False, tmp_path / "b").prepare(["something else"], progress=False)
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    (tmp_path / f"{path.name}.abc.part").write_bytes(b"left by a process that was killed")
    store = StateStore(tiny, Query(), False, tmp_path)
    store.prepare(QUESTIONS, progress=False)
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))
    assert torch.isfinite(store(QUESTIONS)[0]).all()


def test_the_file_depends_on_all_that_the_states_depend_on(tiny: FrozenLM, shapes: Any, tmp_path: Path) -> None:
    def name(lm: FrozenLM, query: Query, pooled: bool, questions: list[str]) -> str:
        return StateStore(lm, query, pooled, tmp_path).prepare(questions, progress=False).name

    first = name(tiny, Query(), False, QUESTIONS)
    assert name(tiny, Query(), False, QUESTIONS[::-1]) == first, "not on the order"
    others = [
        name(tiny, Query(), True, QUESTIONS),
        name(tiny, Query(layer=1), False, QUESTIONS),
        name(tiny, Query("other"), False, QUESTIONS),
        name(tiny, Query(), False, QUESTIONS[:2]),
        name(shapes("qwen2"), Query(), False, QUESTIONS),
        name(FrozenLM.load(LMConfig(TINY, dtype="bfloat16")), Query(), False, QUESTIONS),
        name(FrozenLM.load(LMConfig(f"{TINY},rope_theta=500.0")), Query(), False, QUESTIONS),
    ]
    changed = FrozenLM.load(LMConfig(TINY))
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    others.append(name(changed, Query(), False, QUESTIONS))
    assert len({first, *others}) == 1 + len(others)


def _prepare(folder: Path, results: Any) -> None:
    store = StateStore(FrozenLM.load(LMConfig(TINY)), Query(), False, folder)
    path = store.prepare(QUESTIONS, progress=False)
    results.put((str(path), path.stat().st_mtime_ns, float(store(QUESTIONS)[0].sum())))


def test_two_processes_make_one_file(tmp_path: Path) -> None:
    results = forks.context.Queue()
    processes = [forks.start(_prepare, tmp_path, results) for _ in range(2)]
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]


def test_states_of_bad_questions(tiny: FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the question is empty"):
        StateStore(tiny, Query(), True, tmp_path).prepare([""], progress=False)
    with pytest.raises(UserError, match="more than the context window"):
        StateStore(tiny, Query(), True, tmp_path).prepare(["x" * 500], progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write hidden states to"):
        StateStore(tiny, Query(), True, tmp_path / "file" / "below").prepare(["a"], progress=False)


def test_a_question_that_cannot_be_read_is_named_before_anything_starts(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(20)]
    rows[7]["question"] = "x" * 240
    (tmp_path / "own.json").write_text(json.dumps(rows))
    for kept in (True, False):
        own = QuestionAnswer(str(tmp_path / "own.json"), template="{prompt}{answer}", val_size=2, test_size=2)
        with pytest.raises(UserError, match=r"own.json row 8: question 'xxx.*more than the context window"):
            trainer(tmp_path).fit(refiner(cache_states=kept), datamodule=own)


@pytest.mark.parametrize("changed", [{"query": Query("other: ")}, {"scale": 2.0}, {"head": Factored(3)}])
def test_a_checkpoint_of_another_refiner_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    fit = trainer(tmp_path, limit_val_batches=0)
    settings = {"estimator": StraightThrough()} if "head" in changed else {}
    fit.fit(refiner(**settings), datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"the checkpoint is for another (query|refiner)"):
        trainer(tmp_path).test(
            refiner(**settings, **changed), datamodule=data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_training_is_the_same_with_and_without_kept_states(tmp_path: Path) -> None:
    found = []
    for kept in (True, False):
        L.seed_everything(0)
        model = refiner(cache_states=kept)
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(model, datamodule=Antonyms(batch_size=8))
        found.append(torch.cat([value.flatten() for value in model.trainable_parameters()]))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_another_lm_reads_the_questions(tmp_path: Path) -> None:
    L.seed_everything(0)
    small = LMConfig(TINY.replace("hidden_size=32", "hidden_size=16"))
    model = refiner(reader=small)
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    fit.fit(model, datamodule=data())
    examples = data().examples("train")[:4]
    questions = [example.question for example in examples]
    expected = StateStore(FrozenLM.load(small), Query(), True, tmp_path)(questions)[0]
    torch.testing.assert_close(model.states(examples)[0], expected)
    assert expected.shape[-1] == 16
    assert model.prompt_for(examples).shape == (4, 3, 32)
    assert model.tokens_forwarded == model.lm.usage.tokens + model.reader.usage.tokens
    assert model.reader.usage.tokens > 0
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = RefinerTuning.load_from_checkpoint(tmp_path / "x.ckpt")
    torch.testing.assert_close(again.prompt_for(examples), model.prompt_for(examples))
    with pytest.raises(UserError, match="the checkpoint is for another reader"):
        trainer(tmp_path).test(refiner(), datamodule=data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_a_reader_gives_hidden_states() -> None:
    with pytest.raises(UserError, match=r"reader needs hidden states, .* leave out model\.reader\.server"):
        refiner(reader=LMConfig("gpt", server=Server("http://localhost:1")))
