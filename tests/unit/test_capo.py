"""CAPO against enumeration: races with several winners, the length penalty, crossover, mutation, and resuming."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.proposals import Crossover, InducedInstructions, Paraphrases, Proposal, Request
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import Capo, DeepLanguageNetwork, DemonstrationSearch
from lightning_prompts.search.demonstrations import Demonstration, Draw, FewShotPrompt
from lightning_prompts.search.scoring import Racing, race_losses
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.dln_toys import Toy, generator, trainer
from support.models import TINY

LM = LMConfig(f"{TINY},max_position_embeddings=900,initializer_range=0.2")
POOL = [Demonstration("", f"\n\nq{n}\n\nAnswer:", f" a{n}\n") for n in range(6)]


# --- races ------------------------------------------------------------------------------------------------------------


def stays_by_hand(losses: Sequence[Sequence[float]], examples: int, keep: int, error: float) -> list[bool]:
    """Compare each candidate with the last of the winners so far: a one-sided test on paired differences."""
    order = sorted(range(len(losses)), key=lambda c: statistics.mean(losses[c]))
    rival, seen = losses[order[min(keep, len(losses)) - 1]], len(losses[0])
    found = []
    for line in losses:
        difference = [mine - its for mine, its in zip(line, rival, strict=True)]
        error_of_mean = statistics.stdev(difference) * math.sqrt((examples - seen) / (examples - 1) / seen)
        found.append(statistics.mean(difference) <= statistics.NormalDist().inv_cdf(1 - error) * error_of_mean)
    return found


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_a_race_with_several_winners(keep: int) -> None:
    racing = Racing(4, 0.2)
    for seed in range(30):
        losses = torch.rand(6, 5, generator=generator(seed), dtype=torch.double)
        expected = stays_by_hand(losses.tolist(), 20, keep, 0.2)
        stays = racing.remaining(losses, 20, keep)
        assert stays.tolist() == expected
        assert stays[losses.mean(-1).argsort()[:keep]].all()
        if keep == 1:
            assert torch.equal(stays, racing.remaining(losses, 20))


def test_winners_are_scored_on_everything() -> None:
    losses = torch.rand(8, 32, generator=generator(3)) + torch.arange(8)[:, None]
    asked: list[tuple[list[int], int, int]] = []

    def of(alive: torch.Tensor, part: slice) -> torch.Tensor:
        asked.append((alive.tolist(), part.start, part.stop))
        return losses[alive, part]

    offsets = torch.zeros(8)
    offsets[0] = 2.5  # it is the third now
    found = race_losses(of, 32, Racing(4, 0.05), offsets, keep=3)
    assert asked[0] == (list(range(8)), 0, 4)
    assert asked[-1] == ([0, 1, 2], 4, 32), "once there are no more than the winners, they are scored on the rest"
    expected = losses.mean(-1) + offsets
    assert torch.allclose(found[:3], expected[:3])
    assert found[3:].isinf().all()


# --- operators --------------------------------------------------------------------------------------------------------


def draw_of(parents: Sequence[FewShotPrompt], seed: int) -> Draw:
    return Draw(parents, POOL, generator(seed))


def test_crossover_takes_half_of_both_parents_examples() -> None:
    one, other = FewShotPrompt("A", tuple(POOL[:3])), FewShotPrompt("B", (POOL[2], POOL[3]))
    found = Counter(Capo.crossed(one, other, "AB", draw_of([one, other], seed)) for seed in range(800))
    assert {child.instruction for child in found} == {"AB"}
    assert set(found) == {FewShotPrompt("AB", pair) for pair in itertools.permutations(POOL[:4], 2)}, "5 // 2 of 4"
    assert min(found.values()) > 800 / 12 / 2
    assert Capo.crossed(one, other, "", draw_of([one, other], 0)).instruction == "A"
    empty = FewShotPrompt("C")
    assert Capo.crossed(empty, FewShotPrompt("D", (POOL[0],)), "CD", draw_of([empty], 0)) == FewShotPrompt("CD")


def test_mutation_adds_drops_or_keeps_an_example() -> None:
    method = Capo(shots=3, lm=LM)

    def sizes(count: int, pool: Sequence[Demonstration] = POOL) -> Counter[int]:
        parent = FewShotPrompt("A", tuple(POOL[:count]))
        made = [method.mutated(parent, "B", Draw([parent], pool, generator(seed))) for seed in range(900)]
        for child in made:
            assert child.instruction == "B"
            assert len(set(child.demonstrations)) == len(child.demonstrations)
            assert len(set(parent.demonstrations) - set(child.demonstrations)) <= 1
        assert len({child.demonstrations for child in made}) > count, "they are shuffled"
        return Counter(len(child.demonstrations) for child in made)

    for size, count in sizes(2).items():
        assert size in (1, 2, 3)
        assert count == pytest.approx(300, abs=60)
    assert sizes(3)[3] == pytest.approx(600, abs=60), "no more than shots"
    assert sizes(3).keys() == {2, 3}
    assert sizes(0).keys() == {0, 1}
    assert sizes(2, POOL[:2]).keys() == {1, 2}, "there is nothing to add"


def test_the_question_that_combines_two_instructions() -> None:
    method, written = Capo(lm=LM), []
    method.configure_model()

    def draw(examples: Sequence[Example], *args: Any) -> list[str]:
        written.extend(example.before for example in examples)
        return ["**Combined instruction:** both", ' "New." ']

    method.proposer.draw = draw  # type: ignore[method-assign]
    request = Request(["one", "two", "three", "four"], [], [], BanditStats(), generator(), method.proposer)
    made = Crossover(2).propose(request)
    assert [(each.text, each.parent, each.kind) for each in made] == [
        ("both", "one", "Crossover"),
        ("New.", "three", "Crossover"),
    ]
    assert "First instruction: one\n\nSecond instruction: two\n" in written[0]
    assert "First instruction: three\n\nSecond instruction: four\n" in written[1]


@pytest.mark.parametrize("setting", ["proposals", "instructions"])
def test_crossover_is_no_source_for_one_parent(setting: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DeepLanguageNetwork if setting == "proposals" else DemonstrationSearch)
    for source in (Crossover, Paraphrases):
        words = [f"--{setting}", json.dumps([{"class_path": f"{source.__module__}.{source.__name__}"}])]
        with nullcontext() if source is Paraphrases else pytest.raises(ArgumentError, match="Crossover"):
            parser.parse_args(words)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guessed(InducedInstructions):
    """The same instructions every time."""

    texts: tuple[str, ...] = ()

    def propose(self, request: Request) -> list[Proposal]:
        return [Proposal(text, request.parents[0], "Guessed") for text in self.texts]


@dataclass(frozen=True)
class Joined(Crossover):
    """The instructions of a pair, joined."""

    def propose(self, request: Request) -> list[Proposal]:
        pairs = zip(request.parents[::2], request.parents[1::2], strict=True)
        return [Proposal(f"{one}+{other}", one, "Joined") for one, other in pairs]


@dataclass(frozen=True)
class Marked(Paraphrases):
    """The parents in turn, each with a mark."""

    def propose(self, request: Request) -> list[Proposal]:
        parents = [request.parents[index % len(request.parents)] for index in range(self.count)]
        return [Proposal(f"{parent}!", parent, "Marked") for parent in parents]


class Scored(Capo):
    """Right answers from the text of the prompt alone: the more different letters, the more."""

    def right(self, prompts: Sequence[str], examples: Sequence[Example]) -> list[list[bool]]:
        places = [self.validation.index(example) for example in examples]
        return [[place < self.good(prompt) for place in places] for prompt in prompts]

    @staticmethod
    def good(prompt: str) -> int:
        return len(set(prompt) & set("ABCDEF"))


def scripted(**settings: Any) -> Scored:
    values: dict[str, Any] = {
        "text": "A",
        "induced": Guessed(texts=("B", "AB", "ABC", "A")),
        "crossover": Joined(3),
        "mutation": Marked(4),
        "population": 3,
        "shots": 2,
        "racing": None,
        "length_penalty": 0.1,
        "lm": LM,
        **settings,
    }
    return Scored(**values)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] != "validation"]


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_best_by_accuracy_less_length_survive(penalty: float, tmp_path: Path) -> None:
    method = scripted(length_penalty=penalty)
    L.seed_everything(1, verbose=False)
    trainer(tmp_path, 3, 3).fit(method, Toy())
    rows, count = rows_of(tmp_path), method.language_model.count
    full = method.write(FewShotPrompt("A", tuple(method.pool[:2])))

    def value(prompt: str) -> float:
        return method.good(prompt) / 12 - penalty * count(prompt) / count(full)

    assert method.value(method.survivors[0]) == pytest.approx(value(method.prompts[0]))
    first = [row for row in rows if row["step"] == 1]
    assert [row["kind"] for row in first] == ["current", "initial", "Guessed", "Guessed", "Guessed"]
    assert all(row["shots"] <= 2 for row in rows)
    for step in (1, 2, 3):
        mine = [row for row in rows if row["step"] == step]
        for row in mine:
            assert (row["reward"], row["scored"]) == (round(method.good(row["prompt"]) / 12, 5), 12)
            assert row["tokens"] == count(row["prompt"])
        best = sorted((row["prompt"] for row in mine), key=lambda prompt: -value(prompt))[:3]
        after = [row["prompt"] for row in rows if row["step"] == step + 1 and row["kind"] in ("current", "memory")]
        assert after == best or step == 3
        assert [row["prompt"] for row in mine if row["chosen"]] == best[:1]
        children = [row for row in mine if row["kind"] == "child"]
        assert (len(children) in (1, 2, 3, 4)) == (step > 1)
        for row in children:
            assert row["prompt"].endswith("!")
    assert method.prompt_memory.best == method.prompts
    assert method.prompt_memory.best_accuracy == pytest.approx(value(method.prompts[0]))
    if not penalty:
        assert method.good(method.prompts[0]) == max(method.good(row["prompt"]) for row in rows)
    else:
        assert count(method.prompts[0]) < 10, "a short one is enough"


def test_instructions_alone_need_no_demonstrations(tmp_path: Path) -> None:
    """Not even a template that has room for some."""
    method, data = scripted(shots=0, length_penalty=0.0), Toy()
    data.template = Template("{question} {prompt}\n{answer}")
    L.seed_everything(1, verbose=False)
    trainer(tmp_path, 2, 2).fit(method, data)
    assert {row["shots"] for row in rows_of(tmp_path)} == {0}
    assert method.good(method.prompts[0]) == 3


def test_leaks_in_instructions_are_flagged_or_dropped(tmp_path: Path) -> None:
    question = Toy().examples("train")[3].question
    for drop in (False, True):
        method = scripted(induced=Guessed(texts=(f"ABC {question}",)), leak_words=3, drop_leaks=drop)
        trainer(tmp_path / str(drop), 1, 1).fit(method, Toy())
        rows = rows_of(tmp_path / str(drop))
        leaked = [row["leaked_words"] for row in rows if row["kind"] == "Guessed"]
        assert leaked == ([] if drop else [len(question.split())])
        assert {row["leaked_words"] for row in rows if row["kind"] != "Guessed"} == {0}, "solved examples do not count"


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    def build() -> Capo:
        return Capo(
            "Say.",
            InducedInstructions(3, 1, 1.0, 6),
            Crossover(2, 1.0, 6),
            Paraphrases(3, 1.0, 6),
            3,
            2,
            racing=Racing(2, 0.4),
            lm=LM,
        )

    L.seed_everything(3, verbose=False)
    trainer(tmp_path / "whole", 4).fit(build(), Toy(size=5))
    saved = tmp_path / "whole" / "saved" / "step=2.ckpt"
    L.seed_everything(3, verbose=False)
    trainer(tmp_path / "parts", 4).fit(build(), Toy(size=5), ckpt_path=saved, weights_only=True)
    one, other = (
        torch.load(tmp_path / name / "saved" / "step=4.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert one["demonstration_search"] == other["demonstration_search"]
    assert one["text_prompts"]["memory"] == other["text_prompts"]["memory"]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    assert "child" in {row["kind"] for row in rows_of(tmp_path / "whole")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"population": 1}, "population must be at least 2"),
        ({"shots": -1}, "shots must not be negative"),
        ({"length_penalty": -0.1}, "length_penalty must be a finite number of at least 0"),
        ({"leak_words": 0}, "leak_words must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Capo(**settings)
