"""GEPA against enumeration: the Pareto front, parents, acceptance, merges, feedback, leaks, and resuming."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.leakage import copied_words
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.network import Answer
from lightning_prompts.dln.pareto import CandidatePool, PoolMember
from lightning_prompts.dln.proposals import Case, Proposal, Reflection, Request
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import Gepa
from lightning_prompts.methods.gepa import Rollout
from lightning_prompts.objectives.rewards import AnswerLikelihood, ExactMatch, Mixture, Reward, TextReward, TokenF1
from lightning_prompts.types import Example
from support.dln_toys import Toy, generator, trainer
from support.models import TINY

LM = LMConfig(f"{TINY},max_position_embeddings=900,initializer_range=0.2")
Score = Callable[[Example, Sequence[str]], float]


def pool_of(scores: Sequence[Sequence[float]], parents: Sequence[Sequence[int]] = ()) -> CandidatePool:
    pool = CandidatePool()
    for index, line in enumerate(scores):
        mine = list(parents[index]) if parents else []
        pool.members.append(PoolMember([f"p{index}"], list(line), mine))
    return pool


@dataclass(frozen=True)
class Scripted(Reflection):
    """Texts by layer and step in place of the LM's; keeps what it was asked."""

    texts: tuple[tuple[str, ...], ...] = ()
    asked: tuple[list[Request], ...] = ([],)

    def propose(self, request: Request) -> list[Proposal]:
        mine = self.texts[len(self.asked[0]) % len(self.texts)]
        self.asked[0].append(request)
        return [Proposal(text, request.parents[0], "Scripted") for text in mine]


class Scored(Gepa):
    """Scores from a function in place of an LM's answers."""

    score: Score

    def rollout(self, examples: Sequence[Example], prompts: Sequence[str]) -> Rollout:
        scores = [self.score(example, prompts) for example in examples]
        hidden = [[f"thought of {prompt}"] * len(examples) for prompt in prompts[:-1]]
        return Rollout(hidden, [Answer("yes", score >= 1) for score in scores], scores)


def scored(score: Score, texts: Sequence[Sequence[str]], **settings: Any) -> Scored:
    reflection = Scripted(texts=tuple(map(tuple, texts)), asked=([],))
    method = Scored(reflection=reflection, **{"text": "start", "lm": LM, **settings})
    method.score = score
    return method


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] != "validation"]


# --- the front --------------------------------------------------------------------------------------------------------


def enumerated(scores: Sequence[Sequence[float]]) -> list[int]:
    """Algorithm 2 in sets: who is best where, without those whose examples another one has as well, and more."""
    count, places = len(scores), range(len(scores[0]))
    best = [max(line[i] for line in scores) for i in places]
    wins = [{i for i in places if scores[k][i] == best[i]} for k in range(count)]
    kept = [k for k in range(count) if not any(wins[k] < wins[j] for j in range(count))]
    return [len(wins[k]) if k in kept else 0 for k in range(count)]


@pytest.mark.parametrize("levels", [2, 3, 50])
def test_the_front_and_its_frequencies(levels: int) -> None:
    for seed in range(60):
        shape = (1 + seed % 6, 1 + seed % 5)
        scores = torch.randint(levels, shape, generator=generator(seed)).tolist()
        assert pool_of(scores).frequencies() == enumerated(scores)


def test_parents_are_drawn_by_their_frequencies() -> None:
    pool = pool_of([[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0.5]])
    assert pool.frequencies() == [2, 0, 3, 0]
    source, total = generator(1), 2000
    drawn = Counter(pool.draw(source) for _ in range(total))
    assert drawn.keys() == {0, 2}
    assert drawn[0] / total == pytest.approx(2 / 5, abs=0.04)
    assert pool.best is pool.members[2]
    assert pool_of([[1, 0], [0, 1]]).best.prompts == ["p0"], "the first of equals"


# --- merges -----------------------------------------------------------------------------------------------------------


def network_pool(*members: tuple[Sequence[str], Sequence[float], Sequence[int]]) -> CandidatePool:
    pool = CandidatePool()
    pool.members += [PoolMember(list(prompts), list(scores), list(parents)) for prompts, scores, parents in members]
    return pool


def test_a_merge_takes_what_has_changed() -> None:
    start = (("a", "b", "c"), (0.0, 0.0, 0.0, 0.0), ())
    one = (("A", "b", "c"), (1.0, 0.0, 0.0, 1.0), (0,))
    other = (("a", "B", "c"), (0.0, 1.0, 0.0, 1.0), (0,))
    pool = network_pool(start, one, other)
    (merge,) = pool.merges()
    assert merge.prompts == ("A", "B", "c")
    assert merge.parents == (1, 2)
    assert pool.merges([["A", "B", "c"]]) == [], "tried before"
    assert network_pool(start, one, other, (("A", "B", "c"), (0, 0, 1, 0), (1, 2))).merges() == [], "known"
    assert network_pool(start, one, ((("a", "B", "c")), (0, 1, 0, 1), (1,))).merges() == [], "one descends from another"
    assert network_pool((start[0], (1, 1, 0.5, 0), ()), one, other).merges() == [], "the ancestor is better than both"
    assert network_pool(start, one, (("a", "B", "c"), (0, 1, 0, 1), ())).merges() == [], "no common ancestor"
    assert network_pool(start, (("A", "b", "c"), (0, 0, 0, 1), (0,)), other).merges() == [], "one is dominated"


def test_where_both_have_changed_the_better_one_wins() -> None:
    start = (("a", "b"), (0.0, 0.0, 0.0), ())
    better = (("A1", "b"), (1.0, 0.0, 1.0), (0,))
    worse = (("A2", "B"), (0.0, 1.0, 0.0), (0,))
    assert [merge.prompts for merge in network_pool(start, better, worse).merges()] == [("A1", "B")]
    equal = (("A2", "B"), (0.0, 1.0, 1.0), (0,))
    assert [merge.prompts for merge in network_pool(start, better, equal).merges()] == [("A1", "B")], "the earlier one"
    assert network_pool(start, (("A1", "b"), (1, 0, 0), (0,)), (("A2", "B"), (0, 1, 1), (0,))).merges() == [], (
        "the better one has both changes, so a merge is itself"
    )
    assert pool_of([[0, 0], [1, 0], [0, 1]], [[], [0], [0]]).merges() == [], "one layer has nothing to merge"


def test_merges_of_random_pools_by_enumeration() -> None:
    for seed in range(40):
        source = generator(seed)

        def below(end: int) -> int:
            return int(torch.randint(end, (1,), generator=source))  # noqa: B023

        pool = network_pool((("x", "x", "x"), tuple(float(below(2)) for _ in range(4)), ()))
        for index in range(1, 7):
            parent = below(index)
            prompts = list(pool.members[parent].prompts)
            prompts[below(3)] = f"p{index}"
            pool.members.append(PoolMember(prompts, [float(below(2)) for _ in range(4)], [parent]))
        ancestors = []
        for member in pool.members:
            ancestors.append({place for parent in member.parents for place in {parent, *ancestors[parent]}})
        kept = [index for index, count in enumerate(enumerated([m.scores for m in pool.members])) if count]
        expected = set()
        for i in kept:
            for j in kept:
                one, other = pool.members[i], pool.members[j]
                if i >= j or i in ancestors[j] or j in ancestors[i]:
                    continue
                for a in ancestors[i] & ancestors[j]:
                    if pool.members[a].mean > one.mean or pool.members[a].mean > other.mean:
                        continue
                    merged = []
                    for start, mine, its in zip(pool.members[a].prompts, one.prompts, other.prompts, strict=True):
                        if mine == start or its == start:
                            merged.append(its if mine == start else mine)
                        else:
                            merged.append(its if other.mean > one.mean else mine)
                    if merged not in [member.prompts for member in pool.members]:
                        expected.add(tuple(merged))
        assert {merge.prompts for merge in pool.merges()} == expected


# --- steps ------------------------------------------------------------------------------------------------------------


def test_only_strictly_better_candidates_are_accepted(tmp_path: Path) -> None:
    """The script proposes a worse, an equal and two better prompts; each is right on its share of the questions."""
    shares = {"start": 2, "worse": 1, "equal": 2, "good": 3, "best": 4}

    def score(example: Example, prompts: Sequence[str]) -> float:
        return float(int(example.source.split()[-1]) // 3 % 4 < shares[prompts[0]])

    method = scored(score, [["worse", "equal"], ["good", "start", ""], ["good", "best"]])
    data = Toy()
    L.seed_everything(1, verbose=False)
    trainer(tmp_path, 3, 3).fit(method, data)
    pool = method.pool
    batch = [[row for row in rows_of(tmp_path) if row["step"] == step] for step in (1, 2, 3)]
    for rows in batch:
        before = rows[0]["reward"]
        assert rows[0]["kind"] == "parent"
        assert not rows[0]["chosen"]
        for row in rows[1:]:
            assert row["chosen"] == (row["reward"] > before)
            assert row["validation"] == (shares[row["prompt"]] / 4 if row["chosen"] else None)
    assert [row["prompt"] for row in batch[0]] == ["start", "worse", "equal"]
    accepted = [row["prompt"] for rows in batch for row in rows if row["chosen"]]
    assert [member.prompts for member in pool.members] == [["start"], *([prompt] for prompt in accepted)]
    for member in pool.members:
        assert member.scores == [score(example, member.prompts) for example in data.examples("val")]
    assert method.prompts == pool.best.prompts == method.prompt_memory.best
    assert method.prompt_memory.best_accuracy == pool.best.mean


def test_layers_take_turns(tmp_path: Path) -> None:
    """Each layer's new prompt repairs other questions."""

    def score(example: Example, prompts: Sequence[str]) -> float:
        number = int(example.source.split()[-1]) // 3
        return float(prompts[number % 2] == ("first", "second")[number % 2])

    layers = [LanguageLayer("think", max_new_tokens=4), LanguageLayer("fixed", learn=False), LanguageLayer("say")]
    method = scored(
        lambda example, prompts: score(example, [prompts[0], prompts[2]]),
        [["first"], ["second"]],
        layers=layers,
        text=None,
    )
    L.seed_everything(2, verbose=False)
    trainer(tmp_path, 3, 3).fit(method, Toy())
    rows = rows_of(tmp_path)
    assert [(row["layer"], row["kind"], row["chosen"]) for row in rows] == [
        (0, "parent", False),
        (0, "Scripted", True),
        (2, "parent", False),
        (2, "Scripted", True),
        (0, "parent", False),
    ]
    assert [member.parents for member in method.pool.members] == [[], [0], [1]]
    assert method.prompts == ["first", "fixed", "second"]
    (hidden, top), wrong = method.reflection.asked[0], "It led to the final answer: yes\nThat is wrong."  # type: ignore[attr-defined]
    assert all(case.output == "thought of think" and case.feedback.startswith(wrong) for case in hidden.cases)
    assert all(case.output == "yes" and case.input.endswith("Thoughts: thought of fixed") for case in top.cases)
    assert {case.feedback for case in top.cases if case.right} == {"This is right."}


def test_a_merge_is_accepted_if_it_is_as_good_as_both(tmp_path: Path) -> None:
    good = {("A", "b"): 0, ("a", "B"): 1}
    for bonus, accepted in ((True, True), (False, False)):

        def score(example: Example, prompts: Sequence[str], bonus: bool = bonus) -> float:
            number = int(example.source.split()[-1]) // 3
            if tuple(prompts) == ("A", "B"):
                return float(bonus)
            return float(good.get(tuple(prompts)) == number % 2)

        layers = [LanguageLayer("a", max_new_tokens=4), LanguageLayer("b")]
        method = scored(score, [["none"]], layers=layers, text=None)
        method.pool.members += [
            PoolMember(["a", "b"], [0.0] * 12, []),
            PoolMember(["A", "b"], [1.0, 0.0] * 6, [0], 1),
            PoolMember(["a", "B"], [0.0, 1.0] * 6, [0], 2),
        ]
        method.merge_due = True
        L.seed_everything(2, verbose=False)
        folder = tmp_path / str(bonus)
        trainer(folder, 1, 1).fit(method, Toy())
        rows = rows_of(folder)
        assert [(row["kind"], row["layer"], row["chosen"]) for row in rows] == [
            ("merge", 0, accepted),
            ("merge", 1, accepted),
        ]
        assert method.tried == [["A", "B"]]
        assert len(method.pool) == 3 + accepted
        if accepted:
            assert method.pool.members[-1] == PoolMember(["A", "B"], [1.0] * 12, [1, 2], 2)
            assert method.prompts == ["A", "B"]


def test_merges_have_a_limit_and_wait_for_an_accepted_candidate(tmp_path: Path) -> None:
    for merges in (0, 5):
        layers = [LanguageLayer("a", max_new_tokens=4), LanguageLayer("b")]
        method = scored(
            lambda example, prompts: float(prompts[0] == "new"), [["new"]], layers=layers, text=None, merges=merges
        )
        trainer(tmp_path / str(merges), 1, 1).fit(method, Toy())
        assert method.merge_due == (merges > 0)
        assert len(method.pool) == 2
    trainer(tmp_path / "more", 2, 1).fit(method, Toy())
    assert not method.merge_due, "no merge was possible"


def test_a_batch_without_errors_asks_nothing(tmp_path: Path) -> None:
    method = scored(lambda example, prompts: 1.0, [["new"]])
    trainer(tmp_path, 2, 1).fit(method, Toy())
    assert method.reflection.asked == ([],)  # type: ignore[attr-defined]
    assert [row["kind"] for row in rows_of(tmp_path)] == ["parent", "parent"]


# --- feedback ---------------------------------------------------------------------------------------------------------


class Length(TextReward):
    """Asks for the length of the reference."""

    def judge(self, text: str, reference: str) -> float:
        return float(len(text) == len(reference))

    def feedback(self, text: str, reference: str) -> str:
        return f"It has {len(text)} letters, not {len(reference)}." if len(text) != len(reference) else ""


def test_feedback_in_words() -> None:
    example = Toy().examples("train")[1]
    plain, rewarded = Gepa(lm=LM), Gepa(reward=Mixture([Length(), ExactMatch()], [1, 1]), lm=LM)
    right, wrong = Answer("no", True), Answer("maybe", False)
    assert example.target == "no"
    assert plain.feedback(example, right, 1.0, True) == "This is right."
    assert plain.feedback(example, wrong, 0.0, True) == "This is wrong. The right answer is: no"
    assert plain.feedback(example, wrong, 0.0, False) == (
        "It led to the final answer: maybe\nThat is wrong. The right answer is: no"
    )
    assert rewarded.feedback(example, wrong, 0.25, True) == (
        "This scores 0.25 of 1. The right answer is: no\nIt has 5 letters, not 2."
    )
    assert rewarded.feedback(example, right, 1.0, True) == "This scores 1.00 of 1. The right answer is: no"


def test_the_question_to_the_proposer() -> None:
    cases = [
        Case("in 1", "out 1", "t1", True),
        Case("in 2", "out 2", "t2", False, "It is too long."),
        Case("in 3", "out 3", "t3", False),
    ]
    method, written = Gepa(lm=LM), []
    method.configure_model()
    cached = method.proposer

    def draw(examples: Sequence[Example], *args: Any) -> list[str]:
        written.extend(example.before for example in examples)
        return ['The new instruction: "Look twice."'] * len(examples)

    cached.draw = draw  # type: ignore[method-assign]
    request = Request(["Now."], cases, [], BanditStats(), generator(), cached)
    (proposal,) = Reflection(max_new_tokens=4, shown=2).propose(request)
    assert (proposal.text, proposal.parent, proposal.kind) == ("Look twice.", "Now.", "Reflection")
    text = written[0]
    assert "The instruction now:\nNow.\n" in text
    assert "Input:\nin 2\nOutput: out 2\nFeedback: It is too long.\n" in text
    assert "Input:\nin 3\nOutput: out 3\nFeedback: This is wrong. The right answer is: t3\n" in text
    assert "in 1" not in text, "errors come first"
    assert text.endswith("\nThe new instruction:")
    whole = Reflection.write("Now.", cases)
    assert "Output: out 1\nFeedback: This is right." in whole


# --- leaks ------------------------------------------------------------------------------------------------------------


def test_copied_passages_are_counted() -> None:
    def of(question: str, answer: str) -> Example:
        return Example("", "", answer, reference=answer, fields={"question": question})

    examples = [
        of(f"Please answer now. Item {n} weighs {n} kilos and is {color}.", f"{n} kilos it is, I think")
        for n, color in enumerate(["red", "blue", "green", "black"])
    ]
    assert copied_words("Item 2, weighs 2 KILOS and is green", examples, 4) == 8
    assert copied_words("Item 2 weighs 2 kilos and is red", examples, 4) == 7
    assert copied_words("Say 3 kilos it is!", examples, 4) == 4, "answers count, too"
    assert copied_words("Say 3 kilos it is!", examples, 5) == 0
    assert copied_words("Please answer now.", examples, 3) == 0, "all questions say so"
    assert copied_words("a b c", [of("a b x b c", "")], 2) == 2, "parts of two places are no passage"
    assert copied_words("weighs 2", examples, 4) == copied_words("", examples, 1) == 0
    assert copied_words("kilos and is red", examples[:1], 4) == 4, "there is one example alone"


@pytest.mark.parametrize("drop", [False, True])
def test_leaks_are_flagged_or_dropped(drop: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    question = Toy().examples("train")[3].question
    leak = f"Know that: {question} has an answer."

    def score(example: Example, prompts: Sequence[str]) -> float:
        return float(prompts[0] != "start")

    method = scored(score, [[leak]], leak_words=3, drop_leaks=drop)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, 1, 1).fit(method, Toy())
    rows = rows_of(tmp_path)
    assert rows[0]["leaked_words"] == 0
    assert [row["leaked_words"] for row in rows[1:]] == ([] if drop else [len(question.split())])
    assert ("repeats 3 words of a training example" in caplog.text) != drop
    assert len(method.pool) == (1 if drop else 2)


# --- runs -------------------------------------------------------------------------------------------------------------


def small(**settings: Any) -> Gepa:
    values = {"reflection": Reflection(2, 1.0, 8), "max_prompt_tokens": 60, "lm": LM, "text": "Say.", **settings}
    return Gepa(**values)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)  # type: ignore[attr-defined,index]
    return one == other


def test_a_resumed_run_continues_bit_by_bit(tmp_path: Path) -> None:
    def build(reward: Reward = AnswerLikelihood()) -> Gepa:
        layers = [LanguageLayer("Think.", max_new_tokens=2), LanguageLayer("Say.")]
        return small(layers=layers, reward=reward)

    L.seed_everything(3, verbose=False)
    trainer(tmp_path / "whole", 4).fit(build(), Toy(size=4))
    saved = tmp_path / "whole" / "saved" / "step=2.ckpt"
    L.seed_everything(3, verbose=False)
    trainer(tmp_path / "parts", 4).fit(build(), Toy(size=4), ckpt_path=saved, weights_only=True)
    one, other = (
        torch.load(tmp_path / name / "saved" / "step=4.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert same(one["text_prompts"], other["text_prompts"])
    assert one["gepa"] == other["gepa"]
    assert len(one["gepa"]["pool"]) > 1, "something was accepted"
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    with pytest.raises(UserError, match="scored with other validation examples;"):
        trainer(tmp_path / "other", 4).fit(build(), Toy(size=3), ckpt_path=saved, weights_only=True)
    rewarded = build(TokenF1())
    with pytest.raises(UserError, match="scored with other reward;"):
        trainer(tmp_path / "other", 4).fit(rewarded, Toy(size=4), ckpt_path=saved, weights_only=True)
    known = [build(Mixture([ExactMatch(), TokenF1()], weights)) for weights in ([1, 2], [2, 1], [1, 2])]
    for method in known:
        method.validation_hash = lambda: ""  # type: ignore[method-assign]
    assert known[0].score_settings() == known[2].score_settings() != known[1].score_settings()


def test_scores_and_choice_by_a_reward(tmp_path: Path) -> None:
    """Exact match is always 0 here; the reward tells candidates apart, and chooses the result."""
    L.seed_everything(1, verbose=False)
    method = small(reward=TokenF1(), max_new_tokens=3)
    fitting = trainer(tmp_path, 3, 1)
    fitting.fit(method, Toy(labels=False))
    for member in method.pool.members:
        answers = method.rollout(Toy(labels=False).examples("val"), member.prompts).answers
        texts = [answer.text for answer in answers]
        targets = [example.target for example in Toy(labels=False).examples("val")]
        assert member.scores == TokenF1()(texts, targets, [])
    assert method.prompt_memory.best == method.pool.best.prompts
    assert method.prompt_memory.best_accuracy == method.pool.best.mean
    assert "token f1" in method.describe()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"merges": -1}, "merges must not be negative"),
        ({"leak_words": 0}, "leak_words must be at least 1"),
        ({"layers": [LanguageLayer(learn=False)]}, "no layer learns"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Gepa(**settings)
    with pytest.raises(UserError, match=r"Reflection\.stop is empty"):
        Reflection(stop="")
    with pytest.raises(UserError, match=r"Reflection\.count must be at least 1"):
        Reflection(count=0)
