"""Candidates and their scores, against drawing by the definition and scoring one text at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, Scores
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.passes import Passes, fill
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.search.candidates import draw_candidates, round_trips, top_tokens
from lightning_prompts.search.rounding import Rounding, coordinate_descent
from lightning_prompts.search.scoring import CandidateScorer, Racing, race
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.references import score_plain

TEMPLATES = {
    "prompt first": "{prompt}{question}: {answer}.",
    "example first": "Q: {question}\n{prompt} A: {answer}.",
    "infill": "Here are two{prompt} {question} and {answer}",
}
PAIRS = [("hot", "cold"), ("unquestionably so", "questionably"), ("in", "out"), ("a", "b"), ("day one", "night")]


def examples(name: str) -> list[Example]:
    template = Template(TEMPLATES[name])
    return [template.render({"question": question, "answer": answer}) for question, answer in PAIRS]


def rows_of(lm: FrozenLM, name: str, length: int) -> list[Row]:
    return lm.encode(examples(name), length, with_end=True)


def candidates_of(lm: FrozenLM, count: int, length: int) -> torch.Tensor:
    return torch.randint(40, 120, (count, length), generator=torch.Generator().manual_seed(0)) % lm.vocabulary


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2", "gemma3", "mistral"])
def test_a_grid_of_scores_equals_one_text_at_a_time(shape: str, name: str, shapes: Callable[[str], FrozenLM]) -> None:
    lm = shapes(shape)
    candidates = candidates_of(lm, 6, 9)
    scores = CandidateScorer(lm).score(rows_of(lm, name, 9), candidates)
    assert scores.nll.shape == (6, 5)
    for c, ids in enumerate(candidates):
        for n, example in enumerate(examples(name)):
            with torch.no_grad():
                alone = score_plain(lm, [example], lm.embed(ids))
            assert scores.nll[c, n] == pytest.approx(alone.nll.item(), abs=1e-4)
            assert scores.greedy[c, n] == alone.greedy[0]
            assert scores.tokens[c, n] == alone.tokens[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_passes_of_any_size_agree(name: str, tiny: FrozenLM) -> None:
    rows, candidates = rows_of(tiny, name, 4), candidates_of(tiny, 7, 4)
    whole = CandidateScorer(tiny).score(rows, candidates)
    pieces = CandidateScorer(tiny, memory_mb=1e-3).score(rows, candidates)
    assert torch.allclose(whole.nll, pieces.nll, atol=1e-5)
    assert torch.allclose(whole.end_nll, pieces.end_nll, atol=1e-5)


def test_what_candidates_or_examples_share_runs_once(tiny: FrozenLM) -> None:
    P, C = 20, 8
    candidates = candidates_of(tiny, C, P)
    candidates[:, 0] = torch.arange(C) + 40  # nothing in common
    tokens = {}
    for name in ("prompt first", "example first"):
        before = tiny.tokens_forwarded
        CandidateScorer(tiny).score(rows_of(tiny, name, P), candidates)
        tokens[name] = tiny.tokens_forwarded - before
    texts = [(len(question), len(f" {answer}.") - 1) for question, answer in PAIRS]  # bytes are tokens
    assert tokens["prompt first"] == C * P + C * sum(len(": ") - 1 + q + a for q, a in texts)
    shared = len("Q: ") + sum(q + len("\n") for q, _ in texts)
    assert tokens["example first"] == shared + C * sum(P + len(" A:") + a for _, a in texts)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_out_of_memory_halves_the_pass_and_changes_no_score(
    error: Exception, tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows, candidates = rows_of(tiny, "prompt first", 4), candidates_of(tiny, 8, 4)
    expected = CandidateScorer(tiny).score(rows, candidates).nll
    sizes = []
    real = FrozenLM.score_rows

    def small_memory(lm: FrozenLM, given: list[Row], prompt: torch.Tensor, group: int | None = None) -> Scores:
        sizes.append(len(given) // len(rows))
        if sizes[-1] > 2:
            raise error
        return real(lm, given, prompt, group)

    monkeypatch.setattr(FrozenLM, "score_rows", small_memory)
    scorer = CandidateScorer(tiny)
    with caplog.at_level(logging.WARNING):
        found = scorer.score(rows, candidates).nll
    assert torch.allclose(found, expected, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert "2 candidates at a time" in caplog.text
    sizes.clear()
    scorer.score(rows, candidates)
    assert sizes == [2, 2, 2, 2], "what did not fit once is not tried again"


def test_another_error_is_not_taken_for_want_of_memory(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Scores:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(FrozenLM, "score_rows", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        CandidateScorer(tiny).score(rows_of(tiny, "prompt first", 4), candidates_of(tiny, 4, 4))


@pytest.mark.parametrize("objective", [Likelihood(), Likelihood("tokens", end_weight=0.5)])
def test_a_candidate_s_loss_is_the_objective_s(objective: Likelihood, tiny: FrozenLM) -> None:
    rows, candidates = rows_of(tiny, "infill", 4), candidates_of(tiny, 5, 4)
    losses = race(CandidateScorer(tiny), rows, candidates, objective, None)
    for loss, filled in zip(losses, fill(rows, candidates.tolist()), strict=True):
        assert loss.item() == pytest.approx(float(objective(tiny.score_rows(filled, torch.empty(0, 32)))), abs=1e-5)


def test_a_race_is_won_by_an_exact_score(tiny: FrozenLM) -> None:
    rows, candidates = rows_of(tiny, "prompt first", 4) * 4, candidates_of(tiny, 16, 4)
    scorer, objective = CandidateScorer(tiny), Likelihood()
    exact = race(scorer, rows, candidates, objective, None)
    raced = race(scorer, rows, candidates, objective, Racing(first=4, error=0.4))
    out = torch.isinf(raced)
    assert 0 < out.sum() < 16
    assert torch.allclose(raced[~out], exact[~out], atol=1e-5)


def test_of_two_candidates_the_loser_of_a_draw_is_dropped_as_often_as_stated() -> None:
    """Two that are equal on the whole batch; one of them leads by chance."""
    torch.manual_seed(0)
    racing, examples, seen, dropped, tries = Racing(first=8, error=0.1), 32, 8, 0, 4000
    for _ in range(tries):
        losses = torch.randn(2, examples)
        losses[1] += losses[0].mean() - losses[1].mean()  # equal on the whole batch
        dropped += int((~racing.remaining(losses[:, :seen], examples)).sum())
    # One of the two leads by chance; the other is dropped when it lags by more than the quantile, on either side.
    assert dropped / tries <= 2 * 0.1 + 0.04  # the normal quantile is a little small for a deviation of 8 numbers
    assert dropped / tries > 0.1


def test_how_often_the_best_of_many_is_dropped() -> None:
    """What the docstring of `Racing` says about 64 equally good candidates."""
    torch.manual_seed(0)
    racing, examples, dropped, lost, tries = Racing(), 32, 0, 0.0, 300
    for _ in range(tries):
        losses = torch.randn(64, examples)
        alive = torch.arange(64)
        for seen in (8, 16):
            alive = alive[racing.remaining(losses[alive, :seen], examples)]
        means = losses.mean(-1)
        dropped += int(means.argmin() not in alive)
        lost += float(means[alive].min() - means.min())
    assert 0.2 < dropped / tries < 0.4
    assert lost / tries < 0.05, "of a standard deviation of 1"


def test_a_race_counts_what_candidates_cost_beside(tiny: FrozenLM) -> None:
    rows, candidates = rows_of(tiny, "prompt first", 4) * 4, candidates_of(tiny, 16, 4)
    scorer, objective = CandidateScorer(tiny), Likelihood()
    exact = race(scorer, rows, candidates, objective, None)
    offsets = torch.full((16,), 50.0)
    offsets[int(exact.argmax())] = 0.0  # what the examples like least is cheapest
    raced = race(scorer, rows, candidates, objective, Racing(first=4, error=0.4), offsets)
    assert int(raced.argmin()) == int(exact.argmax())
    assert raced.min().item() == pytest.approx(exact.max().item(), abs=1e-5)
    assert torch.allclose(race(scorer, rows, candidates, objective, None, offsets), exact + offsets)


def test_the_leader_stays_and_a_hopeless_candidate_goes() -> None:
    base, noise = torch.linspace(0, 1, 8), torch.tensor([0.3, -0.3] * 4)
    losses = torch.stack([base, base + 5 + noise, base + 0.01 + noise])
    assert Racing().remaining(losses, 32).tolist() == [True, False, True]


@pytest.mark.parametrize("settings", [{"first": 1}, {"error": 0.0}, {"error": 0.6}])
def test_racing_is_checked(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"racing\."):
        Racing(**settings)  # type: ignore[arg-type]


def test_top_tokens_are_those_of_the_largest_decrease() -> None:
    gradient = torch.tensor([[3.0, -1.0, -5.0, 0.0], [0.0, 1.0, 2.0, -3.0]])
    allowed_ids = torch.tensor([True, True, False, True])
    assert top_tokens(gradient, allowed_ids, 2).tolist() == [[1, 3], [3, 0]]


@pytest.mark.parametrize("n_replace", [1, 2, 5])
def test_candidates_swap_as_many_tokens_as_they_may(n_replace: int) -> None:
    ids = torch.zeros(3, dtype=torch.long)
    top = torch.arange(1, 31).view(3, 10)
    drawn = draw_candidates(ids, top, 500, n_replace, torch.Generator().manual_seed(0))
    changed = (drawn != ids).sum(-1)
    assert set(changed.tolist()) == set(range(1, min(n_replace, 3) + 1))
    assert len(torch.unique(drawn, dim=0)) == len(drawn) <= 500
    for p in range(3):
        assert set(drawn[:, p].tolist()) == {0, *top[p].tolist()}, "every token of every position is tried, no other"
    again = draw_candidates(ids, top, 500, n_replace, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_a_swap_for_the_same_token_is_no_candidate() -> None:
    ids = torch.tensor([4, 5])
    drawn = draw_candidates(ids, ids[:, None], 10, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (0, 2)


def test_prompts_that_text_cannot_carry_do_not_survive(real: FrozenLM) -> None:
    whole = real.encoder.tokens(" the cat")
    parts = real.encoder.tokens(" t") + real.encoder.tokens("he")
    assert real.text(parts) == " the"
    candidates = torch.tensor([whole, [*parts][:2]])
    assert round_trips(real, candidates).tolist() == [True, False]


def test_readable_tokens_are_words(real: FrozenLM) -> None:
    allowed_ids, readable = allowed_tokens(real), allowed_tokens(real, readable=True)
    for text in ("<|endoftext|>", "<|im_start|>", "<repo_name>", "<file_sep>", "<jupyter_start>"):
        token = real.tokenizer.convert_tokens_to_ids(text)
        assert real.text([token]) == text
        assert not allowed_ids[token], text
    assert not (readable & ~allowed_ids).any()
    word, digit = real.encoder.tokens(" cat")[0], real.encoder.tokens("7")[0]
    assert readable[word]
    assert allowed_ids[digit]
    assert not readable[digit]
    texts = [real.text([token]) for token in readable.nonzero()[:500, 0].tolist()]
    assert all(text.strip() and text.isascii() for text in texts)


def test_a_prompt_s_own_logits(real: FrozenLM) -> None:
    ids = real.encoder.tokens(" antonyms of each other")
    before = real.encoder.tokens("Here are two")
    logits = real.prompt_logits(before, real.embed(torch.tensor(ids)))
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids))
    expected = real.score_rows([Row(before, ids)], torch.empty(0, real.width)).nll
    assert nll.item() == pytest.approx(expected.item(), abs=1e-5)
    assert math.isfinite(nll.item())


def test_rounding_ends_where_no_single_change_helps(tiny: FrozenLM) -> None:
    rows, objective = rows_of(tiny, "prompt first", 3), Likelihood()
    wanted = torch.randn(3, tiny.vocabulary, generator=torch.Generator().manual_seed(0))
    wanted[:, 90:] = -9.0  # bytes that are no characters by themselves
    scorer, settings = CandidateScorer(tiny), Rounding(top_k=6, sweeps=50)
    ids = coordinate_descent(scorer, rows, wanted, objective, settings)
    top = wanted.topk(6, -1).indices
    assert all(token in allowed for token, allowed in zip(ids, top, strict=True))

    def loss(prompt: torch.Tensor) -> float:
        return float(race(scorer, rows, prompt[None], objective, None))

    best = loss(ids)
    assert best < loss(top[:, 0]) - 1e-4, "better than each position's own favourite"
    for position in range(3):
        for token in top[position]:
            other = ids.clone()
            other[position] = token
            assert loss(other) >= best - 1e-6


def test_passes_fit_into_memory(tiny: FrozenLM) -> None:
    """Four bytes of each activation (8 of the width 32, 3 of the inner width 48), and of three copies of the logits."""
    item = 4 * (10 * (8 * 32 + 3 * 48) + 3 * 2 * tiny.vocabulary)
    assert Passes(tiny, memory_mb=8.0).fitting(tokens=10, logits=2) == 8 * 2**20 // item
    assert Passes(tiny, memory_mb=1e-6).fitting(tokens=10, logits=2) == 1
