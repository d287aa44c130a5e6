"""Rows from Python give the same examples as files of these rows, and the same errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from lightning_prompts.datamodules import GSM8K, Classification, Navigate, QuestionAnswer
from lightning_prompts.errors import UserError
from lightning_prompts.types import Example

ROWS = [{"question": f"Is {n} {'odd' if n % 3 else 'even'}?", "answer": n % 4 / 2, "ok": n % 2 == 0} for n in range(40)]
MAKERS = {"list": list, "frame": pd.DataFrame, "dataset": datasets.Dataset.from_list}
TEMPLATE = "{prompt} {question} ({ok}) {answer}\n"


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def texts(data: QuestionAnswer, split: str) -> list[tuple[Any, ...]]:
    """All that a run sees of the examples of a split."""

    def text(example: Example) -> tuple[Any, ...]:
        return example.before, example.after, example.answer, example.reference, example.labels

    return [text(example) for example in data.examples(split)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("settings", [{}, {"labels": "auto", "balanced": True}, {"max_train_examples": 7, "seed": 3}])
def test_rows_give_the_same_examples_as_a_file(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    file = QuestionAnswer(jsonl(tmp_path, ROWS), template=TEMPLATE, **settings)
    data = QuestionAnswer.from_rows(make(ROWS), template=TEMPLATE, **settings)
    for split in ("train", "val", "test"):
        assert texts(data, split) == texts(file, split)
    assert data.examples("train")[0].source.startswith("train row ")


def test_every_split_can_have_rows(tmp_path: Path) -> None:
    parts = {"train": ROWS[:20], "val": ROWS[20:25], "test": ROWS[25:32], "predict": [{"question": "new?"}]}
    file = QuestionAnswer(**{split: jsonl(tmp_path, rows, f"{split}.jsonl") for split, rows in parts.items()})
    data = QuestionAnswer.from_rows(**{f"{split}_rows": rows for split, rows in parts.items()})
    for split, rows in parts.items():
        assert texts(data, split) == texts(file, split)
        assert len(data.examples(split)) == len(rows)
    assert QuestionAnswer.from_rows(predict_rows=parts["predict"]).examples("predict")[0].source == "predict row 1"


@pytest.mark.parametrize("dtype", ["float32", "float64", "Int64", "int64", "category", "bool", "datetime64[ns]", "str"])
def test_a_data_frame_gives_the_values_of_its_parquet_file(dtype: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"question": [f"q{n}" for n in range(3)]})
    values = ["2020-01-31", "2021-02-28", "1999-12-31"] if dtype.startswith("datetime") else [0.1, 1.5, 30]
    values = [1, 0, 30] if dtype in ("Int64", "int64", "bool") else values
    frame["answer"] = pd.Series(values).astype(dtype)
    frame.to_parquet(tmp_path / "rows.parquet")
    file = QuestionAnswer(test=str(tmp_path / "rows.parquet"))
    for rows in (frame, frame.to_dict("records"), datasets.Dataset.from_pandas(frame)):
        if dtype == "float32" and isinstance(rows, list):
            continue  # to_dict has made 0.10000000149011612 of it
        assert texts(QuestionAnswer.from_rows(test_rows=rows), "test") == texts(file, "test")


def test_values_of_numpy_are_values_of_python() -> None:
    rows = [
        {"question": np.str_("q"), "answer": value}
        for value in (np.int64(7), np.float32(0.1), np.float64(0.1), np.bool_(True))
    ]
    found = [example.reference for example in QuestionAnswer.from_rows(test_rows=rows).examples("test")]
    assert found == ["7", "0.1", "0.1", "true"]


def test_rows_selected_from_a_dataset_are_those_that_it_shows() -> None:
    chosen = datasets.Dataset.from_list(ROWS).select([5, 3])
    examples = QuestionAnswer.from_rows(test_rows=chosen).examples("test")
    assert [example.question for example in examples] == [ROWS[5]["question"], ROWS[3]["question"]]


def test_later_changes_of_the_rows_do_not_change_the_data() -> None:
    rows = [dict(row) for row in ROWS]
    data = QuestionAnswer.from_rows(rows)
    rows[0]["question"] = "changed"
    rows.clear()
    assert "changed" not in {example.question for example in data.examples("train")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": None}, "train row 3: field 'answer' is empty"),
        ({"question": "q", "answer": float("nan")}, "train row 3: field 'answer' is empty"),
        ({"question": "q", "answer": pd.NA}, "train row 3: field 'answer' is empty"),
        ({"question": "q", "answer": ["a"]}, "train row 3: field 'answer' is a list, not text"),
        ({"question": "q"}, "train row 3 has no field 'answer'; known: question"),
        ("q", "train row 3 is a str, not a dict with fields"),
    ],
)
def test_a_bad_row_is_named_by_its_number(row: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        QuestionAnswer.from_rows([*ROWS[:2], row]).examples("train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs rows: give train_rows"),
        ({"train_rows": []}, "train data has no rows"),
        ({"train_rows": pd.DataFrame({"question": []})}, "train data has no rows"),
        (
            {"val_rows": "rows.jsonl"},
            "val rows must be a list of dicts, a pandas DataFrame or a datasets.Dataset, got a s",
        ),
        ({"train_rows": {"question": ["q"]}}, "got a dict$"),
        (
            {"train_rows": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))},
            "got a DatasetDict; give one of its splits: train",
        ),
        ({"train_rows": pd.DataFrame([["q", "a", "b"]], columns=["question", "answer", "answer"])}, "'answer' twice"),
        ({"train_rows": ROWS, "test": "t.csv"}, "takes no files; give test_rows instead of test"),
        ({"train_rows": ROWS, "answer": "answr"}, r"train data has no field 'answr' \(data.answer\)"),
        ({"train_rows": ROWS, "test_size": 50}, "data.test_size 50 of the 40 rows of train data leaves nothing"),
    ],
)
def test_rows_that_cannot_be_used_are_an_error_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        QuestionAnswer.from_rows(**given).examples("train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("kind", "name"), [(QuestionAnswer, "train"), (Classification, "predict"), (GSM8K, "test"), (Navigate, "test")]
)
def test_rows_in_place_of_a_file_point_at_from_rows(make: Any, kind: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{name} must be the path of a file, got a \w+; .*from_rows") as raised:
        kind(**{name: make(ROWS)})
    assert "\n" not in str(raised.value)


def test_a_path_object_is_a_file(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer"], *([f"q{n}", n] for n in range(20))])
    data = QuestionAnswer(tmp_path / "rows.csv")  # type: ignore[arg-type]
    assert len(data.examples("train")) == 16
