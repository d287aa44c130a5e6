"""Datasets with classes: labels by name, options of questions, generated reasoning, batches with equal classes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prompts.cli import run
from lightning_prompts.datamodules import BigBenchHard, Classification, Hyperbaton, Navigate, TextDataModule, sources
from lightning_prompts.datamodules.labels import parse_options
from lightning_prompts.datamodules.samplers import BalancedSampler
from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch, Example
from support.models import TINY

START = "If you follow these instructions, do you return to the starting point?"
YES_NO = "\nOptions:\n- Yes\n- No"


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def bbh_file(folder: Path, rows: list[tuple[str, str]], name: str = "bbh.json") -> str:
    """Rows as BIG-Bench Hard has them."""
    examples = [{"input": question, "target": target} for question, target in rows]
    (folder / name).write_text(json.dumps({"canary": "none", "examples": examples}))
    return str(folder / name)


def big_bench_file(folder: Path, rows: list[tuple[str, dict[str, int]]], prefix: str = START) -> str:
    """Rows as BIG-bench has them, behind other lists."""
    examples = [{"input": question, "target_scores": scores} for question, scores in rows]
    document = {"name": "x", "keywords": ["logic"], "task_prefix": prefix, "examples": examples}
    (folder / "task.json").write_text(json.dumps(document))
    return str(folder / "task.json")


def sentences(count: int, classes: int, name: str = "s") -> list[dict[str, Any]]:
    return [{"sentence": f"{name} {n}", "label": str(n % classes)} for n in range(count)]


def everything(data: TextDataModule) -> list[Example]:
    return [example for split in ("train", "val", "test") for example in data.examples(split)]


# Classification


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("mpqa", ["negative", "positive"]),
        ("sst2", ["negative", "positive"]),
        ("subj", ["subjective", "objective"]),
        ("trec", ["description", "entity", "expression", "human", "location", "number"]),
    ],
)
def test_labels_become_names(task: Any, names: list[str], tmp_path: Path) -> None:
    values: list[Any] = [*range(len(names)), *map(str, range(len(names))), *names, *map(str.upper, names)]
    rows = [{"sentence": f"s {n}", "label": value} for n, value in enumerate(values * 3)]
    data = Classification(task, train=write(tmp_path, rows), val_size=3, test_size=2)
    assert {split: len(data.examples(split)) for split in ("train", "val", "test")} == {
        "train": len(rows) - 5,
        "val": 3,
        "test": 2,
    }
    for example in everything(data):
        expected = int(example.question.split()[1]) % len(names)
        assert example.labels == tuple((name,) for name in names)
        assert (example.reference, example.label) == (names[expected], expected)
        assert example.answer == f" {names[expected]}"
        assert (example.before, example.after) == ("", f"\n\n{example.question}\n\nAnswer:")
        assert example.fields["stripped"] == example.question


def test_labels_setting_gives_the_verbalisers(tmp_path: Path) -> None:
    file = write(tmp_path, [{"q": f"s {n}", "y": n % 6} for n in range(60)])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{class_path: Classification, init_args: {{task: trec, train: {file}, sentence: q, label: y, "
        "val_size: 6, test_size: 6, labels: {expression: [abbreviation, expression], human: [person]}}}\n"
    )
    folder = tmp_path / "run"
    words = ["test", "-c", str(config), "--model", "FixedPrompt", "--model.lm.name", TINY, "--verbose", "false"]
    assert run([*words, "--model.lm.dtype", "float32", "--trainer.default_root_dir", str(folder)]) == 0
    answers = {json.loads(line)["answer"] for line in (folder / "predictions.jsonl").read_text().splitlines()}
    assert answers <= {"description", "entity", "abbreviation", "person", "location", "number"}
    data = Classification(
        "trec",
        train=file,
        sentence="q",
        label="y",
        val_size=6,
        test_size=6,
        labels={"expression": ["abbreviation", "expression"], "human": ["person"]},
    )
    written = ("description",), ("entity",), ("abbreviation", "expression"), ("person",), ("location",), ("number",)
    for example in everything(data):
        assert example.labels == written
        assert example.label == int(example.question.split()[1]) % 6


def test_order_maps_numbers_to_classes(tmp_path: Path) -> None:
    file = write(tmp_path, sentences(30, 2))
    data = Classification("subj", train=file, order=["objective", "subjective"], val_size=5, test_size=5)
    assert {(int(e.question.split()[1]) % 2, e.reference) for e in everything(data)} == {
        (0, "objective"),
        (1, "subjective"),
    }


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"sentence": "x", "label": 2}, r"rows.jsonl row 31: label 2 is unknown; known labels: 0 negative, 1 pos"),
        ({}, {"sentence": "x", "label": "neutral"}, r"row 31: label 'neutral' is unknown; known labels: 0 negative"),
        ({}, {"sentence": "x", "label": -1}, r"row 31: label -1 is unknown"),
        ({}, {"sentence": " ", "label": 1}, "row 31: field 'sentence' is empty"),
        ({}, {"text": "x", "label": 1}, "row 31 has no field 'sentence'"),
        ({"labels": {"bad": ["x"]}}, None, "data.labels: sst2 has no class 'bad'; known: negative, positive"),
        ({"labels": {"negative": []}}, None, "data.labels: negative has no verbaliser"),
        ({"labels": {"negative": ["positive"]}}, None, "'positive' and 'positive' share the verbaliser 'positive'"),
        ({"order": ["positive"]}, None, "data.order must name each class of sst2 once: negative, positive"),
        ({"task": "sst3"}, None, "data.task 'sst3' is unknown; did you mean sst2"),
        ({"val_size": 0}, None, "data.val_size must be at least 1"),
        ({"val_size": 25}, None, "data.val_size 25 and data.test_size 5 of 30 training rows leave nothing to train on"),
        ({"balanced": True, "labels": {"negative": [""]}}, None, "label 0 has an empty verbaliser"),
    ],
)
def test_invalid_classification_data_raises(settings: dict[str, Any], row: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, [*sentences(30, 2), *([row] if row else [])])
    with pytest.raises(UserError, match=message) as error:
        Classification(**{"train": file, "val_size": 5, "test_size": 5, **settings}).examples("train")
    assert "\n" not in str(error.value)


def test_no_sentence_is_in_two_splits(tmp_path: Path) -> None:
    test, val = write(tmp_path, sentences(9, 2, "t"), "t.jsonl"), write(tmp_path, sentences(9, 2, "v"), "v.jsonl")
    rows = sentences(30, 2) + sentences(30, 2) + sentences(20, 2, "T") + sentences(20, 2, "v")
    data = Classification(train=write(tmp_path, rows), test=test, val=val, test_size=5)
    assert (len(data.examples("test")), len(data.examples("val"))) == (5, 9)
    asked = [example.question for example in data.examples("train")]
    assert len(asked) == 30 + 11 + 11, "also the test rows that were not drawn are kept from training"
    assert len(set(asked)) == len(asked)
    with pytest.raises(UserError, match=r"all 9 val rows are rows of another split too; give data\.val another"):
        Classification(train=write(tmp_path, rows), test=test, val=test).examples("train")
    other = Classification(train=write(tmp_path, rows), test=test, val=val, test_size=5, seed=1)
    assert other.examples("test") != data.examples("test")
    assert len(Classification(train=write(tmp_path, sentences(900, 2))).examples("train")) == 394


@pytest.mark.parametrize(
    ("data", "asked", "row", "answer"),
    [
        (Classification("sst2"), ("stanfordnlp/sst2", None), {"idx": 0, "sentence": "S", "label": 1}, "positive"),
        (Classification("mpqa"), ("rahulsikder223/SentEval-MPQA", None), {"sentence": "S", "label": 0}, "negative"),
        (Classification("subj"), ("SetFit/subj", None), {"text": "S", "label": 0, "label_text": "?"}, "objective"),
        (
            Classification("trec"),
            ("SetFit/TREC-QC", None),
            {"text": "S", "label": 3, "label_text": "other", "label_coarse": 1, "label_coarse_original": "ABBR"},
            "expression",
        ),
        (BigBenchHard("navigate"), ("SaylorTwift/bbh", "navigate"), {"input": f"S{YES_NO}", "target": "No"}, "No"),
    ],
)
def test_hub_rows(
    data: TextDataModule, asked: tuple[str, str | None], row: dict[str, Any], answer: str, monkeypatch: Any
) -> None:
    import datasets

    field = "text" if "text" in row else "sentence" if "sentence" in row else "input"

    def rows(*args: object, split: str, streaming: bool) -> Any:
        assert args == asked
        assert streaming
        return [{**row, field: row[field].replace("S", f"{split} {n}")} for n in range(600)]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *args, **kwargs: None)
    found = everything(data)
    assert {example.reference for example in found} == {answer}
    assert all(example.label is not None for example in found)
    assert len({example.question for example in found}) == len(found)


def test_invalid_hub_rows_are_dropped(monkeypatch: Any, caplog: Any) -> None:
    import datasets

    rows = [{"input": f"{n}?\nOptions:\n(A) x\n(B) y", "target": "(C)" if n == 7 else "(A)"} for n in range(250)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *args, **kwargs: None)
    assert len(everything(BigBenchHard("ruin_names"))) == 249
    assert "1 of 250 train rows dropped: " in caplog.text
    assert "row 8: label '(C)' is unknown; known labels: (A), (B)" in caplog.text


def test_a_balanced_validation_set(tmp_path: Path) -> None:
    """Of a training file with three of one class to one of the other; nothing is in two splits."""
    rows = [{"sentence": f"sentence {n}", "label": int(n % 4 == 0)} for n in range(80)]
    file = write(tmp_path, rows)
    data = Classification("mpqa", train=file, balanced_val=True, val_size=17, test_size=10, max_train_examples=None)
    splits = {split: data.examples(split) for split in ("train", "val", "test")}
    assert Counter(example.label for example in splits["val"]) == {0: 8, 1: 8}
    questions = [example.question for examples in splits.values() for example in examples]
    assert len(questions) == len(set(questions)) == 80
    own = write(tmp_path, [{**row, "sentence": f"v {row['sentence']}"} for row in rows], "v.jsonl")
    whole = Classification(
        "mpqa", train=file, val=own, test=write(tmp_path, sentences(9, 2, "t"), "t.jsonl"), balanced_val=True
    )
    assert Counter(example.label for example in whole.examples("val"))[0] == 20, "all of a file of its own"
    same = Classification("mpqa", train=file, balanced_val=True, val_size=17, test_size=10)
    assert [example.question for example in same.examples("val")] == [one.question for one in splits["val"]]
    for settings, words in (
        ({"val_size": 1}, "val_size 1 is less than one row of each of 2 classes"),
        ({"task": "trec", "train": write(tmp_path, sentences(11, 6), "u.jsonl")}, "balanced_val needs a row"),
    ):
        with pytest.raises(UserError, match=words):
            Classification(**{"task": "mpqa", "train": file, "balanced_val": True, **settings}).examples("val")


@pytest.mark.parametrize("name", ["Classification", "BigBenchHard"])
def test_without_a_network_one_line_names_the_option(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(sources.HfApi, "dataset_info", unreachable)
    assert (
        run(
            [
                "test",
                "--model",
                "FixedPrompt",
                "--data",
                name,
                "--model.lm.name",
                TINY,
                "--trainer.default_root_dir",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "give local files: --data.train FILE" in line


# BIG-Bench Hard


@pytest.mark.parametrize(
    ("question", "text", "options", "labels"),
    [
        ("Which?\nOptions:\n(A) red\n(B) blue, or so", "Which?", ("red", "blue, or so"), (("(A)", "A"), ("(B)", "B"))),
        ("So?\nOptions:\n- valid \n- invalid", "So?", ("valid", "invalid"), (("valid",), ("invalid",))),
        ("Options:\nare many\nOptions:\n- Yes\n- No\n", "Options:\nare many", ("Yes", "No"), (("Yes",), ("No",))),
        ("not ( True ) is", "not ( True ) is", (), ()),
        ("What?\nOptions:\n(A) red\n(C) blue", "What?\nOptions:\n(A) red\n(C) blue", (), ()),
        ("What?\nOptions:\nnone", "What?\nOptions:\nnone", (), ()),
    ],
)
def test_options(question: str, text: str, options: tuple[str, ...], labels: tuple[tuple[str, ...], ...]) -> None:
    choices = parse_options(question)
    assert (choices.text, choices.options, choices.labels) == (text, options, labels)
    assert parse_options(choices.question) == choices


def test_options_are_the_classes(tmp_path: Path) -> None:
    rows = [
        (f"Which {n}?\nOptions:\n(A) red\n(B) blue{n}{'' if n % 2 else chr(10) + '(C) x'}", "(B)") for n in range(20)
    ]
    rows += [("By its letter?\nOptions:\n(A) red\n(B) blue", "A"), ("As it is?\nOptions:\n(A) red\n(B) Blue", "blue")]
    data = BigBenchHard("any", train=bbh_file(tmp_path, rows), val_size=4)
    found = {str(example.fields["stripped"]): example for example in everything(data)}
    assert len(found) == 22
    assert found["Which 1?"].labels == (("(A)", "A"), ("(B)", "B"))
    assert found["Which 2?"].labels == (("(A)", "A"), ("(B)", "B"), ("(C)", "C"))
    assert {example.label for text, example in found.items() if text.startswith("Which")} == {1}
    assert (found["By its letter?"].answer, found["As it is?"].answer) == (" (A)", " (B)")
    assert found["Which 1?"].after == "\n\nWhich 1?\nOptions:\n(A) red\n(B) blue1\n\nAnswer:"
    short = BigBenchHard("any", train=bbh_file(tmp_path, rows), val_size=4, template="{prompt}\n{stripped}\n{answer}")
    assert {example.after for example in everything(short)} == {f"\n{text}" for text in found}


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (["True", "False"], (("False",), ("True",))),
        (["yes", "no"], (("no",), ("yes",))),
        (["3", "4"], ()),  # object_counting
        ([f"word{n} list" for n in range(20)], ()),  # word_sorting
        ([*["] )"] * 19, "} >"], ()),  # dyck_languages, if it were small
    ],
)
def test_few_targets_are_classes(targets: list[str], labels: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    rows = [(f"{n} is", targets[n % len(targets)]) for n in range(20)]
    for example in everything(BigBenchHard("any", train=bbh_file(tmp_path, rows), val_size=4)):
        assert example.labels == labels
        assert example.reference == targets[int(example.question.split()[0]) % len(targets)]


def test_big_bench_rows_take_the_form_of_big_bench_hard(tmp_path: Path) -> None:
    test = bbh_file(tmp_path, [(f"{START} Take {n} steps.{YES_NO}", "No") for n in range(10)])
    scores = [{"True": 0, "False": 1}, {"False": 0, "True": 1}]
    train = big_bench_file(tmp_path, [(f"Take {n} steps.", scores[n % 2]) for n in range(40)])
    data = BigBenchHard("navigate", train=train, test=test, val_size=10)
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [20, 10, 10]
    numbers = {}
    for example in everything(data):
        (number,) = re.findall(r"\d+", example.question)
        numbers[int(number)] = example.reference
        assert example.question == f"{START} Take {number} steps.{YES_NO}"
        assert example.labels == (("Yes",), ("No",))
    assert numbers == {n: "Yes" if n >= 10 and n % 2 else "No" for n in range(40)}
    alone = everything(BigBenchHard("navigate", train=train, val_size=5))
    assert {(example.reference, example.labels) for example in alone} == {
        (name, (("False",), ("True",))) for name in ("True", "False")
    }
    assert alone[0].question.endswith("steps.\nOptions:\n- False\n- True")


def test_big_bench_rows_without_listed_options(tmp_path: Path) -> None:
    test = bbh_file(tmp_path, [(f"Is {n} plausible?", ["yes", "no"][n % 2]) for n in range(10)])
    scores = [{"plausible": 1, "implausible": 0}, {"plausible": 0, "implausible": 1}]
    train = big_bench_file(tmp_path, [(f"{n} plausible?", scores[n % 2]) for n in range(40)], prefix="Is")
    found = everything(BigBenchHard("sports_understanding", train=train, test=test, val_size=10))
    assert len(found) == 40
    assert all(e.reference == ["yes", "no"][int(e.question.split()[1]) % 2] for e in found)
    assert {e.labels for e in found} == {(("no",), ("yes",))}
    assert all(e.question == e.fields["stripped"] for e in found)


@pytest.mark.parametrize("with_test", [True, False])
def test_big_bench_with_options_of_its_own(with_test: bool, tmp_path: Path) -> None:
    rows = [(f"When is {n}?", {f"on {n}": 1, f"on {n + 1}": 0, f"on {n + 2}": 0}) for n in range(200)]
    train = big_bench_file(tmp_path, rows, prefix="")
    test = bbh_file(tmp_path, [(f"When is {n}?\nOptions:\n(A) on {n + 1}\n(B) on {n}", "(B)") for n in range(8)])
    data = BigBenchHard("date_understanding", train=train, test=test if with_test else None, val_size=20)
    found = data.examples("train") + data.examples("val")
    assert len(found) == (192 if with_test else 180)
    for example in found:
        choices = parse_options(example.question)
        number = re.findall(r"\d+", choices.text)[0]
        assert example.label is not None
        assert choices.options[example.label] == f"on {number}"
        assert example.labels == (("(A)", "A"), ("(B)", "B"), ("(C)", "C"))
    places = Counter(example.label for example in found)
    assert min(places[place] for place in range(3)) > 40, "which option comes first says nothing"
    again = BigBenchHard("date_understanding", train=train, test=test if with_test else None, val_size=20)
    assert again.examples("train") == data.examples("train")


def test_questions_that_differ_only_in_options_are_kept(tmp_path: Path) -> None:
    rows = [(f"Which order?\nOptions:\n(A) a {n}\n(B) b {n}", "(A)") for n in range(30)]
    test = [("Which order?\nOptions:\n(A) b 3\n(B) a 3", "(B)"), ("Which order?\nOptions:\n(A) z\n(B) y", "(B)")]
    data = BigBenchHard(
        "hyperbaton", train=bbh_file(tmp_path, rows), test=bbh_file(tmp_path, test, "test.json"), val_size=9
    )
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [20, 9, 2]
    assert not any("a 3\n" in example.question for example in data.examples("train") + data.examples("val"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x"}, "row 31: field 'target' is empty"),
        ({"target": "No"}, "row 31 has no field 'input'"),
        ({"input": "x", "target_scores": {"True": 1, "False": 1}}, "'target_scores' must name one right option"),
        ({"input": "x", "target_scores": {"True": 1}}, "'target_scores' must name one right option"),
        (
            {"input": "x", "target_scores": {"True": "1", "False": 0}},
            "bbh.json row 31: .* a number, got '1' for 'True'",
        ),
        ({"input": "x", "target_scores": {"True": None, "False": 0}}, "row 31: .* a number, got None for 'True'"),
        ({"input": "x", "target_scores": {"True": 1, "False": False}}, "row 31: .* a number, got False for 'False'"),
        ({"input": "x", "target_scores": {"True": 1, "False": float("nan")}}, "row 31: .* got nan for 'False'"),
        ({"input": "x", "target_scores": []}, "row 31: field 'target_scores' must give each option a score"),
        (
            {"input": "x", "target_scores": {"left": 1, "right": 0}},
            "row 31: label 'left' is unknown; known labels: Yes",
        ),
    ],
)
def test_invalid_big_bench_rows_raise(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [*({"input": f"{n}{YES_NO}", "target": "No"} for n in range(30)), row]
    (tmp_path / "bbh.json").write_text(json.dumps({"examples": rows}))
    with pytest.raises(UserError, match=message) as error:
        BigBenchHard("any", train=str(tmp_path / "bbh.json"), val_size=5).examples("train")
    assert "\n" not in str(error.value)


# Generated reasoning, and solvers that know nothing of the generators

RANKS = [
    "awful bad good lovely mysterious nice obnoxious repulsive ridiculous silly terrible wonderful",
    "big enormous huge large little massive medium-size midsize normal-size small tiny",
    "ancient archaic brand-new modern new old old-fashioned young",
    "circular oval prismlike pyramidal rectangular round spherical square triangular",
    "beige black blue brown crimson gray green grey orange pink purple red tan white yellow",
    "American Bangladeshi Brazilian Chinese Congolese Egyptian Ethiopian Filipino French German Indian Indonesian "
    "Iranian Japanese Mexican Nigerian Pakistani Russian Thai Turkish Vietnamese",
    "cardboard cloth fiberglass glass gold iron lead leather paper plastic rubber silver steel wood wool",
    "driving drinking eating exercise hiking sleeping smoking snorkeling typing walking whittling",
]


def solve_hyperbaton(question: str) -> str:
    rank = {word: number for number, words in enumerate(RANKS) for word in words.split()}
    match = re.fullmatch(
        r"Which sentence has the correct adjective order:\nOptions:\n\(A\) ([\w -]+)\n\(B\) ([\w -]+)", question
    )
    assert match, question
    orders = [[rank[word] for word in sentence.split()[:-1]] for sentence in match.groups()]
    right = [order == sorted(order) for order in orders]
    assert right.count(True) == 1, question
    return ["(A)", "(B)"][right.index(True)]


def solve_navigate(question: str) -> str:
    match = re.fullmatch(rf"{re.escape(START)} (.*){re.escape(YES_NO)}", question)
    assert match, question
    place, ahead = 0 + 0j, 1j
    for sentence in re.findall(r"[^.]+\.", match[1]):
        step = re.fullmatch(r"Take (\d+) steps?( forward| backward| left| right)?\.", sentence.strip())
        if step:
            assert ("steps" in sentence) == (step[1] != "1"), sentence
            side = {None: 1, " forward": 1, " backward": -1, " left": 1j, " right": -1j}[step[2]]
            place += int(step[1]) * ahead * side
        elif sentence.strip() != "Always face forward.":
            ahead *= {"Turn left.": 1j, "Turn right.": -1j, "Turn around.": -1}[sentence.strip()]
    return "No" if place else "Yes"


SOLVERS = {Hyperbaton: solve_hyperbaton, Navigate: solve_navigate}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", SOLVERS)
def test_answers_are_right_and_questions_differ(task: Any, seed: int) -> None:
    data = task(seed=seed)
    questions = set()
    for split, size in data.sizes.items():
        examples = data.examples(split)
        assert len(examples) == size
        assert abs(Counter(example.label for example in examples)[0] - size / 2) <= 0.5
        for example in examples:
            assert SOLVERS[task](example.question) == example.reference
            assert example.fields["stripped"] == parse_options(example.question).text != example.question
            options = parse_options(example.question).options
            questions.add((example.fields["stripped"], frozenset(options)))
    assert len(questions) == sum(data.sizes.values())


def test_the_default_sizes() -> None:
    assert Hyperbaton().sizes == {"test": 250, "val": 1000, "train": 400}
    assert Navigate().sizes == {"test": 250, "val": 375, "train": 375}


@pytest.mark.parametrize("task", SOLVERS)
def test_train_size_does_not_change_the_reasoning_tests(task: Any) -> None:
    data, same, smaller, other = task(), task(), task(train_size=30), task(seed=1)
    assert everything(data) == everything(same)
    for split in ("test", "val"):
        assert data.examples(split) == smaller.examples(split)
        assert data.examples(split) != other.examples(split)


def test_both_kinds_of_walks_and_all_lengths_have_both_answers() -> None:
    kinds: Counter[tuple[bool, int, str | None]] = Counter()
    changed: Counter[bool] = Counter()
    for example in Navigate(train_size=2000).examples("train"):
        walk = str(example.fields["stripped"]).removeprefix(START)
        facing = "Always face forward." in walk
        assert facing != bool(re.search(r"Take \d+ steps?\.|Turn", walk))
        kinds[facing, len(re.findall(r"[^.]+\.", walk)) - facing, example.reference] += 1
        changed[facing] += 1
        assert {int(number) for number in re.findall(r"\d+", walk)} <= set(range(1, 11))
    assert min(changed.values()) > 800, "short walks run out sooner where there are turns"
    for facing in (True, False):
        for length in range(4, 10):
            assert kinds[facing, length, "Yes"] > 10
            assert kinds[facing, length, "No"] > 10


def test_all_wrong_orders_occur() -> None:
    counts: Counter[int] = Counter()
    for example in Hyperbaton(train_size=2000, val_size=1).examples("train"):
        first, second = (option.split() for option in parse_options(example.question).options)
        assert sorted(first) == sorted(second)
        assert first[-1] == second[-1]
        counts[len(first) - 1] += 1
    assert set(counts) == set(range(2, 9))
    assert counts[4] > counts[2] > counts[8], "each kind of adjective is there half of the time"


@pytest.mark.parametrize("task", SOLVERS)
def test_generated_training_with_a_test_file(task: Any, tmp_path: Path) -> None:
    asked = [(example.question, str(example.reference)) for example in task().examples("train")[:40]]
    data = task(test=bbh_file(tmp_path, asked))
    assert sorted((e.question, e.reference) for e in data.examples("test")) == sorted(asked)
    others = {example.question for split in ("train", "val") for example in data.examples(split)}
    assert others.isdisjoint(question for question, _ in asked)
    assert len(task(test=bbh_file(tmp_path, asked), test_size=7).examples("test")) == 7


def test_invalid_generated_sizes_raise() -> None:
    with pytest.raises(UserError, match=r"data\.train_size must be at least 1, got 0"):
        Hyperbaton(train_size=0)


# Batches with equal classes


def counted(batch: Batch) -> Counter[int | None]:
    return Counter(example.label for example in batch.examples)


def test_balanced_batches(tmp_path: Path) -> None:
    rows = [{"sentence": f"s {n}", "label": min(n // 20, 5)} for n in range(200)]  # 100 of the last class
    data = Classification("trec", train=write(tmp_path, rows), balanced=True, batch_size=20, val_size=10, test_size=10)
    torch.manual_seed(4)
    loader = data.train_dataloader()
    seen: Counter[str] = Counter()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert [len(batch) for batch in batches] == [20] * 9
        for batch in batches:
            assert sorted(counted(batch).values()) == [3, 3, 3, 3, 4, 4]
            assert len({example.source for example in batch.examples}) == 20, "no example twice while there are others"
            seen.update(example.source for example in batch.examples)
    frequent = {example.source for example in data.examples("train") if example.label == 5}
    assert len(seen.keys() - frequent) == 180 - len(frequent), "none of a rare class is left out"
    assert len(seen.keys() & frequent) > 45, "each epoch has others of a frequent one"
    torch.manual_seed(4)
    again, other = data.train_dataloader(), BalancedSampler(data.examples("train"), 20, seed=5)
    assert [b.examples for b in again] == [b.examples for b in data.train_dataloader()]
    assert list(other) != list(BalancedSampler(data.examples("train"), 20, seed=4))


def test_balanced_batches_with_a_rare_or_missing_class() -> None:
    def example(label: str) -> Example:
        return Example("", "", label, reference=label, labels=(("a",), ("b",), ("c",)))

    examples = [example("a")] * 1 + [example("b")] * 12
    labels = [examples[index].label for index in BalancedSampler(examples, 4, seed=0)]
    assert len(labels) == 13
    assert [Counter(labels[start : start + 4]) for start in (0, 4, 8)] == [Counter({0: 2, 1: 2})] * 3
    with pytest.raises(UserError, match=r"row 3 has no label, so that data\.balanced cannot be true"):
        BalancedSampler([Example("", "", "x", source="row 3")], 4, seed=0)


class Recorder(L.LightningModule):
    """What each step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        del batch_idx
        self.steps.append([example.source for example in batch.examples])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("stop", [3, 9, 13])
def test_a_resumed_run_sees_the_same_balanced_batches(stop: int, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: str | None = None) -> list[list[str]]:
        L.seed_everything(7, verbose=False)
        data, recorder = Hyperbaton(train_size=90, val_size=2, test_size=2, batch_size=10, balanced=True), Recorder()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)],
            default_root_dir=tmp_path,
        )
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return recorder.steps

    whole = fit(20)
    assert fit(stop) == whole[:stop]
    assert fit(20, str(tmp_path / f"step={stop}.ckpt")) == whole[stop:]
