"""LatentSeek: the steps for each question against plain sums over answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import LatentSeek, SoftPromptTuning
from lightning_prompts.types import Example
from support.cases import MODEL

CLASSES = (("up", "high"), ("down",), ("left",))
REWARDS = {"up": 0.1, "down": 0.9, "left": 0.4}
SAID = ("up", "on it", "left")
CONFIG = LMConfig(MODEL)


def method(**settings: Any) -> LatentSeek:
    made = LatentSeek(**{"length": 3, "steps": 4, "samples": 3, "max_new_tokens": 3, "lm": CONFIG, **settings})
    made.configure_model()
    return made.eval()


def questions(count: int, labels: bool) -> list[Example]:
    return [
        Example("Where?", f" it {n} is", " up", reference="up", labels=CLASSES if labels else ()) for n in range(count)
    ]


def vectors(made: LatentSeek, count: int) -> Tensor:
    noise = torch.randn(count, 3, made.lm.width, generator=torch.Generator().manual_seed(1))
    return (0.3 * noise).requires_grad_()


def log_prob(made: LatentSeek, example: Example, text: str, prompt: Tensor) -> Tensor:
    """Of one text, by itself."""
    scores = made.lm.score([replace(example, answer=text)], prompt)
    return -(scores.nll * scores.tokens)[0]


def belief(made: LatentSeek, example: Example, answer: str) -> Tensor:
    """The probability of yes against no, each with a space or without."""
    claim = Example(f"Where?{example.after} {answer}{made.verification}", "", None)
    said = [log_prob(made, claim, text, made.lm.no_prompt()).exp() for text in (" yes", "yes", " no", "no")]
    return (said[0] + said[1]) / sum(said)


def rewarded(made: LatentSeek, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ more than those of a random model."""
    monkeypatch.setattr(made, "judge", lambda asked, answers: torch.tensor([REWARDS[name] for name in answers]))


def gradient(value: Tensor, where: Tensor) -> Tensor:
    return torch.autograd.grad(value, where)[0]


def test_the_reward_is_what_the_model_believes_of_the_answer() -> None:
    made = method()
    (example,) = questions(1, labels=False)
    found = made.judge([example] * 3, SAID)
    assert torch.allclose(found, torch.stack([belief(made, example, answer) for answer in SAID]), atol=1e-5)
    assert found.std() > 1e-4, "answers differ"
    (labelled,) = questions(1, labels=True)
    assert torch.allclose(made.judge([labelled] * 3, SAID), found)


def test_classes_are_weighed_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    rewarded(made, monkeypatch)
    examples = questions(2, labels=True)
    moved = vectors(made, 2)
    whole = torch.zeros(())
    for example, own in zip(examples, moved, strict=True):
        probs = [
            sum(log_prob(made, example, f"{space}{name}", own).exp() for name in names for space in ("", " "))
            for names in CLASSES
        ]
        whole = whole + sum(p * r for p, r in zip(probs, REWARDS.values(), strict=True)) / sum(probs)
    found = made.expected_reward(examples, moved, 0, {})
    assert found.item() == pytest.approx(whole.item(), abs=1e-5)
    wanted = gradient(whole, moved)
    assert wanted.abs().max() > 1e-5
    assert torch.allclose(gradient(found, moved), wanted, atol=1e-5)


def test_drawn_answers_get_the_score_function_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    examples = questions(2, labels=False)
    moved = vectors(made, 2)
    drawn = ["up", "", "on it", "left", "up", "down"]  # the empty one is rewarded with 0, and cannot become likelier
    monkeypatch.setattr(made.lm, "generate", lambda copies, *rest: drawn[: len(copies)])
    whole = torch.zeros(())
    for n, (example, own) in enumerate(zip(examples, moved, strict=True)):
        texts = drawn[3 * n : 3 * n + 3]
        rewards = [belief(made, example, text).detach() if text else torch.zeros(()) for text in texts]
        for k, text in enumerate(texts):
            others = sum(rewards[j] for j in range(3) if j != k) / 2
            if text:
                whole = whole + (rewards[k] - others) * log_prob(made, example, f" {text}", own) / 3
    wanted = gradient(whole, moved)
    assert wanted.abs().max() > 1e-6
    assert torch.allclose(gradient(made.expected_reward(examples, moved, 0, {}), moved), wanted, atol=1e-7)


def test_draws_are_of_the_model_and_differ_by_step_and_question(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(verification="\nRight?")
    examples = questions(2, labels=False)
    judged: list[Sequence[str]] = []

    def judge(asked: Sequence[Example], answers: Sequence[str]) -> Tensor:
        judged.append(list(answers))
        return torch.ones(len(answers))

    monkeypatch.setattr(made, "judge", judge)
    moved = vectors(made, 2)
    for step in (0, 1, 0):
        made.expected_reward(examples, moved, step, {})
    assert judged[0] == judged[2] != judged[1]
    assert len(set(judged[0])) > 2


def test_an_answer_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(steps=3)
    asked: list[str] = []
    judge = made.judge
    monkeypatch.setattr(made, "judge", lambda some, answers: asked.extend(answers) or judge(some, answers))
    made.prompt_for(questions(2, labels=True))
    assert sorted(asked) == sorted([names[0] for names in CLASSES] * 2)


def test_nothing_said_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    monkeypatch.setattr(made.lm, "generate", lambda copies, *rest: [""] * len(copies))
    moved = made.prompt_for(questions(2, labels=False))
    assert torch.equal(moved, made.current_prompt().detach().expand(2, -1, -1))


@pytest.mark.parametrize("labels", [True, False])
def test_steps_are_for_each_question_alone(labels: bool) -> None:
    """Also under Lightning's inference mode, in parts, and whatever the reference answer is."""
    made = method(step_size=0.01, steps=6)
    examples = questions(3, labels)
    with torch.inference_mode():
        together = made.prompt_for(examples)
    assert together.shape == (3, 3, made.lm.width)
    assert not together.requires_grad
    parts = method(step_size=0.01, steps=6, pass_rows=3)
    parts.prompt.load_state_dict(made.prompt.state_dict())
    unknown = [replace(example, answer=None, reference=None) for example in examples]
    assert torch.allclose(parts.prompt_for(unknown), together, atol=1e-4)


def test_steps_raise_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(steps=8, step_size=0.3)
    rewarded(made, monkeypatch)
    examples = questions(3, labels=True)
    start = made.current_prompt().detach().expand(3, -1, -1)
    before, after = (
        made.expected_reward(examples, prompt, 0, {}).item() for prompt in (start, made.prompt_for(examples))
    )
    assert after > before + 0.01


def test_without_steps_and_in_training_it_is_a_soft_prompt() -> None:
    made = method(steps=0)
    plain = SoftPromptTuning(3, lm=CONFIG, max_new_tokens=3)
    plain.configure_model()
    plain.prompt.load_state_dict(made.prompt.state_dict())
    examples = questions(3, labels=True) + questions(2, labels=False)
    moved, shared = (one.evaluate(examples, one.prompt_for(examples)) for one in (made, plain))
    assert [row["generated"] for row in moved] == [row["generated"] for row in shared]
    assert [row["nll"] for row in moved] == pytest.approx([row["nll"] for row in shared], abs=1e-5)
    assert torch.equal(made.train().prompt_for(examples), made.current_prompt())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"step_size": 0.0}, "step_size must be a finite number above 0"),
        ({"samples": 1}, r"samples \(K\) must be at least 2, got 1"),
        ({"pass_rows": 2, "samples": 3}, "pass_rows must be at least 3, got 2"),
        ({"verification": " "}, "verification is empty"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LatentSeek(**settings)
