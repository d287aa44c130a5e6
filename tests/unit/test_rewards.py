"""Rewards judge as a careful reader would, and BERTScore as its authors' package does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from lightning_prompts.answers import boxed, final_answer, is_correct, number, same_answer, token_f1
from lightning_prompts.callbacks import TextMetrics
from lightning_prompts.datamodules import Addition
from lightning_prompts.dln.network import Answer
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.relaxations import StraightThrough
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.methods import Gepa, ReinforceRefiner
from lightning_prompts.objectives import BertScoreLoss
from lightning_prompts.objectives.bertscore import greedy_matching
from lightning_prompts.objectives.rewards import (
    AnswerLikelihood,
    BertScore,
    ExactMatch,
    Mixture,
    NumericMatch,
    Reward,
    TokenF1,
    _bert_scorer,
)
from lightning_prompts.types import Batch, Example
from support.odd_tokenizers import byte_level

SAME = [
    ("The answer is $1,234.50.", "1234.5"),
    (r"so \boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    (r"so $\boxed 5$.", "5"),
    (r"we get $\boxed 2$ since $x^{10}$", "2"),
    (r"$\boxed{3}$, no, $\boxed\frac12$", "1/2"),
    (r"$\fbox{7}$ of 9", "7"),
    (r"\(\boxed 2.\) since 3 apples", "2"),
    (r"Put it in \boxed as asked: \boxed{7}", "7"),
    (r"I use the \boxed command. \boxed{7}", "7"),
    ("I give it in \\boxed form.\n#### 7", "7"),
    ("1/2", r"\frac12"),
    ("#### 72", "72"),
    ("48/2 = 24\n48 + 24 = 72\n#### 72", "72"),
    ("so x = 72 dollars", "72"),
    ("12 apples and 3 pears", "3"),
    ("The final answer is: 18 miles", "18"),
    (r"\boxed{-5}", "-5"),
    (r"\boxed{x=3}", "3"),
    (r"\boxed{5 cm^2}", "5"),
    (r"\boxed{\text{5 apples}}", "5"),
    ("It lost -$5", "-5"),
    ("−5", "-5"),
    ("18.0", "18"),
    ("1e3", "1000"),
    ("10,000", "10000"),
    ("10{,}000", "10000"),
    (r"50\%", "50"),
    ("50%", "50"),
    ("5 cm^2", "5"),
    ("5cm", "5"),
    ("y = 3", "3"),
    ("(3,4)", "(3, 4)"),
    ("x^2+1", "x^2 + 1"),
    (r"2\sqrt{3}", r"2\sqrt{ 3 }"),
    (r"\boxed{\text{Monday}}", "Monday"),
    (r"\boxed{90^\circ}", "90"),
    (".5", "0.5"),
    (r"3 \frac{1}{2}", "7/2"),
    ("60 km/h", "60"),
    ("60 m/s", "60"),
    ("5 m^2", "5"),
    ("a 3-inch nail", "3"),
    ("It fell to a -5", "-5"),
    ("With x + 5 we get 12", "12"),
    ("10 000", "10000"),
    ("He got 12 answers right.", "12"),
    ("12 correct answers", "12"),
    ("The answer is 42.\nLet me check the answer.", "42"),
    ("The answer is\n42", "42"),
    ("Answer $5", "5"),
    ("Total - 42", "42"),
    ("Profit - $5", "5"),
    ("- $5", "-5"),
]
DIFFERENT = [
    ("-5", "5"),
    ("(3,4)", "(4, 3)"),
    ("abc", "72"),
    ("", "3"),
    (r"\sqrt{3}", "3"),
    ("3", r"\sqrt{3}"),
    ("2x", "2"),
    (r"3 \frac{1}{2}", "1/2"),
    ("72 73", "72"),
    ("1/0", "1"),
    (r"\boxed{", "1"),
    ("0.333", "1/3"),
    ("1234", "1,23"),
    ("7x+2", "3x+2"),
    ("x^2+2", "3x+2"),
    ("x^2 + 2", "2"),
    (r"\boxed{3+5i}", "3-4i"),
    (r"\boxed{4x - 7}", "2x-7"),
    ("2", r"\frac{x}{2}"),
    ("1/2", r"\frac{n+1}{2}"),
    ("5", "x+5"),
    ("5", "5-x"),
    (r"\boxed{x+7}", "7"),
    ("4 2", "42"),
    ("1e999999999", "1"),
    ("2.5e-12345", "2"),
    ("1,500e1000", "1"),
    ("The answer is 12.5h", "12"),
    ("#### 1,200g", "1"),
    ("3/4m", "3"),
    ("$2.5M", "2"),
    ("2", "2.5x"),
    (r"\boxed{-1, 3}", "3"),
    (r"\boxed{(2,5)}", "5"),
    (r"\boxed{10^2}", "10"),
    (r"\boxed{2 \text{ or } 3}", "3"),
]


@pytest.mark.parametrize(("text", "reference"), SAME)
def test_the_same_answer(text: str, reference: str) -> None:
    assert same_answer(text, reference)


@pytest.mark.parametrize(("text", "reference"), DIFFERENT)
def test_not_the_same_answer(text: str, reference: str) -> None:
    assert not same_answer(text, reference)


FORMS = ["{}", "{:,}", "the answer is {}", "#### {:,}", r"\boxed{{{}}}", "{}.0"]


@given(st.integers(-(10**9), 10**9), st.sampled_from(FORMS))
def test_an_integer_is_itself_however_it_is_written(value: int, form: str) -> None:
    assert number(final_answer(form.format(value))) == value
    assert same_answer(form.format(value), str(value))


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_the_comparison(text: str, reference: str) -> None:
    same_answer(text, reference)
    assert 0 <= token_f1(text, reference) <= 1


def test_boxes_may_have_braces_in_them() -> None:
    assert boxed(r"\boxed{1} and \boxed{\frac{a}{b} + {c}} end") == r"\frac{a}{b} + {c}"
    assert boxed("none") is None


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("the cat sat", "a cat sat down", 0.8),
        ("", "", 1.0),
        ("x", "", 0.0),
        ("The dog!", "dog", 1.0),
        ("a b", "c d", 0.0),
        ("1,000", "1000", 1.0),
        ("the U.S.", "us", 1.0),
        ("well-known", "well known", 0.0),
    ],
)
def test_token_f1(text: str, reference: str, value: float) -> None:
    assert token_f1(text, reference) == pytest.approx(value)


def test_rewards_are_functions_of_texts() -> None:
    texts, references = ["cold ", "#### 5", "hot"], ["cold", "5", "cold"]
    assert ExactMatch()(texts, references, []) == [1, 0, 0]
    assert NumericMatch()(texts, references, []) == [1, 1, 0]
    assert TokenF1()(texts, references, []) == [1, 1, 0]
    assert AnswerLikelihood()([], references, [0.1, 0.2, 0.3]) == [0.1, 0.2, 0.3]
    mixed = Mixture([ExactMatch(), AnswerLikelihood()], [1, 3])
    assert mixed(texts, references, [0.4, 0.4, 0.4]) == pytest.approx([0.55, 0.3, 0.3])
    assert mixed.needs_text
    assert mixed.needs_likelihood
    assert not Mixture([AnswerLikelihood()], [2]).needs_text
    assert not Mixture([ExactMatch()], [2]).needs_likelihood


class Unlikelihood(Reward):
    """A user's reward of likelihoods."""

    needs_text = False
    needs_likelihood = True

    def __call__(self, texts: Sequence[str], references: Sequence[str], likelihoods: Sequence[float]) -> list[float]:
        return [1 - value for value in likelihoods]


def by_refiner(reward: Reward, example: Example, text: str) -> float:
    lm = SimpleNamespace(
        generate=lambda *_: [text], score=lambda *_: SimpleNamespace(nll=torch.tensor([0.5]).log().neg())
    )
    method: Any = SimpleNamespace(reward=reward, lm=lm, max_new_tokens=2)
    return ReinforceRefiner._judge(method, [example], torch.zeros(1, 1, 1))[0]


def by_gepa(reward: Reward, example: Example, text: str) -> float:
    network = SimpleNamespace(
        sample_hidden=lambda *_: [],
        place_top=lambda *_: [example],
        answer=lambda *_: [Answer(text, True)],
        answer_log_probs=lambda *_: (torch.tensor([[0.5]]).log(), None),
    )
    method: Any = SimpleNamespace(reward=reward, network=network, map_across_ranks=lambda items, work: work(items))
    method._rate = functools.partial(Gepa._rate, method)
    return Gepa.rollout(method, [example], [""]).scores[0]


def by_callback(reward: Reward, example: Example, text: str) -> float:
    logged: list[float] = []
    method: Any = SimpleNamespace(
        map_across_ranks=lambda items, work: work(items), log_mean=lambda name, value, count: logged.append(value)
    )
    rows = {"rows": [{"generated": text, "answer": example.reference}]}
    TextMetrics([reward]).on_test_batch_end(cast("Any", None), method, rows, Batch([example], "test"), 0)
    return logged[0]


@pytest.mark.parametrize("judge", [by_refiner, by_gepa, by_callback])
def test_rewards_rate_what_exact_match_compares(judge: Callable[[Reward, Example, str], float]) -> None:
    example = Addition(steps=True, max_digits=2, ood_digits=[]).examples("test")[0]
    right = (example.answer or "").strip()
    assert right != example.reference, "the steps stand in front of the result"
    assert is_correct(example, right)
    assert judge(ExactMatch(), example, right) == 1
    assert judge(ExactMatch(), example, f"{right}0") == 0


@pytest.mark.parametrize(("reward", "name"), [(ExactMatch(), "test/text_exact_match"), (TokenF1(), "test/token_f1")])
def test_a_metric_of_texts_replaces_none_of_the_method(reward: Reward, name: str) -> None:
    logged: list[str] = []
    method: Any = SimpleNamespace(
        map_across_ranks=lambda items, work: work(items), log_mean=lambda name, value, count: logged.append(name)
    )
    rows = {"rows": [{"generated": "a", "answer": "a"}]}
    batch = Batch([Example("", "", " a")], "test")
    TextMetrics([reward]).on_test_batch_end(cast("Any", None), method, rows, batch, 0)
    assert logged == [name]


@pytest.mark.parametrize("judge", [by_refiner, by_gepa])
def test_a_users_reward_gets_likelihoods(judge: Callable[[Reward, Example, str], float]) -> None:
    reward = Mixture([Unlikelihood(), ExactMatch()], [1, 0])
    assert judge(reward, Example("", "", " 5", reference="5"), "5") == pytest.approx(0.5)
    with pytest.raises(UserError, match="TextMetrics rates texts only"):
        TextMetrics([reward])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_bad_mixtures(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        Mixture([ExactMatch(), TokenF1()], weights)


# --- BERTScore -------------------------------------------------------------------------------------------------------

TEXTS = ["a cat sat", "the answer is 42", "yes"]
REFERENCES = ["the cat sat down", "42 it is", "no"]


def test_bertscore_of_texts_is_the_packages() -> None:
    import bert_score

    found = BertScore()([*TEXTS, " ", "x"], [*REFERENCES, "x", ""], [])
    from lightning_prompts.objectives.rewards import embedded_scorer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = bert_score.score(TEXTS, REFERENCES, model_type=str(embedded_scorer()), num_layers=6)[2]
    assert found[:3] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert found[3:] == [0.0, 0.0], "empty texts have nothing to compare"


def test_bertscore_models_that_are_not_to_be_had() -> None:
    with pytest.raises(UserError, match="layer of the BERTScore model 'all-minilm-l6-v2' must be from 1 to 6, got 7"):
        BertScore(layer=7)(["a"], ["b"], [])
    with pytest.raises(UserError, match="BERTScore model folder '/no/such/folder' does not exist"):
        BertScore(model="/no/such/folder")(["a"], ["b"], [])


def embedded(lm: FrozenLM, texts: list[str]) -> list[Tensor]:
    return [lm.embedding_matrix()[lm.encoder.tokens(text)] for text in texts]


def test_bertscore_of_certain_distributions_is_the_packages() -> None:
    """The texts' own embeddings through the LM's last layer, and the package on the same model."""
    import bert_score

    lm = FrozenLM.load(LMConfig(dtype="float32"))
    found = BertScoreLoss(layer=-1, lead="").f1(lm, embedded(lm, TEXTS), [lm.encoder.tokens(x) for x in REFERENCES])
    scorer = bert_score.BERTScorer(model_type=str(embedded_folder("smollm2-135m-instruct")), num_layers=30)
    scorer._tokenizer.model_max_length = 512
    from bert_score.utils import get_bert_embedding, greedy_cos_idf, pad_sequence

    def packages(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            get_bert_embedding([text], scorer._model, scorer._tokenizer, scorer._idf_dict or _Ones(), device="cpu")
            for text in texts
        ]
        vectors = pad_sequence([part[0][0] for part in parts], batch_first=True, padding_value=2.0)
        counts = torch.tensor([len(part[0][0]) for part in parts])
        mask = torch.arange(vectors.shape[1]) < counts[:, None]
        return vectors, mask, mask.float()

    wanted = greedy_cos_idf(*packages(REFERENCES), *packages(TEXTS))[2]
    # The package calls a text of two tokens empty, as if both were special ones, and gives it 0.
    kept = torch.tensor([len(lm.encoder.tokens(text)) != 2 for text in TEXTS])
    kept &= torch.tensor([len(lm.encoder.tokens(text)) != 2 for text in REFERENCES])
    assert kept.sum() >= 2
    assert torch.allclose(found[kept], wanted[kept], atol=1e-4)


class _Ones(dict):  # type: ignore[type-arg]
    def __missing__(self, key: int) -> float:
        return 1.0


def test_greedy_matching_by_hand() -> None:
    candidate = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    reference = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    root = 0.5**0.5
    precision, recall, f1 = greedy_matching(
        candidate, torch.tensor([[True, True, False]]), reference, torch.tensor([[True, True]])
    )
    assert precision.item() == pytest.approx((1 + root) / 2)
    assert recall.item() == pytest.approx((1 + root) / 2)
    assert f1.item() == pytest.approx((1 + root) / 2)


def test_the_losss_gradient_is_the_finite_difference(tiny: FrozenLM) -> None:
    loss = BertScoreLoss(layer=2)
    logits = torch.randn(3, tiny.vocabulary, generator=torch.Generator().manual_seed(0))
    references = [tiny.encoder.tokens("cold")]

    def value(at: Tensor) -> Tensor:
        return loss.f1(tiny, [at.softmax(-1) @ tiny.embedding_matrix()], references)[0]

    leaf = logits.clone().requires_grad_(True)
    value(leaf).backward()
    direction = torch.randn(3, tiny.vocabulary, generator=torch.Generator().manual_seed(1))
    step = 1e-3  # the maximum has kinks
    difference = (value(logits + step * direction) - value(logits - step * direction)).item() / (2 * step)
    assert (leaf.grad * direction).sum().item() == pytest.approx(difference, rel=0.02, abs=1e-6)


def test_a_padded_batch_scores_as_each_alone(tiny: FrozenLM) -> None:
    loss = BertScoreLoss(layer=1)
    expected = [torch.randn(n, tiny.vocabulary).softmax(-1) @ tiny.embedding_matrix() for n in (1, 4, 2)]
    references = [tiny.encoder.tokens(text) for text in ("ab", "c", "defg")]
    together = loss.f1(tiny, expected, references)
    for b in range(3):
        assert torch.allclose(loss.f1(tiny, expected[b : b + 1], references[b : b + 1])[0], together[b], atol=1e-5)


def test_a_straight_through_answer_is_the_greedy_one(tiny: FrozenLM) -> None:
    """Its loss is that of the greedy tokens, its gradient that of a softmax at the temperature."""
    example = Example("", " the question:", "cold")
    row = tiny.encoder.row(example, 0)
    size = len(row.answer) + len(row.end)
    logits = torch.randn(size, tiny.vocabulary, generator=torch.Generator().manual_seed(0), requires_grad=True)
    greedy = tiny.embedding_matrix()[logits[: len(row.answer)].argmax(-1)]
    wanted = 1 - BertScoreLoss(layer=2).f1(tiny, [greedy], [row.answer]).item()
    gradients = []
    for temperature in (0.5, 1.0):
        objective = BertScoreLoss(layer=2, estimator=StraightThrough(), temperature=temperature)
        loss = objective.loss(tiny, [row], logits, None)  # type: ignore[arg-type] - it has no use for the scores
        assert loss.item() == pytest.approx(wanted, abs=1e-6)
        gradients += torch.autograd.grad(loss, logits)
        # The chain rule by hand: the loss's slope at the greedy embeddings, through the softmax.
        at = greedy.detach().clone().requires_grad_(True)
        slope = torch.autograd.grad(1 - objective.f1(tiny, [at], [row.answer]).mean(), at)[0]
        probs = (logits[: len(row.answer)].detach() / temperature).softmax(-1)
        toward = slope @ tiny.embedding_matrix().T
        by_hand = probs * (toward - (probs * toward).sum(-1, keepdim=True)) / temperature
        assert torch.allclose(gradients[-1][: len(row.answer)], by_hand, atol=1e-6)
        assert not gradients[-1].isnan().any()
    assert not torch.allclose(gradients[0], gradients[1])
    with pytest.raises(UserError, match=r"objective\.temperature must be a finite number above 0, got 0"):
        BertScoreLoss(temperature=0)


def test_zero_vectors_give_no_nan() -> None:
    zero = torch.zeros(1, 2, 3, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    f1 = greedy_matching(zero, mask, torch.zeros(1, 2, 3), mask)[2]
    f1.sum().backward()
    assert torch.isfinite(f1).all()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(("roberta", "positions"), [(True, 64), (False, 66)])
def test_a_scorer_reads_as_many_tokens_as_it_has_positions(roberta: bool, positions: int, tmp_path: Path) -> None:
    """RoBERTa's kind has two positions that no token takes; its tokenizer says no length here."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "pad_token": "</s>"})
    tokenizer.save_pretrained(tmp_path)
    kind, config = (RobertaModel, RobertaConfig) if roberta else (BertModel, BertConfig)
    model = kind(
        config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=66,
            pad_token_id=1,
        )
    )
    model.save_pretrained(tmp_path)
    reward = BertScore(str(tmp_path))
    text = " ".join("xyz" for _ in range(100))
    assert reward([text], [text], []) == [pytest.approx(1.0, abs=1e-5)]
    assert _bert_scorer(str(tmp_path), None)._tokenizer.model_max_length == positions
