from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM
from lightning_prompts.prompts.initializers import FromText, Hybrid, Initializer, RandomTokens, VocabNormal, Zeros
from lightning_prompts.prompts.soft import ResidualMLP, SoftPrompt


@pytest.mark.parametrize("init", [VocabNormal(), RandomTokens(), FromText("two"), Hybrid("two"), Zeros()])
def test_shape_and_seed(init: Initializer, tiny: FrozenLM) -> None:
    torch.manual_seed(1)
    first = init(tiny, 5)
    torch.rand(7)  # however much randomness was used up before
    assert torch.equal(first, init(tiny, 5))
    assert first.shape == (5, tiny.width)
    assert first.dtype == torch.float32
    torch.manual_seed(2)
    assert torch.equal(first, init(tiny, 5)) == isinstance(init, FromText | Zeros)


def test_vocab_normal_has_the_vocabulary_s_statistics(tiny: FrozenLM) -> None:
    matrix = tiny.embedding_matrix()
    drawn = VocabNormal()(tiny, 4000)
    torch.testing.assert_close(drawn.mean(0), matrix.mean(0), atol=0.1 * float(matrix.std()), rtol=0)
    torch.testing.assert_close(drawn.std(0), matrix.std(0), atol=0, rtol=0.1)


def test_random_tokens_are_rows_of_the_vocabulary(tiny: FrozenLM) -> None:
    ids, similarity = tiny.nearest_tokens(RandomTokens()(tiny, 6))
    torch.testing.assert_close(similarity, torch.ones(6))
    assert not set(ids.tolist()) & set(tiny.tokenizer.all_special_ids)


def test_text_is_repeated_or_cut(tiny: FrozenLM) -> None:
    assert tiny.text(tiny.nearest_tokens(FromText("abc")(tiny, 7))[0]) == "abcabca"
    assert tiny.text(tiny.nearest_tokens(FromText("abc")(tiny, 2))[0]) == "ab"


def test_hybrid_is_text_then_noise(tiny: FrozenLM) -> None:
    ids, similarity = tiny.nearest_tokens(Hybrid("abc")(tiny, 6))
    assert tiny.text(ids[:3]) == "abc"
    assert (similarity[:3] > 0.999).all()
    assert (similarity[3:] < 0.999).all()


def test_empty_text(tiny: FrozenLM) -> None:
    with pytest.raises(UserError, match="initial text is empty"):
        FromText("")(tiny, 3)


def test_reparametrisation_starts_as_the_identity_and_then_matters() -> None:
    initial = torch.randn(3, 8)
    prompt = SoftPrompt(initial, ResidualMLP(hidden=4))
    assert torch.equal(prompt(), initial)
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    for _ in range(2):
        prompt().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(prompt(), prompt.embeddings)
    assert torch.equal(prompt.initial, initial)


def test_nearest_tokens_are_the_most_similar_not_the_least(tiny: FrozenLM) -> None:
    matrix = tiny.embedding_matrix()
    ids, similarity = tiny.nearest_tokens(matrix[[5, 200]] * 3)
    assert ids.tolist() == [5, 200]
    torch.testing.assert_close(similarity, torch.ones(2))


@pytest.mark.parametrize("reparametrization", [None, ResidualMLP()])
def test_checkpoints_stay_small_on_the_real_model(
    reparametrization: ResidualMLP | None, real: FrozenLM, tmp_path: Path
) -> None:
    """Parameters and both of Adam's moments, at the default length."""
    prompt = SoftPrompt(RandomTokens()(real, 20), reparametrization)
    optimizer = torch.optim.AdamW(prompt.parameters())
    prompt().sum().backward()
    optimizer.step()
    torch.save({"prompt": prompt.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 1_000_000
