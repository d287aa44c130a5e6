"""Each estimator against finite differences, enumeration or its definition, on a tiny vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.estimators.relaxations import (
    GumbelSoftmax,
    Projected,
    Relaxation,
    Softmax,
    StraightThrough,
    gumbel_like,
    masked,
)
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import FrozenLM
from lightning_prompts.types import Example

V, D, P = 7, 5, 3
USABLE = torch.tensor([True] * 6 + [False])


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(P, V, generator=torch.Generator().manual_seed(1))


def loss_of(vectors: Tensor) -> Tensor:
    """Anything curved."""
    return (torch.sin(vectors) * torch.arange(1, D + 1)).sum() + (vectors**3).mean()


def gradient(estimator: Relaxation, parameters: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    leaf = parameters.clone().requires_grad_(True)
    torch.manual_seed(5)
    loss_of(estimator.train_vectors(leaf, matrix, USABLE, temperature)).backward()
    return leaf.grad


@pytest.mark.parametrize("estimator", [Softmax(), GumbelSoftmax(), GumbelSoftmax(0.3)])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_a_pathwise_gradient_is_the_finite_difference(
    estimator: Relaxation, temperature: float, matrix: Tensor, scores: Tensor
) -> None:
    found = gradient(estimator, scores, matrix, temperature)

    def value(at: Tensor) -> float:
        torch.manual_seed(5)  # the same noise
        return float(loss_of(estimator.train_vectors(at, matrix, USABLE, temperature)))

    for p in range(P):
        for v in range(V):
            step = torch.zeros(P, V)
            step[p, v] = 1e-2
            assert found[p, v] == pytest.approx((value(scores + step) - value(scores - step)) / 2e-2, abs=2e-3)
    assert (found[:, 6] == 0).all(), "an unusable token gets no gradient"
    assert found.abs().max() > 1e-2


def test_straight_through_runs_the_arg_max_and_learns_by_the_softmax(matrix: Tensor, scores: Tensor) -> None:
    estimator, temperature = StraightThrough(), 0.7
    hard = matrix[scores.masked_fill(~USABLE, -9).argmax(-1)]
    assert torch.allclose(estimator.train_vectors(scores, matrix, USABLE, temperature), hard, atol=1e-6)
    at = hard.clone().requires_grad_(True)
    loss_of(at).backward()
    for p in range(P):  # by definition: dL/dvector, taken at the hard vector, through the softmax's Jacobian
        weights = torch.softmax(masked(scores[p], USABLE) / temperature, -1)
        jacobian = (torch.diag(weights) - weights[:, None] * weights[None]) / temperature
        expected = jacobian @ matrix @ at.grad[p]
        assert torch.allclose(gradient(estimator, scores, matrix, temperature)[p], expected, atol=1e-5)


def test_a_noisy_straight_through_draws_tokens_by_their_probability(matrix: Tensor, scores: Tensor) -> None:
    torch.manual_seed(0)
    counts = torch.zeros(P, V)
    draws = 4000
    for _ in range(draws):
        vectors = StraightThrough(noise=1.0).train_vectors(scores, matrix, USABLE, 1.0)
        counts[torch.arange(P), torch.cdist(vectors, matrix).argmin(-1)] += 1
    expected = torch.softmax(masked(scores, USABLE), -1)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * error + 1e-9).all()


def test_gumbel_softmax_sharpens_into_samples_of_the_softmax(scores: Tensor) -> None:
    """By enumeration: at a low temperature the mean weight of a token is its probability."""
    torch.manual_seed(0)
    draws = torch.stack([GumbelSoftmax().sample(scores, USABLE, 0.01) for _ in range(4000)])
    assert (draws.max(-1).values > 0.9).float().mean() > 0.95
    assert torch.allclose(draws.mean(0), torch.softmax(masked(scores, USABLE), -1), atol=0.04)


def test_noise_is_standard_gumbel_and_finite() -> None:
    torch.manual_seed(0)
    noise = gumbel_like(torch.empty(400_000))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.03)


def test_pez_applies_the_projection_s_gradient_to_the_vectors(matrix: Tensor) -> None:
    vectors = torch.randn(P, D, generator=torch.Generator().manual_seed(3))
    similarity = torch.nn.functional.cosine_similarity(vectors[:, None], matrix[None], dim=-1)
    nearest = similarity[:, :6].argmax(-1)
    assert torch.equal(Projected().tokens(vectors, matrix, USABLE), nearest)
    assert torch.equal(Projected().train_vectors(vectors, matrix, USABLE, 1.0), matrix[nearest])
    at = matrix[nearest].clone().requires_grad_(True)
    loss_of(at).backward()
    assert torch.allclose(gradient(Projected(), vectors, matrix, 1.0), at.grad)


@pytest.mark.parametrize("estimator", [Softmax(), GumbelSoftmax(), StraightThrough(1.0), Projected()])
def test_extreme_scores_and_temperatures_stay_finite(estimator: Relaxation, matrix: Tensor) -> None:
    parameters = estimator.start(torch.tensor([0, 1, 2]), matrix, 1e4)
    for temperature in (1e-3, 1.0, 1e3):
        assert torch.isfinite(gradient(estimator, parameters, matrix, temperature)).all()
        assert torch.isfinite(estimator.relaxed_vectors(parameters, matrix, USABLE, temperature)).all()
    assert estimator.tokens(parameters, matrix, USABLE).tolist() == [0, 1, 2]


def test_the_gradient_by_one_hot_rows_is_the_finite_difference(tiny: FrozenLM, prompt_first: list[Example]) -> None:
    """What the search goes by, through the LM itself."""
    matrix = tiny.embedding_matrix()
    one_hot = torch.nn.functional.one_hot(torch.tensor([65, 66]), tiny.vocabulary).float()
    vectors = (one_hot @ matrix).requires_grad_(True)
    tiny.score(prompt_first, vectors).nll.mean().backward()
    by_token = vectors.grad @ matrix.T
    for p, v in ((0, 70), (1, 120), (1, 66)):
        step = torch.zeros_like(one_hot)
        step[p, v] = 0.05
        up, down = (float(tiny.score(prompt_first, (one_hot + sign * step) @ matrix).nll.mean()) for sign in (1, -1))
        assert float(by_token[p, v]) == pytest.approx((up - down) / 0.1, abs=2e-4)
    assert by_token.abs().max() > 1e-4


@pytest.mark.parametrize("estimator", [Softmax(), GumbelSoftmax(0.5), StraightThrough(), Projected()])
def test_mixed_precision_changes_neither_vectors_nor_tokens(
    estimator: Relaxation, matrix: Tensor, scores: Tensor
) -> None:
    parameters = scores @ matrix if isinstance(estimator, Projected) else scores

    def found() -> list[Tensor]:
        vectors = estimator.train_vectors(parameters, matrix, USABLE, 0.7, torch.Generator().manual_seed(0))
        return [vectors, estimator.scores(parameters, matrix, USABLE)]

    with torch.autocast("cpu", torch.bfloat16):
        mixed = found()
    assert all(map(torch.equal, mixed, found()))


def test_temperatures_fall_by_the_same_factor() -> None:
    schedule = Temperature(2.0, 0.02)
    assert [schedule.at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 0.2, 0.02])


@pytest.mark.parametrize("settings", [{"start": 0.0}, {"end": -1.0}, {"end": 0.0}, {"start": float("nan")}])
def test_a_temperature_is_above_zero(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="a temperature must be above 0"):
        Temperature(**settings)
