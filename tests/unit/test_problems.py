"""Maths problems in each dataset's own fields, rows made here; word pairs; mixtures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_prompts.cli import run
from lightning_prompts.datamodules import (
    GSM8K,
    Addition,
    Antonyms,
    Math,
    Mixture,
    OpenMathInstruct2,
    QuestionAnswer,
    TextDataModule,
    WordPairs,
    sources,
)
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import FixedPrompt
from support.models import TINY
from support.training import trainer

GSM_ROWS = [
    {
        "question": f"Ann has {n} pens and buys {n + 1000} more. How many has she?",
        "answer": f"She has {n}+{n + 1000} = <<{n}+{n + 1000}={2 * n + 1000}>>{2 * n + 1000:,}.\n#### {2 * n + 1000:,}",
    }
    for n in range(40)
]
MATH_ROWS = [
    {
        "problem": f"What is ${n}/7$?",
        "solution": rf"It is $\boxed{{\frac{{{n}}}{{7}}}}$.",
        "level": f"Level {n % 5 + 1}",
        "type": "Algebra" if n % 2 else "Geometry",
    }
    for n in range(40)
]
OPEN_ROWS = [
    {
        "problem": f"Double {n}.",
        "generated_solution": rf"Two times {n} is \[ \boxed{{{2 * n}}} \]",
        "expected_answer": str(2 * n),
        "problem_source": "augmented_math" if n % 4 else "gsm8k",
    }
    for n in range(60)
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_gsm8k(tmp_path: Path) -> None:
    file, other = write(tmp_path, GSM_ROWS), write(tmp_path, GSM_ROWS[:9], "test.jsonl")
    data = GSM8K(train=file, test=other, val_size=5, test_size=7)
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [26, 5, 7]
    example = data.examples("test")[3]
    assert example.after == ": Ann has 3 pens and buys 1003 more. How many has she?\nAnswer:"
    assert example.answer == " 1006"
    assert example.end == "\n\n"
    assert example.numeric
    asked = [{row.question for row in data.examples(split)} for split in ("train", "val", "test")]
    assert len(set.union(*asked)) == 38, "no question is in two splits"
    steps = GSM8K(train=file, test=other, val_size=5, answer="solution").examples("test")[3]
    assert steps.answer == " She has 3+1003 = 1,006.\n#### 1,006"
    assert steps.reference == "1006"
    kept = GSM8K(train=file, test=other, val_size=5, answer="solution", calculator=True).examples("test")[3]
    assert "<<3+1003=1006>>1,006" in str(kept.answer)


def test_math(tmp_path: Path) -> None:
    file = write(tmp_path, MATH_ROWS)
    data = Math(train=file, val_size=2, test_size=3, subjects=["algebra"], max_level=3)
    rows = [row for split in ("train", "val", "test") for row in data.examples(split)]
    assert {row.fields["type"] for row in rows} == {"Algebra"}
    assert {row.fields["level"] for row in rows} == {"Level 1", "Level 2", "Level 3"}
    assert len(rows) == sum(row["type"] == "Algebra" and int(row["level"][-1]) <= 3 for row in MATH_ROWS)
    assert all(row.reference == rf"\frac{{{row.fields['problem'][9:-4]}}}{{7}}" for row in rows)


def test_openmathinstruct2(tmp_path: Path) -> None:
    file = write(tmp_path, OPEN_ROWS, "openmath.test")  # an ending that says nothing
    data = OpenMathInstruct2(train=file, problem_sources=["gsm8k"], val_size=3, max_train_examples=4)
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [4, 3, 3]
    rows = [row for split in ("train", "val", "test") for row in data.examples(split)]
    assert {row.fields["problem_source"] for row in rows} == {"gsm8k"}
    worked = OpenMathInstruct2(train=file, val_size=3, answer="solution", max_characters=49).examples("train")[0]
    assert r"\boxed" in str(worked.answer)
    assert len(worked.question) + len(str(worked.answer)) <= 50


def test_problems_with_several_solutions_are_in_one_split(tmp_path: Path) -> None:
    again = [{**row, "problem": f" {row['problem'].upper()}", "generated_solution": "It is so."} for row in OPEN_ROWS]
    file = write(tmp_path, [*OPEN_ROWS, *again])
    data = OpenMathInstruct2(train=file, val_size=9, test_size=11)
    found = [[row.question.upper() for row in data.examples(split)] for split in ("train", "val", "test")]
    assert [len(each) for each in found] == [80, 9, 11]
    assert [len(set(each)) for each in found] == [40, 9, 11]
    assert len({question for each in found for question in each}) == 60
    with pytest.raises(UserError, match="all 60 train rows are rows of another split too"):
        OpenMathInstruct2(train=write(tmp_path, OPEN_ROWS, "train.jsonl"), test=file).examples("train")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (GSM8K, {"question": "q", "answer": "no mark"}, "row 1 has no final answer"),
        (GSM8K, {"question": "", "answer": "#### 1"}, "row 1: field 'question' is empty"),
        (GSM8K, {"query": "q", "answer": "#### 1"}, "row 1 has no field 'question'"),
        (Math, {"problem": "p", "solution": "no box"}, "row 1 has no final answer"),
        (GSM8K, {"question": "q", "answer": ["#### 1"]}, "row 1: field 'answer' is a list, not text"),
        (OpenMathInstruct2, {"problem": "p", "generated_solution": "s", "expected_answer": " "}, "_answer' is empty"),
    ],
)
def test_invalid_problem_rows_raise(kind: Any, row: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        kind(train=write(tmp_path, [row])).examples("train")


def test_filters_and_sizes_that_leave_no_rows_raise(tmp_path: Path) -> None:
    file = write(tmp_path, OPEN_ROWS)
    with pytest.raises(UserError, match="none of its train rows passes the filters"):
        OpenMathInstruct2(train=file, problem_sources=["nowhere"]).examples("train")
    with pytest.raises(UserError, match="leave nothing to train on"):
        OpenMathInstruct2(train=file, val_size=30).examples("train")


@pytest.mark.parametrize("kind", [GSM8K, Math, OpenMathInstruct2])
def test_without_a_network_one_line_names_the_option(
    kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(sources.HfApi, "dataset_info", unreachable)
    with pytest.raises(UserError, match=r"give local files: --data\.train FILE"):
        kind().examples("train")
    assert (
        run(
            [
                "test",
                "--model",
                "FixedPrompt",
                "--data",
                kind.__name__,
                "--model.lm.name",
                TINY,
                "--trainer.default_root_dir",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_hub_is_streamed_and_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = []

    def rows(*args: object, **kwargs: object) -> Any:
        assert kwargs["streaming"] is True
        seen.append((args, kwargs["split"]))
        return (seen.append(row["problem"]) or row for row in OPEN_ROWS)  # type: ignore[func-returns-value]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *args, **kwargs: None)
    data = OpenMathInstruct2(problem_sources=["gsm8k"], max_train_examples=3, val_size=2)
    assert len(data.examples("train")) == 3
    assert seen[0] == (("nvidia/OpenMathInstruct-2", None), "train_1M")
    assert len(seen) - 1 == 25, "no row is read beyond the seventh that is wanted (every fourth)"
    rows_of = {"train": GSM_ROWS, "test": [{"question": "2?", "answer": "#### 2"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows_of[kwargs["split"]])
    few, all_of_them = GSM8K(max_train_examples=4, val_size=5), GSM8K(val_size=5)
    assert few.examples("val") == all_of_them.examples("val")
    assert len(few.examples("train")) == 4
    assert len(all_of_them.examples("train")) == 35
    monkeypatch.setattr(datasets, "load_dataset", rows)
    found = sources.HubSource("x", None, {"train": "train"}).rows("train", limit=2)
    assert [(row.source, row.fields) for row in found] == [
        ("x train row 1", OPEN_ROWS[0]),
        ("x train row 2", OPEN_ROWS[1]),
    ]


@pytest.mark.parametrize("task", ["capital", "past_tense", "plural"])
def test_word_pairs(task: Any) -> None:
    data = WordPairs(task=task)
    splits = [data.examples(split) for split in ("train", "val", "test")]
    questions = [row.question for part in splits for row in part]
    assert len(questions) == len(set(questions)) > 150
    assert all(row.answer and row.answer.isascii() for part in splits for row in part)
    assert WordPairs(task=task, seed=1).examples("test")[0] != splits[2][0]
    wanted = {"capital": ("France", "Paris"), "past_tense": ("go", "went"), "plural": ("child", "children")}[task]
    assert wanted in {(row.question, row.reference) for part in splits for row in part}


def members() -> dict[str, TextDataModule]:
    return {
        "plural": WordPairs(task="plural", max_train_examples=20),
        "sum": Addition(max_digits=2, ood_digits=[3], train_size=30, val_size=4, test_size=5),
        "antonym": Antonyms(parts=["adj"], max_train_examples=10, val_fraction=0.01, test_fraction=0.01),
    }


def test_mixture_renders_all_datasets_with_one_template() -> None:
    mixed = Mixture(members(), template="{prompt}! {question} = {answer}\n")
    assert len(mixed.examples("train")) == 60
    assert {row.member for row in mixed.examples("test")} == {"plural", "sum", "antonym"}
    assert all(row.after == f"! {row.question} =" for row in mixed.examples("train"))
    assert mixed.splits("test") == ["test", "test/sum/3_digits"]
    own = Mixture(members(), template=None)
    assert len({row.before + row.after[:3] for row in own.examples("train") if row.member != "sum"}) > 1
    assert len(Mixture(members(), max_train_examples=7).examples("train")) == 7


def member(*splits: list[tuple[str, str]]) -> QuestionAnswer:
    train, val, test = [[dict(zip(("question", "answer"), row, strict=True)) for row in rows] for rows in splits]
    return QuestionAnswer.from_rows(train, val_rows=val, test_rows=test)


def test_a_mixture_chooses_by_no_row_that_another_member_is_tested_on(caplog: pytest.LogCaptureFixture) -> None:
    one = member([("a", "b")], [("Up", "down"), ("c", "d")], [("e", "f")])
    other = member([("g", "h")], [("i", "j")], [("up ", "down")])
    with caplog.at_level(logging.WARNING):
        mixed = Mixture({"a": one, "b": other})
        assert [row.question for row in mixed.examples("val")] == ["c", "i"]
    assert [row.question for row in mixed.examples("test")] == ["e", "up "]
    assert "dropped 1 of 3 examples of val" in caplog.text


def test_a_mixture_trains_on_no_row_that_another_member_evaluates_on() -> None:
    """The same question with another answer is another task's."""
    held = [("on", "off")], [("up", "Down"), ("in", "inside")]
    one = member([("Up ", "down"), ("in", "out")], held[0], held[0])
    other = member([("On", "off"), ("in", "ins"), ("on", "ons")], held[1], held[1])
    found = [(row.member, row.question, row.target) for row in Mixture({"a": one, "b": other}).examples("train")]
    assert found == [("a", "in", "out"), ("b", "on", "ons")]


def test_mixture_seed_replaces_the_seeds_of_its_datasets() -> None:
    first, second = Mixture(members(), seed=0), Mixture(members(), seed=1)
    assert first.examples("test") != second.examples("test")


def test_mixture_reports_metrics_for_each_dataset(tmp_path: Path) -> None:
    L.seed_everything(0)
    mixed = Mixture(members(), eval_batch_size=16)
    method = FixedPrompt("x", LMConfig(TINY), max_new_tokens=1)
    parts = trainer(tmp_path).test(method, datamodule=mixed, verbose=False)
    results = {key: value for part in parts for key, value in part.items()}
    counts = {name: results[f"test/{name}/examples"] for name in ("plural", "sum", "antonym")}
    assert sum(counts.values()) == results["test/examples"] == len(mixed.examples("test"))
    mean = sum(results[f"test/{name}/nll"] * count for name, count in counts.items()) / results["test/examples"]
    assert results["test/nll"] == pytest.approx(mean, abs=1e-4)
    alone = members()["sum"]
    alone.template = mixed.template
    found = trainer(tmp_path).test(FixedPrompt("x", LMConfig(TINY), max_new_tokens=1), datamodule=alone, verbose=False)
    assert found[0]["test/nll"] == pytest.approx(results["test/sum/nll"], abs=1e-4)


def test_invalid_mixtures_raise() -> None:
    for build, message in (
        (lambda: Mixture({}), "is empty"),
        (lambda: Mixture({"a/b": WordPairs()}), "cannot be the name of a dataset"),
        (lambda: Mixture({"nll": WordPairs()}), "cannot be the name of a dataset"),
        (lambda: Mixture({"a": Mixture(members())}), "is a mixture itself"),
        (lambda: Mixture(members(), template=""), "has no {prompt}"),
        (lambda: Mixture({"mine": GSM8K(train="no.jsonl")}).examples("train"), "data.members.mine: no.jsonl does not"),
        (lambda: WordPairs(val_fraction=float("nan")), "must be above 0"),
        (lambda: WordPairs(val_fraction=0.5, test_fraction=0.0), "must be above 0"),
        (lambda: WordPairs(val_fraction=0.5, test_fraction=0.5), "leave something to train on"),
    ):
        with pytest.raises(UserError, match=message):
            build()
