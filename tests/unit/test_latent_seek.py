"""LatentSeek: the steps for each question against plain sums over answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_prompts as lp
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.encoding import Row
from lightning_prompts.methods import LatentSeek, SoftPromptTuning, latent_seek
from lightning_prompts.types import Batch, Example
from support.cases import MODEL

CLASSES = (("up", "high"), ("down",), ("left",))
REWARDS = {"up": 0.1, "down": 0.9, "left": 0.4}
CONFIG = LMConfig(MODEL)
LOADED = SoftPromptTuning(1, lm=CONFIG)


@pytest.fixture(scope="module", autouse=True)
def _load() -> None:
    L.seed_everything(0)
    LOADED.configure_model()


def method(**settings: Any) -> LatentSeek:
    made = LatentSeek(**{"length": 3, "steps": 4, "samples": 3, "max_new_tokens": 3, "lm": CONFIG, **settings})
    L.seed_everything(0)
    made.lms = LOADED.lms
    made.lm = LOADED.lm
    made.build_prompt()
    return made


def questions(count: int, labels: bool) -> list[Example]:
    return [
        Example("Where?", f" it {n} is", " up", reference="up", labels=CLASSES if labels else ()) for n in range(count)
    ]


def noise(made: LatentSeek, count: int) -> Tensor:
    return (0.3 * torch.randn(count, 3, made.lm.width, generator=torch.Generator().manual_seed(1))).requires_grad_()


def log_prob(made: LatentSeek, example: Example, text: str, prompt: Tensor) -> Tensor:
    """Of one text, by itself."""
    scores = made.lm.score([replace(example, answer=text)], prompt)
    return -(scores.nll * scores.tokens)[0]


def belief(made: LatentSeek, example: Example, answer: str) -> float:
    """The probability of yes against no, each with a space or without."""
    claim = Example(f"Where?{example.after} {answer}\n\nIs this answer right, yes or no?", "", None)
    said = [log_prob(made, claim, text, made.lm.no_prompt()).exp() for text in (" yes", "yes", " no", "no")]
    return float((said[0] + said[1]) / sum(said))


def rewarded(made: LatentSeek, monkeypatch: pytest.MonkeyPatch, rewards: Callable[[str], float]) -> list[str]:
    """Rewards that differ more than those of a random model; returns the answers that are judged."""
    asked: list[str] = []

    def judge(claims: Sequence[Example]) -> list[float]:
        texts = [claim.after.split("\n")[0].split(" is ")[1] for claim in claims]
        asked.extend(texts)
        return [rewards(text) for text in texts]

    monkeypatch.setattr(made, "judge", judge)
    return asked


def drawing(made: LatentSeek, monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> None:
    """Texts as what is drawn, each up to the end token."""

    def generate(lm: Any, rows: Sequence[Row], *rest: Any) -> list[list[int]]:
        return [made.lm.encoder.tokens(f" {text}" if text else "") for text in texts[: len(rows)]]

    monkeypatch.setattr(latent_seek, "generate_tokens", generate)


def reward_at(made: LatentSeek, examples: Sequence[Example], vectors: Tensor, step: int = 0) -> Tensor:
    rows = made.lm.encode([replace(example, answer=None) for example in examples], 3)
    return made.expected_reward(examples, rows, vectors, step, {})


def gradient(value: Tensor, where: Tensor) -> Tensor:
    return torch.autograd.grad(value, where)[0]


def start_of(made: LatentSeek, count: int) -> Tensor:
    return made.current_prompt().detach().expand(count, -1, -1)


def test_the_reward_is_the_probability_of_yes() -> None:
    made = method()
    answers = ("up", "on it", "left")
    for labels in (False, True):
        (example,) = questions(1, labels)
        found = made.judge([made.claim(example, answer) for answer in answers])
        assert found == pytest.approx([belief(made, example, answer) for answer in answers], abs=1e-5)
    assert max(found) - min(found) > 1e-4, "answers differ"


def test_classes_are_weighed_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    rewarded(made, monkeypatch, REWARDS.__getitem__)
    examples = questions(2, labels=True)
    moved = noise(made, 2)
    whole = torch.zeros(())
    for example, own in zip(examples, moved, strict=True):
        probs = [
            sum(log_prob(made, example, f"{space}{name}", own).exp() for name in names for space in ("", " "))
            for names in CLASSES
        ]
        whole = whole + sum(p * r for p, r in zip(probs, REWARDS.values(), strict=True)) / sum(probs)
    found = reward_at(made, examples, moved)
    assert found.item() == pytest.approx(whole.item(), abs=1e-5)
    wanted = gradient(whole, moved)
    assert wanted.abs().max() > 1e-5
    assert torch.allclose(gradient(found, moved), wanted, atol=1e-5)


def test_drawn_answers_get_the_score_function_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(max_new_tokens=9)
    examples = questions(2, labels=False)
    moved = noise(made, 2)
    texts = ["up", "", "left", "left", "up", "down"]
    drawing(made, monkeypatch, texts)
    rewards = {**REWARDS, "": 0.7}
    rewarded(made, monkeypatch, rewards.__getitem__)
    whole = torch.zeros(())
    for n, (example, own) in enumerate(zip(examples, moved, strict=True)):
        said = texts[3 * n : 3 * n + 3]
        for k, text in enumerate(said):
            others = sum(rewards[said[j]] for j in range(3) if j != k) / 2
            tokens = [*made.lm.encoder.tokens(f" {text}" if text else ""), made.lm.tokenizer.eos_token_id]
            row = replace(made.lm.encode([replace(example, answer=None)], 3)[0], answer=tokens)
            scores = made.lm.score_rows([row], own)
            whole = whole - (rewards[text] - others) * (scores.nll * scores.tokens)[0] / 3
    wanted = gradient(whole, moved)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(gradient(reward_at(made, examples, moved), moved), wanted, atol=1e-5)


def test_draws_are_the_model_s_own() -> None:
    """Of many draws, as many begin with a token as its probability says; steps and questions differ."""
    made = method(samples=600, max_new_tokens=1)
    examples = questions(2, labels=False)
    same = [replace(example, after=" it is", fields={"n": n}) for n, example in enumerate(examples)]
    rows = made.lm.encode([replace(example, answer=None) for example in examples], 3)
    vectors = noise(made, 2).detach()
    drawn = made.answers(examples, rows, vectors, 0)
    for row, own, each in zip(rows, vectors, drawn, strict=True):
        logits = made.lm.answer_logits([replace(row, answer=[0])], own)
        probs = logits[0].softmax(-1)
        counts = torch.bincount(torch.tensor([ids[0] for ids in each.tokens]), minlength=len(probs)) / 600
        assert (counts - probs).abs().max() < 0.08
        assert probs.max() < 0.95
    assert drawn[0].tokens != made.answers(examples, rows, vectors, 1)[0].tokens
    assert drawn[0].tokens == made.answers(examples, rows, vectors, 0)[0].tokens
    equal = made.answers([replace(same[0], before="a"), same[0]], [rows[0]] * 2, vectors[:1].repeat(2, 1, 1), 0)
    assert equal[0].tokens != equal[1].tokens, "another text has other seeds"


@pytest.mark.parametrize("chat", [False, True])
def test_a_drawn_answer_in_a_chat_ends_as_the_turn_does(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(max_new_tokens=9)
    drawing(made, monkeypatch, ["up"] * 3)
    monkeypatch.setattr(made.lm.encoder, "turn_end", 7)
    (example,) = questions(1, labels=False)
    rows = made.lm.encode([replace(example, answer=None)], 3)
    (drawn,) = made.answers([replace(example, chat=chat)], rows, noise(made, 1).detach(), 0)
    assert {ids[-1] for ids in drawn.tokens} == {7 if chat else made.lm.tokenizer.eos_token_id}


@pytest.mark.parametrize("labels", [True, False])
def test_equal_rewards_move_nothing(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam would make steps of rounding errors."""
    made = method()
    rewarded(made, monkeypatch, lambda text: 0.3)
    examples = questions(3, labels)
    assert torch.equal(made.prompt_for(examples), start_of(made, 3))


def test_an_answer_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(steps=3, pass_rows=2)
    asked = rewarded(made, monkeypatch, REWARDS.__getitem__)
    made.prompt_for(questions(2, labels=True))
    assert sorted(asked) == sorted([names[0] for names in CLASSES] * 2)


@pytest.mark.parametrize("labels", [True, False])
def test_steps_are_for_each_question_alone(labels: bool) -> None:
    """Also under Lightning's inference mode, in parts, and whatever the reference answer is."""
    made = method(step_size=0.01, steps=6)
    examples = questions(3, labels)
    with torch.inference_mode():
        together = made.prompt_for(examples)
    assert together.shape == (3, 3, made.lm.width)
    assert not together.requires_grad
    assert not torch.allclose(together, start_of(made, 3), atol=1e-3)
    parts = method(step_size=0.01, steps=6, pass_rows=2)
    parts.prompt.load_state_dict(made.prompt.state_dict())
    unknown = [replace(example, answer=None, reference=None) for example in examples]
    assert torch.allclose(parts.prompt_for(unknown), together, atol=1e-4)


def test_classes_and_free_text_in_one_batch() -> None:
    made = method(step_size=0.01)
    mixed = [*questions(2, labels=True), *questions(3, labels=False)[2:], *questions(4, labels=True)[3:]]
    together = made.prompt_for(mixed)
    for n, example in enumerate(mixed):
        assert torch.allclose(made.prompt_for([example])[0], together[n], atol=1e-4)


@pytest.mark.parametrize("labels", [True, False])
def test_steps_raise_the_reward(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(steps=30, step_size=0.1, samples=8, max_new_tokens=1)
    rewarded(made, monkeypatch, lambda text: REWARDS.get(text, float(text.isascii())))
    examples = questions(3, labels)
    rows = made.lm.encode([replace(example, answer=None) for example in examples], 3)

    def mean(vectors: Tensor) -> float:
        if labels:
            return reward_at(made, examples, vectors).item() / 3
        drawn = [
            text for step in range(40) for each in made.answers(examples, rows, vectors, step) for text in each.texts
        ]
        return sum(float(text.isascii()) for text in drawn) / len(drawn)

    assert mean(made.prompt_for(examples)) > mean(start_of(made, 3)) + 0.05


def test_a_chat_is_judged_as_a_chat() -> None:
    made = method()
    claim = made.claim(Example("Where?", " is", " up", chat=True, system="Be brief.", stop="x"), "up")
    assert (claim.chat, claim.system, claim.labels) == (True, "Be brief.", (("yes",), ("no",)))
    assert claim.after == " is up\n\nIs this answer right, yes or no?"


def test_without_steps_and_in_training_it_is_a_soft_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made, moving = method(steps=0), method()
    plain = SoftPromptTuning(3, lm=CONFIG, max_new_tokens=3)
    plain.lms, plain.lm = LOADED.lms, LOADED.lm
    plain.build_prompt()
    examples = questions(3, labels=True) + questions(2, labels=False)
    for one in (made, moving):
        one.prompt.load_state_dict(plain.prompt.state_dict())
        monkeypatch.setattr(one, "log_step", lambda *args, **kwargs: None)
    monkeypatch.setattr(plain, "log_step", lambda *args, **kwargs: None)
    found, shared = (one.evaluate(examples, one.prompt_for(examples)) for one in (made, plain))
    assert found == shared
    batch = Batch(examples)
    losses = [one.training_step(batch, 0) for one in (moving, plain)]
    assert torch.equal(*losses)


def test_questions_in_python_move_the_vectors_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moved: list[int] = []
    seek = LatentSeek.seek
    monkeypatch.setattr(
        LatentSeek, "seek", lambda self, some, start: moved.append(len(some)) or seek(self, some, start)
    )
    rows = [{"question": f"{n}", "answer": "up"} for n in range(12)]
    run = lp.fit(
        LatentSeek(2, 1, samples=2, max_new_tokens=2, lm=CONFIG),
        rows,
        folder=tmp_path / "run",
        verbose=False,
        trainer={"max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu"},
    )
    moved.clear()
    assert len(run.answer(["1", "2", "3"])) == 3
    assert moved == [3]


def test_what_does_not_fit_is_said_before_the_run() -> None:
    made = method(max_new_tokens=2)

    def check(after: str, labels: tuple[tuple[str, ...], ...] = ()) -> None:
        rows = {
            "train": [Example("", "a" * 600, " b", source="train 1")],
            "test": [Example("", after, " b", source="row 7", labels=labels)],
        }
        data = SimpleNamespace(examples=rows.__getitem__, splits=lambda stage: ["test"], held_out=list)
        made._trainer = SimpleNamespace(
            datamodule=data, state=SimpleNamespace(fn=SimpleNamespace(value="test")), barebones=True
        )
        try:
            made._check_lengths()
        finally:
            made._trainer = None

    room = made.lm.context - made.lm.length(made.claim(Example("", "", None), "")) - 1
    check("a" * (room - 6))
    with pytest.raises(UserError, match=r"row 7: text, answer and verification may be 701 tokens, more .* \(700\)"):
        check("a" * (room - 5))
    check("a" * (room - 9), (("b",), ("leftofit!",)))
    with pytest.raises(UserError, match=r"row 7: text, answer and verification .* shorten verification"):
        check("a" * (room - 9), (("b",), ("leftofit!!",)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"step_size": 0.0}, "step_size must be a finite number above 0"),
        ({"samples": 1}, r"samples \(K\) must be at least 2, got 1"),
        ({"pass_rows": 0}, "pass_rows must be at least 1, got 0"),
        ({"verification": "Right?"}, r"verification must contain \{answer\}"),
        ({"lm": LMConfig(MODEL, calibrate_labels=True)}, "leave out lm.calibrate_labels"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LatentSeek(**settings)
