"""The score function estimator against the exact gradient by enumeration, on a tiny vocabulary."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.estimators.baselines import (
    Baseline,
    LeaveOneOut,
    MovingAverage,
    NoBaseline,
    SelfCritical,
    ValueHead,
)
from lightning_prompts.estimators.reinforce import (
    Piecewise,
    TopK,
    TopP,
    ZScore,
    entropy,
    log_probability,
    sample,
    surrogate_loss,
    whiten,
)
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import ReinforceRefiner
from lightning_prompts.objectives.rewards import AnswerLikelihood as Likely
from lightning_prompts.objectives.rewards import BertScore, ExactMatch, Mixture, TokenF1
from lightning_prompts.refiners.networks import MLPRefiner, TransformerRefiner
from lightning_prompts.types import Example
from support.models import TINY
from support.training import data, trainer

V, P, K, DRAWS = 3, 2, 4, 20_000
BASELINES = [NoBaseline(), MovingAverage(), SelfCritical(), LeaveOneOut(), ValueHead(8)]
LM = LMConfig(TINY)


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(P, V, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def table() -> Tensor:
    """A reward for each prompt ``[V, V]``."""
    return 0.5 + 0.5 * torch.rand(V, V, generator=torch.Generator().manual_seed(2))


def exact_gradient(scores: Tensor, table: Tensor) -> Tensor:
    leaf = scores.clone().requires_grad_(True)
    probabilities = leaf.softmax(-1)
    expected = sum(
        probabilities[0, a] * probabilities[1, b] * table[a, b] for a, b in itertools.product(range(V), repeat=2)
    )
    (-expected).backward()
    return leaf.grad


def estimates(baseline: Baseline, scores: Tensor, table: Tensor) -> Tensor:
    """Independent estimates of the gradient, ``[DRAWS, P, V]``."""
    torch.manual_seed(0)
    state = baseline.build(4)
    pooled = torch.randn(1, 4).expand(DRAWS, -1)
    for _ in range(20):  # what it has learned by then
        seen = table[tuple(sample(scores[None], K)[0].T)]
        state.update(seen[None])
    leaf = scores[None].repeat(DRAWS, 1, 1).requires_grad_(True)
    prompts = sample(leaf.detach(), K, torch.Generator().manual_seed(3))
    rewards = table[prompts[..., 0], prompts[..., 1]]
    best = scores.argmax(-1)
    greedy = table[best[0], best[1]].expand(DRAWS)
    advantages = rewards - state(rewards, greedy, pooled)
    (surrogate_loss(log_probability(leaf, prompts), advantages) * DRAWS).backward()
    return leaf.grad


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: type(baseline).__name__)
def test_every_baseline_leaves_the_estimate_unbiased(baseline: Baseline, scores: Tensor, table: Tensor) -> None:
    found = estimates(baseline, scores, table)
    error = found.std(0) / DRAWS**0.5
    assert ((found.mean(0) - exact_gradient(scores, table)).abs() < 3 * error).all()


def test_baselines_make_the_estimate_less_noisy(scores: Tensor, table: Tensor) -> None:
    noise = {type(kind).__name__: estimates(kind, scores, table).var(0).sum().item() for kind in BASELINES}
    # Rewards are all between 0.5 and 1, so most of their size says nothing, and an average takes it off. A mean of the
    # other three prompts is a noisier estimate of the same average: (1 + 1 / (K - 1)) of the variance.
    assert noise["MovingAverage"] < noise["NoBaseline"] / 5
    assert noise["LeaveOneOut"] < noise["NoBaseline"] / 4
    assert noise["MovingAverage"] < noise["LeaveOneOut"] < 1.6 * noise["MovingAverage"]
    assert noise["SelfCritical"] < noise["NoBaseline"] / 2


def test_samples_follow_the_policy(scores: Tensor) -> None:
    drawn = sample(scores[None], 30_000, torch.Generator().manual_seed(0))[0]
    for position in range(P):
        found = torch.bincount(drawn[:, position], minlength=V) / len(drawn)
        assert torch.allclose(found, scores[position].softmax(-1), atol=0.01)


def test_probabilities_and_entropy_are_torchs(scores: Tensor) -> None:
    policy = torch.distributions.Categorical(logits=scores)
    prompts = torch.tensor([[[0, 2], [1, 1], [2, 0]]])
    assert torch.allclose(log_probability(scores[None], prompts)[0], policy.log_prob(prompts[0]).sum(-1))
    assert torch.allclose(entropy(scores[None])[0], policy.entropy().sum())


def test_half_precision_scores_are_taken_in_float32() -> None:
    scores = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.float16)
    assert sample(scores, 2).tolist() == [[[0], [0]]]
    assert log_probability(scores, torch.tensor([[[0]]])).dtype == torch.float32
    assert torch.isfinite(entropy(scores)).all()


def test_supports() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05]).log()
    assert TopK(2).keep(probabilities).tolist() == [1, 3]
    assert TopP(0.75).keep(probabilities).tolist() == [1, 3]
    assert TopP(0.85).keep(probabilities).tolist() == [1, 3, 0]
    assert len(TopP(0.01).keep(probabilities)) == 2, "one token alone is no choice"
    with pytest.raises(UserError, match=r"support.count \(6\) is more than the 5 allowed tokens"):
        TopK(6).keep(probabilities)


def test_shaping_and_whitening() -> None:
    rewards = torch.tensor([[0.2, 0.6], [0.5, 0.5]])
    assert torch.allclose(ZScore()(rewards), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), atol=1e-4)
    assert torch.allclose(Piecewise(0.5, 1.0, 2.0)(rewards), torch.tensor([[0.2, 1.2], [1.0, 1.0]]))
    white = whiten(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert white.mean().abs() < 1e-6
    assert white.std(unbiased=False).item() == pytest.approx(1)
    assert torch.equal(whiten(torch.zeros(2, 2)), torch.zeros(2, 2))


# --- the method ------------------------------------------------------------------------------------------------------


def test_likely_prompts_are_those_that_are_rewarded(tmp_path: Path) -> None:
    """With a reward that one token of the support earns, the policy finds it."""
    L.seed_everything(0)
    model = ReinforceRefiner(1, 8, support=TopK(6), lm=LM, base_lr=0.3, max_new_tokens=1)
    wanted = 4
    model._judge = lambda examples, vectors: [  # type: ignore[method-assign]
        float(torch.equal(vector[0], model.matrix[wanted])) for vector in vectors
    ]
    trainer(tmp_path, max_steps=60, limit_val_batches=0, max_epochs=-1).fit(model, datamodule=data())
    assert model.refiner.base.softmax(-1)[0, wanted] > 0.9
    assert model.prompt_text() == model.lm.text(model.support_ids[wanted : wanted + 1])


# A value head reads the question, as a network does; the other baselines know of rewards alone.
@pytest.mark.parametrize(
    ("baseline", "network"),
    [
        (NoBaseline(), None),
        (MovingAverage(), MLPRefiner(8)),
        (SelfCritical(), TransformerRefiner(8, 1, 2)),
        (LeaveOneOut(), None),
        *((ValueHead(8), network) for network in (None, MLPRefiner(8), TransformerRefiner(8, 1, 2))),
    ],
    ids=lambda part: type(part).__name__,
)
def test_every_baseline_and_network_trains_and_comes_back(
    baseline: Baseline, network: MLPRefiner | None, tmp_path: Path
) -> None:
    L.seed_everything(0)
    settings = {
        "length": 2,
        "samples": 3,
        "refiner": network,
        "baseline": baseline,
        "support": TopK(20),
        "lm": LM,
        "max_new_tokens": 2,
        "reward": Mixture([ExactMatch(), TokenF1(), Likely()], [1, 1, 2]),
    }
    model = ReinforceRefiner(**settings)
    fit = trainer(tmp_path, limit_val_batches=1)
    fit.fit(model, datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = ReinforceRefiner(**settings)
    results = trainer(tmp_path).test(
        again, datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True
    )
    now = trainer(tmp_path).test(model, datamodule=data(), verbose=False)
    assert results[0]["test/nll"] == pytest.approx(now[0]["test/nll"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rewards_are_the_likelihoods_and_are_remembered(
    tiny: FrozenLM, antonyms: list[Example], tmp_path: Path
) -> None:
    model = ReinforceRefiner(2, 2, support=TopK(30), lm=LM, max_new_tokens=2, pass_rows=3)
    model.configure_model()
    prompts = torch.randint(30, (len(antonyms), 3, 2), generator=torch.Generator().manual_seed(0))
    rewards = model.rewards(antonyms, prompts)
    for b, example in enumerate(antonyms):
        for k in range(3):
            nll = tiny.score([example], tiny.embed(model.support_ids[prompts[b, k]])).nll
            assert rewards[b, k].item() == pytest.approx(nll.neg().exp().item(), abs=1e-5)
    before = model.lm.tokens_forwarded
    assert torch.equal(model.rewards(antonyms, prompts), rewards)
    assert model.lm.tokens_forwarded == before, "nothing was run again"


def test_rewards_are_of_all_that_an_answer_is_judged_by(antonyms: list[Example]) -> None:
    model = ReinforceRefiner(2, 2, support=TopK(30), reward=ExactMatch(), lm=LM, max_new_tokens=2)
    model.configure_model()
    prompts = torch.zeros(1, 2, 2, dtype=torch.long)
    example = antonyms[0]
    (written,) = model.lm.generate([example], model.lm.embed(model.support_ids[prompts[0, 0]]), 2)
    for reference, reward in (("no", 0.0), (written, 1.0)):
        assert model.rewards([replace(example, reference=reference)], prompts).tolist() == [[reward, reward]]
    assert len({replace(example, **{name: "x"}).identity for name in ("reference", "stop", "system", "extract")}) == 4


def test_the_support_of_a_checkpoint_counts_and_not_that_of_this_run(tmp_path: Path, antonyms: list[Example]) -> None:
    settings = {"support": TopK(20), "refiner": MLPRefiner(8), "lm": LM, "max_new_tokens": 1}
    fit = trainer(tmp_path, limit_val_batches=0)
    model = ReinforceRefiner(start="Here are two", **settings)
    fit.fit(model, datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    other = ReinforceRefiner(start="Zebra crossing", **settings)
    other.configure_model()
    assert not torch.equal(other.support_ids, model.support_ids)
    trainer(tmp_path).test(other, datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert torch.equal(other.prompt_for(antonyms), model.prompt_for(antonyms))
    assert torch.equal(other.matrix, other.lm.embedding_matrix()[model.support_ids])


def test_rewards_are_looked_for_before_anything_starts() -> None:
    with pytest.raises(UserError, match="must be from 1 to 6, got 9"):
        ReinforceRefiner(lm=LM, support=TopK(20), reward=Mixture([BertScore(layer=9)], [1])).configure_model()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    found = []
    for folder, resume in (("whole", None), ("rest", tmp_path / "whole" / "step=3.ckpt")):
        L.seed_everything(3)
        model = ReinforceRefiner(2, 3, refiner=MLPRefiner(8), baseline=MovingAverage(), support=TopK(20), lm=LM)
        saves = ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        fit = trainer(tmp_path / folder, callbacks=[saves], enable_checkpointing=True, max_steps=6, limit_val_batches=0)
        fit.fit(model, datamodule=data(), ckpt_path=resume, weights_only=True)
        found.append([value.tolist() for value in model.state_dict().values()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"samples": 1}, r"samples \(K\) must be at least 2 for LeaveOneOut, got 1"),
        ({"samples": 0, "baseline": NoBaseline()}, r"samples \(K\) must be at least 1"),
        ({"entropy_weight": float("nan")}, "entropy_weight must be a finite number"),
        ({"pass_rows": 0}, "pass_rows must be a finite number of at least 1"),
        ({"baseline": SelfCritical(), "shaping": ZScore()}, "SelfCritical's is alone"),
        ({"samples": 1, "baseline": NoBaseline(), "shaping": ZScore()}, "ZScore of one prompt is 0"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReinforceRefiner(**settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK(1), "at least 2"),
        (lambda: TopP(0.0), "above 0"),
        (lambda: MovingAverage(1.0), "below 1"),
        (lambda: ValueHead(0), "at least 1"),
        (lambda: Piecewise(right=-1.0), "right must be a finite number"),
    ],
)
def test_bad_parts(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
