"""Where prompts come from: messages, proposals by an LM, examples, rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from lightning_prompts.dln.cached_lm import CachedLM
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import (
    MESSAGES,
    BanditStats,
    CycledMessages,
    NoMessage,
    ThompsonSampling,
    UniformMessages,
    UpperConfidence,
)
from lightning_prompts.dln.proposals import (
    Case,
    InducedInstructions,
    LanguageModelProposals,
    MinedExamples,
    Paraphrases,
    Proposal,
    Proposals,
    Request,
    RuleRewrites,
    distinct,
)
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.types import Example
from support.dln_toys import cached_of, examples, generator, stepper_of
from support.models import TINY


def test_messages_without_learning() -> None:
    arms = BanditStats()
    assert [CycledMessages().choose(arms, j, generator()) for j in range(6)] == [0, 1, 2, 3, 0, 1]
    assert NoMessage().choose(arms, 0, generator()) is None
    draw = generator()
    assert {UniformMessages().choose(arms, j, draw) for j in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("choice", [ThompsonSampling(), UpperConfidence()])
def test_a_bandit_finds_the_message_that_gains(choice: ThompsonSampling | UpperConfidence) -> None:
    arms, draw, noise = BanditStats(), generator(), generator(9)
    chosen = []
    for _ in range(60):
        for j in range(3):
            message = choice.choose(arms, j, draw)
            assert message is not None
            chosen.append(message)
            arms.update(message, (0.5 if message == 2 else 0.0) + 0.2 * float(torch.randn(1, generator=noise)))
    assert set(chosen[:20]) == set(range(len(MESSAGES))), "each is tried"
    assert chosen[-60:].count(2) > 45
    assert arms.mean(2) == pytest.approx(0.5, abs=0.1)
    assert arms.deviation() == pytest.approx(0.2, abs=0.05)


def test_gains_are_measured_against_the_parent() -> None:
    stepper = stepper_of(FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1024")), [LanguageLayer()])
    stepper.settings = replace(stepper.settings, proposals=[LanguageModelProposals(6, max_new_tokens=6, shown=0)])
    memory, arms = PromptMemory(1, -1), BanditStats()
    memory.update(["Old."], 0.5)
    rows = stepper.step(examples(), ["Start."], memory, [arms], 0.0, generator()).candidates[0]
    value = {row.proposal.text: row.reward for row in rows}
    for message in range(4):
        gains = [row.reward - value[row.proposal.parent] for row in rows if row.proposal.message == message]
        assert arms.counts[message] == len(gains)
        assert arms.sums[message] == pytest.approx(sum(gains))
    assert {row.proposal.parent for row in rows[2:]} == {"Start.", "Old."}, "the memory is rewritten too"


def test_gains_that_are_no_numbers_are_left_out(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [-2.0, -1.0, float("nan"), float("-inf")]

    @dataclass(frozen=True)
    class Told(Proposals):
        def propose(self, request: Request) -> list[Proposal]:
            return [Proposal(f"Text {m}.", request.parents[0], "Told", m) for m in range(3)]

    stepper, arms = stepper_of(tiny, [LanguageLayer()]), BanditStats()
    stepper.settings = replace(stepper.settings, proposals=[Told()])
    monkeypatch.setattr(stepper, "rewards", lambda *_: torch.tensor(values))
    result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [arms], 0.0, generator())
    assert result.prompts == ["Text 0."]
    assert arms.counts == [1, 0, 0, 0]
    assert arms.sums == [1.0, 0.0, 0.0, 0.0]


CASES = [Case(f"question {n}", f"out {n}", f"target {n}", n % 2 == 0) for n in range(6)]


def request(lm: FrozenLM, parents: Sequence[str] = ("Start.", "Old."), cases: Sequence[Case] = CASES) -> Request:
    return Request(list(parents), cases, ["yes", "no"], BanditStats(), generator(), cached_of(lm))


def shown(cached: CachedLM, source: Proposals, given: Request, monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    asked: list[Example] = []

    def draw(examples: Sequence[Example], *rest: object, **more: object) -> list[str]:
        asked.extend(examples)
        return [f"Answer {n}" for n in range(len(examples))]

    monkeypatch.setattr(cached, "draw", draw)
    source.propose(given)
    return asked


def test_what_the_teacher_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=4096"))
    given = request(lm)
    asked = shown(given.proposer, LanguageModelProposals(5, held_out=True), given, monkeypatch)
    orders = []
    for j, example in enumerate(asked):
        text = example.before
        assert ("Start." if j % 2 == 0 else "Old.") in text
        assert MESSAGES[j % 4] in text
        seen = [case for case in CASES if f"{case.input}\n" in text]
        assert len(seen) == 3, "a random half"
        orders.append(tuple(case.input for case in seen))
        for case in seen:
            assert (f"Output of the student: {case.output}" in text) != case.right
            assert case.target in text
    assert len(set(orders)) > 1
    given = request(lm)
    asked = shown(given.proposer, LanguageModelProposals(1, held_out=False), given, monkeypatch)
    assert all(case.input in asked[0].before for case in CASES)


def test_examples_beyond_the_teacher_s_window_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=800"))
    long = Case("w" * 2000, "out", "target", False)
    for cases, left in (([*CASES, long], None), ([long], 0)):
        given = request(lm, cases=cases)
        asked = shown(given.proposer, LanguageModelProposals(4, held_out=False), given, monkeypatch)
        for example in asked:
            assert len(lm.encoder.row(example, 0).context) + 64 <= 800
            assert "w" * 2000 not in example.before
            assert left is None or "Input:" not in example.before
    roomy = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1600"))
    given = request(roomy, cases=[*CASES, long])
    for example in shown(given.proposer, LanguageModelProposals(4, held_out=False), given, monkeypatch):
        assert example.before.count("Input:") == len(CASES), "one long example, wherever it stands, costs no other"
    given = request(lm, cases=[long])
    assert len(InducedInstructions(2).propose(given)) == 2
    with pytest.raises(UserError, match="too small for a question to the proposer"):
        LanguageModelProposals(1).propose(request(FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=200"))))


def test_duplicates_and_empty_proposals_are_sorted_out() -> None:
    made = [Proposal(text, "p", "k") for text in ("a", "", "  ", "b  c", "a", "b c", "known", "d")]
    assert [proposal.text for proposal in distinct(made, ["known"])] == ["a", "b  c", "d"]


def test_mined_examples_replace_earlier_ones(tiny: FrozenLM) -> None:
    first = MinedExamples(4, shots=2).propose(request(tiny))
    again = MinedExamples(4, shots=2).propose(request(tiny, [proposal.text for proposal in first]))
    for proposal in (*first, *again):
        assert proposal.text.count("For example:") == 1
        assert proposal.text.startswith(("Start.", "Old."))
        assert 1 <= proposal.text.count("Answer: target") <= 2
    errors = MinedExamples(6, shots=1, errors_first=True).propose(request(tiny))
    assert all(f"target {n}" not in proposal.text for proposal in errors for n in (0, 2, 4))


def test_rules(tiny: FrozenLM) -> None:
    rewrites = RuleRewrites().rewrites("Say it. Now.\n\nFor example:\nx", ["yes", "no"])
    for wanted in (
        "Say it. Now. Answer with yes or no.\n\nFor example:\nx",
        "Now. Say it.\n\nFor example:\nx",
        "Say it. Now.",
        "Now.\n\nFor example:\nx",
        "Task: Say it. Now.\n\nFor example:\nx",
    ):
        assert wanted in rewrites
    assert len(set(rewrites)) == len(rewrites)
    drawn = RuleRewrites(5).propose(request(tiny))
    assert len({proposal.text for proposal in drawn}) == 5
    assert {proposal.parent for proposal in drawn} <= {"Start.", "Old."}
    assert RuleRewrites().rewrites("", []), "an empty prompt gets sentences"


def test_variations_and_marks(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = request(tiny)
    monkeypatch.setattr(given.proposer, "draw", lambda asked, *rest, **more: ['> The new instruction: "Do it."'] * 2)
    assert [proposal.text for proposal in Paraphrases(2).propose(given)] == ["Do it."] * 2
