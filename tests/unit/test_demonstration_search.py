"""The search for demonstrations, against enumeration by hand with an LM whose answers follow a script."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.callbacks import Budget
from lightning_prompts.datamodules.base import SourceRow, TextDataModule
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, Server
from lightning_prompts.methods import DemonstrationSearch, FewShot
from lightning_prompts.search.demonstrations import (
    AddedDemonstrations,
    CandidateSource,
    ChangedDemonstrations,
    Demonstration,
    Draw,
    FewShotPrompt,
    RandomDemonstrations,
    demonstrations_of,
)
from lightning_prompts.search.scoring import Racing
from lightning_prompts.template import Template
from support.dln_toys import Given, Toy, generator, trainer
from support.models import TINY
from support.server import ServerProcess

LM = LMConfig(f"{TINY},max_position_embeddings=700")
TEMPLATE = "{prompt}Q{question}:{answer}\n"
Script = Callable[[tuple[int, ...], int], bool]  # the numbers of the demonstrations and of the question -> right


class Numbers(TextDataModule):
    """Numbered questions with their number as the answer; a script decides which of them the LM knows."""

    instruction = "Say it. "

    def __init__(self, pool: int = 4, val: int = 16, template: str = TEMPLATE) -> None:
        super().__init__(template=template, batch_size=2, eval_batch_size=8)
        self.pool, self.val = pool, val

    def load_rows(self) -> dict[str, list[SourceRow]]:
        sizes = {"train": range(10, 10 + self.pool), "val": range(40, 40 + self.val), "test": range(90, 94)}
        return {
            split: [SourceRow({"question": str(n), "answer": f"a{n}"}, f"row {n}") for n in numbers]
            for split, numbers in sizes.items()
        }


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[tuple[tuple[int, ...], int]]]:
    """Lets a script answer in place of the LM, and returns the list of what it will have been asked."""

    def use(right: Script) -> list[tuple[tuple[int, ...], int]]:
        asked: list[tuple[tuple[int, ...], int]] = []

        def generate(lm: FrozenLM, examples: Sequence[Any], prompt: Any, *args: Any) -> list[str]:
            written = []
            for example in examples:
                *shots, question = map(int, re.findall(r"Q(\d+)", f"{example.before}{prompt}{example.after}"))
                asked.append((tuple(shots), question))
                written.append(f"a{question}" if right(tuple(shots), question) else "none")
            lm.usage.calls += len(examples)
            return written

        monkeypatch.setattr(FrozenLM, "generate", generate)
        return asked

    return use


def chance(shots: tuple[int, ...], question: int) -> bool:
    """Arbitrary, and another one for each order of the same demonstrations."""
    return hashlib.blake2b(repr((shots, question)).encode()).digest()[0] < 100


def share(right: Script, shots: tuple[int, ...], questions: Sequence[int] = range(40, 56)) -> float:
    return sum(right(shots, question) for question in questions) / len(questions)


def subsets(pool: Sequence[int], most: int) -> list[tuple[int, ...]]:
    return [order for size in range(most + 1) for order in itertools.permutations(pool, size)]


def search(sources: list[CandidateSource], **settings: Any) -> DemonstrationSearch:
    values = {"text": "", "racing": None, "lm": LM, "max_new_tokens": 2, **settings}
    return DemonstrationSearch(sources=sources, **values)


def fit(method: DemonstrationSearch, folder: Path, data: TextDataModule, steps: int = 3) -> list[dict[str, Any]]:
    L.seed_everything(0)
    trainer(folder, steps, 1).fit(method, data)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] != "validation"]


def shots_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"Q(\d+)", text)))


def test_random_search_finds_what_enumeration_finds(script: Any, tmp_path: Path) -> None:
    script(chance)
    method = search([RandomDemonstrations(count=40, shots=2)])
    rows = fit(method, tmp_path, Numbers(), steps=5)
    everything = subsets(range(10, 14), 2)
    tried = {shots_of(row["prompt"]) for row in rows}
    assert tried == set(everything), "each candidate is drawn at some time"
    for row in rows:
        assert row["reward"] == share(chance, shots_of(row["prompt"]))
        assert row["scored"] == 16
    best = max(share(chance, shots) for shots in everything)
    assert method.prompt_memory.best_accuracy == best > share(chance, ())
    assert share(chance, shots_of(method.prompt_text())) == best
    assert share(chance, shots_of(method.prompt_text())[::-1]) < best, "the order matters"


def test_greedy_search_adds_the_best_example_each_time(script: Any, tmp_path: Path) -> None:
    script(chance)
    method = search([AddedDemonstrations(count=4, shots=3)])
    rows = fit(method, tmp_path, Numbers(), steps=4)
    current: tuple[int, ...] = ()
    for step in range(1, 5):
        tried = [(shots_of(row["prompt"]), row["reward"]) for row in rows if row["step"] <= step]
        more = [(*current, n) for n in range(10, 14) if n not in current] if len(current) < 3 else []
        assert {shots for shots, _ in tried} >= {current, *more}
        better = max(more, key=lambda shots: share(chance, shots), default=current)
        if share(chance, better) > share(chance, current):
            current = better
        (chosen,) = [shots_of(row["prompt"]) for row in rows if row["step"] == step and row["chosen"]]
        assert share(chance, chosen) == share(chance, current)
        current = chosen
    assert len(current) > 0


def test_order_matters_and_ties_go_to_the_first(script: Any, tmp_path: Path) -> None:
    script(lambda shots, question: shots[-2:] == (12, 10))
    method = search([ChangedDemonstrations(count=30, shots=2)], survivors=40)
    rows = fit(method, tmp_path, Numbers(), steps=6)
    assert shots_of(method.prompt_text()) == (12, 10)
    (first,) = [shots_of(row["prompt"]) for row in rows if row["step"] == 1 and row["chosen"]]
    assert first == (), "nothing is better, so nothing changes"


def test_a_race_keeps_the_winner_and_asks_less(script: Any, tmp_path: Path) -> None:
    def one_is_good(shots: tuple[int, ...], question: int) -> bool:
        return shots == (15,) or (12 not in shots and question % 4 == 0)

    counts = []
    for racing in (None, Racing(first=8, error=0.05)):
        asked = script(one_is_good)
        method = search([AddedDemonstrations(count=8, shots=1)], racing=racing)
        rows = fit(method, tmp_path / str(racing), Numbers(pool=8, val=32), steps=1)
        assert shots_of(method.prompt_text()) == (15,)
        assert method.prompt_memory.best_accuracy == 1
        counts.append(len(asked))
        scored = {shots_of(row["prompt"]): row["scored"] for row in rows}
        assert scored[(15,)] == scored[()] == 32
        assert scored[(12,)] == (32 if racing is None else 8)
    assert counts[1] < counts[0] / 2


def test_nothing_is_asked_twice(script: Any, tmp_path: Path) -> None:
    asked = script(chance)
    method = search([RandomDemonstrations(count=40, shots=2)])
    trainer(tmp_path, 4, 4).fit(method, Numbers())
    training = [key for key in asked if asked.count(key) > 1]
    best = shots_of(method.prompt_text())
    assert {shots for shots, _ in training} <= {best}, "a validation asks the chosen prompt again"
    assert method.calls == len(set(asked))


def test_a_resumed_search_goes_on_bit_by_bit(script: Any, tmp_path: Path) -> None:
    def build() -> DemonstrationSearch:
        return search([RandomDemonstrations(3, 2), ChangedDemonstrations(3, 3)], racing=Racing(2, 0.4))

    script(chance)
    fit(build(), tmp_path / "whole", Numbers(), steps=4)
    L.seed_everything(0)
    saved = tmp_path / "whole" / "saved" / "step=2.ckpt"
    trainer(tmp_path / "rest", 4, 1).fit(build(), Numbers(), ckpt_path=saved, weights_only=True)
    one, other = (
        torch.load(tmp_path / name / "saved" / "step=4.ckpt", weights_only=True) for name in ("whole", "rest")
    )
    assert one["demonstration_search"] == other["demonstration_search"]
    assert one["text_prompts"]["memory"] == other["text_prompts"]["memory"]
    assert (tmp_path / "whole" / "prompts.jsonl").read_text() == (tmp_path / "rest" / "prompts.jsonl").read_text()
    with pytest.raises(UserError, match="scored with other validation examples;"):
        trainer(tmp_path / "other", 4, 1).fit(build(), Numbers(val=12), ckpt_path=saved, weights_only=True)
    apart = search([RandomDemonstrations(3, 2)], separator="\n\n")
    with pytest.raises(UserError, match="scored with other separator;"):
        trainer(tmp_path / "other", 4, 1).fit(apart, Numbers(), ckpt_path=saved, weights_only=True)


def test_scores_of_other_examples_are_not_mixed_in(script: Any, tmp_path: Path) -> None:
    script(chance)
    method = search([RandomDemonstrations(3, 2)])
    fit(method, tmp_path / "one", Numbers())
    fit(method, tmp_path / "again", Numbers())
    with pytest.raises(UserError, match="scored with other validation examples;"):
        fit(method, tmp_path / "other", Numbers(val=12))


def test_a_budget_stops_with_the_best_so_far(script: Any, tmp_path: Path) -> None:
    script(chance)
    method, fitting = search([RandomDemonstrations(2, 2)]), trainer(tmp_path, 100, 100)
    fitting.callbacks.append(budget := Budget(calls=100))  # type: ignore[attr-defined]
    L.seed_everything(0)
    fitting.fit(method, Numbers())
    assert fitting.global_step < 20
    assert 100 <= budget.used["calls"] < 100 + 2 * 16
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    best = max(row["reward"] for row in rows if "reward" in row)
    assert method.prompt_memory.best_accuracy == best == share(chance, shots_of(method.prompt_text()))


@pytest.mark.parametrize("limit", [{"calls": 10_000}, {"tokens": 10_000}])
def test_a_search_that_has_tried_everything_ends(
    limit: dict[str, int],
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though it never uses up its budget."""
    monkeypatch.setattr("lightning_prompts.callbacks.budget.IDLE", 3)
    script(chance)
    fitting = trainer(tmp_path, -1, 100)
    fitting.callbacks.append(Budget(**limit))  # type: ignore[attr-defined]
    fitting.fit(search([AddedDemonstrations(8, 2)]), Numbers())
    assert fitting.global_step == 2 + 3
    assert "the last 3 steps used no language model" in caplog.text


class Uneven(Numbers):
    """Some training answers are long, and one training question is in another split."""

    def load_rows(self) -> dict[str, list[SourceRow]]:
        rows = super().load_rows()
        rows["train"][0] = replace(rows["train"][0], fields={"question": "10", "answer": "very " * 14})
        for place, split in ((1, "val"), (2, "test")):
            rows["train"][place] = replace(rows[split][0], source=f"copy of {split}")
        return rows


@pytest.mark.parametrize("limit", ["max_prompt_tokens", "the window"])
def test_long_candidates_are_refused_and_recorded(
    limit: str, script: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script(chance)
    settings: dict[str, Any] = {"max_prompt_tokens": 60}
    if limit == "the window":
        settings = {"lm": LMConfig(f"{TINY},max_position_embeddings=80")}
    rows = fit(search([AddedDemonstrations(8, 1)], **settings), tmp_path, Uneven(), steps=2)
    refused = [row for row in rows if row["reward"] is None]
    assert [(shots_of(row["prompt"]), row["scored"], row["chosen"]) for row in refused] == [((10,), 0, False)]
    assert {shots_of(row["prompt"]) for row in rows} == {(), (10,), (13,)}, "no question of another split"
    assert "2 training questions are also in another split" in caplog.text


def test_questions_of_other_splits_are_no_demonstrations(tmp_path: Path) -> None:
    class Same(Numbers):
        def load_rows(self) -> dict[str, list[SourceRow]]:
            rows = super().load_rows()
            return {**rows, "train": rows["val"]}

    with pytest.raises(UserError, match="each asks a question of another split"):
        trainer(tmp_path, 1).fit(search([RandomDemonstrations()]), Same())
    shared = Numbers().examples("val")
    assert demonstrations_of([*shared, *shared[:2]], shared[2:]) == [Demonstration.of(one) for one in shared[:2]]


def test_instructions_are_searched_with_the_examples(script: Any, tmp_path: Path) -> None:
    script(lambda shots, question: question % 2 == 0 or shots == (11,))
    method = search([AddedDemonstrations(4, 1)], text=None, instructions=[Given(("Go. ", "Say it. "))])
    rows = fit(method, tmp_path, Numbers(), steps=2)
    found = {(row["step"], row["prompt"]) for row in rows if row["kind"] == "Given"}
    assert found == {(1, "Go. "), (2, "Go. Q11:a11\nGo. ")}
    assert method.prompt_text() == "Say it. Q11:a11\nSay it. "
    assert {row["kind"] for row in rows} == {"current", "memory", "AddedDemonstrations", "Given"}


def test_instructions_alone_can_follow_the_question(script: Any, tmp_path: Path) -> None:
    script(lambda shots, question: question % 2 == 0)
    method = search([], text="Say it.", instructions=[Given(("Go.",))])
    fit(method, tmp_path, Numbers(template="Q{question} {prompt}\n{answer}"), steps=1)
    assert method.prompt_text() == "Say it."
    assert method.prompt_memory.best_accuracy == 0.5


def test_the_window_limits_prompts_in_a_second_fit(script: Any, tmp_path: Path) -> None:
    """Also of a method that was tested before."""
    script(chance)
    method = search([AddedDemonstrations(8, 1)], lm=LMConfig(f"{TINY},max_position_embeddings=80"))
    trainer(tmp_path / "test", 1).test(method, Uneven(), verbose=False)
    rows = fit(method, tmp_path, Uneven(), steps=1)
    assert [shots_of(row["prompt"]) for row in rows if row["reward"] is None] == [(10,)]


@pytest.mark.parametrize(
    "template", [TEMPLATE, "Here are two{prompt} {question} and {answer}", "{prompt}\n\n{question}\n{answer}"]
)
@pytest.mark.parametrize("text", ["", " opposites"])
def test_the_slot_reads_as_few_shot_does(template: str, text: str, tmp_path: Path) -> None:
    data, few = Numbers(template=template), FewShot(3, text=text, lm=LM, max_new_tokens=2)
    L.seed_everything(5)
    trainer(tmp_path, 1).test(few, data, verbose=False)
    drawn = random.Random(5).sample(data.examples("train"), 3)
    prompt = FewShotPrompt(text, tuple(map(Demonstration.of, drawn)))
    assert prompt.solved() == few.demonstrations
    asked = data.examples("test")[0]
    (shown,) = few.prepare([asked])
    assert f"{asked.before}{prompt.write(asked.before)}{asked.after}" == f"{shown.before}{text}{shown.after}"
    assert shown.before.count(f"a{drawn[0].question}") == 1
    assert FewShotPrompt(text).write(asked.before) == text, "without examples, nothing is repeated"


@pytest.mark.parametrize("text", ["{prompt} {question} is {answer}\n", "{prompt} {question}\n{answer}", TEMPLATE])
def test_solved_examples_in_a_chat_read_as_without_one(text: str) -> None:
    fields = {"question": "hot", "answer": "cold"}
    chat, plain = (Demonstration.of(Template(text, chat=chat).render(fields)) for chat in (True, False))
    assert chat == plain
    layer = PlacedLayer(LanguageLayer(template=text), 0, 1)
    placed = layer.place(Template("{question}{prompt}\n\n{answer}\n", chat=True).render(fields))
    assert Demonstration.of(placed).write("Say", "\n") == plain.write("Say", "\n")


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    infill = Numbers(template="{question} is{prompt} {answer}\n")
    with pytest.raises(UserError, match="the text before it must be the same for all examples"):
        trainer(tmp_path, 1).fit(search([RandomDemonstrations()]), infill)
    fitting = trainer(tmp_path, 1)
    fitting.limit_val_batches = 0
    with pytest.raises(UserError, match="give data a validation split"):
        fitting.fit(search([RandomDemonstrations()]), Numbers())
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: search([]), "sources is empty"),
        (lambda: search([RandomDemonstrations()], survivors=0), "survivors must be at least 1"),
        (lambda: RandomDemonstrations(count=0), r"RandomDemonstrations\.count must be at least 1"),
        (lambda: RandomDemonstrations(shots=2, fewest=3), r"fewest \(3\) is above shots \(2\)"),
        (lambda: AddedDemonstrations(shots=0), r"AddedDemonstrations\.shots must be at least 1"),
        (lambda: ChangedDemonstrations(count=0), r"ChangedDemonstrations\.count must be at least 1"),
    ]
    for make, message in wrong:
        with pytest.raises(UserError, match=message):
            make()


def test_neighbours_and_keys() -> None:
    template = Template(TEMPLATE)
    pool = [Demonstration.of(template.render({"question": str(n), "answer": "x"})) for n in range(5)]
    prompt = FewShotPrompt("Go. ", tuple(pool[:3]))
    numbers = {
        "added": prompt.added(pool[3]),
        "added first": prompt.added(pool[3], 0),
        "dropped": prompt.dropped(1),
        "replaced": prompt.replaced(0, pool[4]),
        "swapped": prompt.swapped(0, 2),
        "reordered": prompt.reordered([1, 2, 0]),
    }
    assert {name: shots_of(one.solved()) for name, one in numbers.items()} == {
        "added": (0, 1, 2, 3),
        "added first": (3, 0, 1, 2),
        "dropped": (0, 2),
        "replaced": (4, 1, 2),
        "swapped": (2, 1, 0),
        "reordered": (1, 2, 0),
    }
    everything = [prompt, prompt.with_instruction("Say."), *numbers.values()]
    assert len({one.key for one in everything}) == len(everything)
    assert all(FewShotPrompt.of_state(one.state()) == one for one in everything)
    assert prompt.swapped(0, 2).swapped(2, 0) == prompt
    draw = Draw([prompt], pool, generator())
    changed = ChangedDemonstrations(200, 3).propose(draw)
    assert all(len(set(one.demonstrations)) == len(one.demonstrations) <= 3 for one in changed)
    assert {len(one.demonstrations) for one in changed} == {2, 3}
    assert prompt not in changed
    assert ChangedDemonstrations(2, 1).propose(Draw([FewShotPrompt("")], [], generator())) == []
    sizes = {len(one.demonstrations) for one in RandomDemonstrations(100, 4, fewest=2).propose(draw)}
    assert sizes == {2, 3, 4}


def test_classes_and_free_text_behind_a_server(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    there = LMConfig("tiny", server=Server(server.url, None, log_probs=True))
    for labels in (False, True):
        found = []
        for lm in (LM, there):
            method = search([RandomDemonstrations(3, 2)], text="Say.", racing=Racing(4, 0.4), lm=lm)
            fit(method, tmp_path / f"{labels} {lm.name[:5]}", Toy(labels, size=5), steps=1)
            found.append((tmp_path / f"{labels} {lm.name[:5]}" / "prompts.jsonl").read_text())
        assert found[0] == found[1]
