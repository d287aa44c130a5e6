"""Odd files of users: either each value reaches the model as the file has it, or one line says what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_prompts.datamodules import GSM8K, BigBenchHard, Classification, QuestionAnswer
from lightning_prompts.datamodules.base import TextDataModule
from lightning_prompts.datamodules.sources import read_table
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM

LONG = "x" * 200_000
SURPLUS = "has 3 values, but the header names 2 (question, answer)"


def write(folder: Path, name: str, content: object) -> str:
    """A file: bytes or text as it is, columns as Parquet, other values as JSON."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(*content) if isinstance(content, tuple) else pa.table(content), path)
    else:
        path.write_text(json.dumps(content))
    return str(path)


def rows(count: int = 20, **more: object) -> list[dict[str, Any]]:
    return [{"question": f"q{n}", "answer": f"a{n}", **more} for n in range(count)]


def lines(table: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in table)


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        # A line ends at \n alone; Unicode knows other ends, which JSON may hold as they are.
        ("a.jsonl", '{"question": "a\u2028b", "answer": "c\u2029d\x85e"}\n', ("a\u2028b", "c\u2029d\x85e")),
        ("a.json", '{"question": "a\u2028b", "answer": "c\u2029d\x85e"}\n' * 2, ("a\u2028b", "c\u2029d\x85e")),
        ("a.csv", "question,answer\na\u2028b,c\u2029d\x85e\n", ("a\u2028b", "c\u2029d\x85e")),
        ("a.tsv", "question\tanswer\na\u2028b\tc\u2029d\x85e\n", ("a\u2028b", "c\u2029d\x85e")),
        # Fields of any length.
        ("a.csv", f"question,answer\n{LONG},a\n", (LONG, "a")),
        ("a.tsv", f"question\tanswer\na\t{LONG}\n", ("a", LONG)),
        ("a.jsonl", json.dumps({"question": LONG, "answer": "a"}), (LONG, "a")),
        # Numbers as they are written.
        ("a.jsonl", '{"question": 007.50, "answer": 1}'.replace("00", ""), ("7.50", "1")),
        ("a.json", '[{"question": 0.00001, "answer": 1e400}]', ("0.00001", "1e400")),
        ("a.json", json.dumps([{"question": 10**30, "answer": -1}]), (str(10**30), "-1")),
        ("a.csv", "question,answer\n1.50,0.00001\n", ("1.50", "0.00001")),
        ("a.csv", "question,answer\n007,+1_000\n", ("007", "+1_000")),
        ("a.json", '[{"question": -0, "answer": -0.0}]', ("-0", "-0.0")),
        ("a.jsonl", '{"question": ' + "9" * 5000 + ', "answer": 1}', ("9" * 5000, "1")),
        # A truth value as JSON writes it, in every format.
        ("a.json", '[{"question": true, "answer": false}]', ("true", "false")),
        ("a.parquet", {"question": [True], "answer": [False]}, ("true", "false")),
        ("a.csv", "question,answer\nTRUE,False\n", ("TRUE", "False")),
        ("a.parquet", {"question": np.float32([0.1, 3.5]), "answer": [0.3, 2.0]}, ("0.1", "0.3")),
        ("a.parquet", {"question": [2**62], "answer": [1e-3]}, (str(2**62), "0.001")),
        # Marks at the start, ends of lines, spaces around names, columns without a name, empty lines.
        ("a.csv", "\ufeffquestion,answer\nq,a\n", ("q", "a")),
        ("a.jsonl", '\ufeff{"question": "q", "answer": "a"}\n', ("q", "a")),
        ("a.csv", 'question,answer\r\n"q\r\nr",a\r\nx,y\n', ("q\nr", "a")),
        ("a.jsonl", '\r\n{"question": "q", "answer": "a"}\r\n\r\n', ("q", "a")),
        ("a.csv", 'question , answer\nq , "a, b"\n', ("q", "a, b")),
        ("a.csv", 'question,answer \n"  q\n  r",a\n', ("  q\n  r", "a")),
        ("a.csv", 'question, answer\nq, "  a "\n', ("q", "  a ")),
        ("a.csv", ",question,answer,\n0,q,a,x\n", ("q", "a")),
        ("a.csv", "\nquestion,answer\n\n  \nq,a\n\n", ("q", "a")),
        ("a.tsv", 'question\tanswer\n"q ""r"""\ta "b"\n', ('q "r"', 'a "b"')),
        # The rows of a document, also without an ending, and with other things beside them.
        ("a.txt", '[\n{"question": "q", "answer": "a"}\n]\n', ("q", "a")),
        ("a.json", {"keywords": ["x"], "data": [{"question": "q", "answer": "a"}]}, ("q", "a")),
        ("a.json", {"examples": [{"question": "q", "answer": "a"}], "by": [{"name": "x"}]}, ("q", "a")),
        ("a.json", {"question": "q", "answer": "a", "tags": ["x"]}, ("q", "a")),
    ],
)
def test_values_are_kept_as_written(name: str, content: object, first: tuple[str, str], tmp_path: Path) -> None:
    row = read_table(Path(write(tmp_path, name, content)))[0]
    assert (str(row["question"]), str(row["answer"])) == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # More or fewer values than the header names: nobody knows which is which.
        ("a.csv", "question,answer\nq0,a0,note0\nq1,a1,note1\n", f"a.csv row 1 {SURPLUS}"),
        ("a.tsv", "question\tanswer\nq0\ta0\tnote0\n", f"a.tsv row 1 {SURPLUS}"),
        ("a.csv", "question,answer\nq0,a0,\nq1,a1,\n", f"a.csv row 1 {SURPLUS}"),
        ("a.csv", "question,answer\nq0,a0,n\nq1,a1\n", f"a.csv row 1 {SURPLUS}"),
        ("a.csv", "question,answer\nq0,a0\n\nq1,a1, too\n", f"a.csv row 2 {SURPLUS}"),
        ("a.csv", "question,answer,note\na0,note0\n", "a.csv row 1 has 2 values, but the header names 3"),
        # The same name twice.
        ("a.csv", "question,answer,answer\nq,a,b\n", "a.csv names the column 'answer' twice"),
        ("a.tsv", "question\tanswer\tanswer\nq\ta\tb\n", "a.tsv names the column 'answer' twice"),
        ("a.json", '[{"question": "q", "answer": "a", "answer": "b"}]', "a.json: the key 'answer' comes twice"),
        ("a.jsonl", '{"question": "q", "answer": "a", "answer": "b"}', "a.jsonl line 1: the key 'answer' comes twice"),
        ("a.json", '{"x": 1, "x": 2, "examples": [{"question": "q", "answer": "a"}]}', "the key 'x' comes twice"),
        (
            "a.parquet",
            ([["q"], ["a"], ["b"]], ["question", "answer", "answer"]),
            "a.parquet names the column 'answer' twice",
        ),
        # What is missing is written in many ways.
        *(
            (name, content, f"{name} row 2: field 'answer' is empty")
            for name, content in (
                ("a.json", [*rows(1), {"question": "q", "answer": None}]),
                ("a.json", [*rows(1), {"question": "q", "answer": float("nan")}]),
                ("a.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q", "answer": NaN}'),
                ("a.csv", "question,answer\nq,a\nq,\n"),
                ("a.tsv", "question\tanswer\nq\ta\nq\t \n"),
                ("a.parquet", {"question": ["q", "r"], "answer": [1.0, float("nan")]}),
                ("a.parquet", {"question": ["q", "r"], "answer": ["a", None]}),
                *(
                    ("a.json", [*rows(1), {"question": "q", "answer": unseen}])
                    for unseen in ("\u200b", "\u3164", "\u00ad", " \u202e", "\u00a0\u2003", "\u0008")
                ),
            )
        ),
        # No text, or not all of it.
        ("a.json", [*rows(1), {"question": "q", "answer": float("-inf")}], "a.json row 2: field 'answer' is infinite"),
        ("a.parquet", {"question": ["q"], "answer": [float("inf")]}, "a.parquet row 1: field 'answer' is infinite"),
        ("a.parquet", {"question": ["q"], "answer": [b"a"]}, "row 1: field 'answer' is a bytes, not text"),
        ("a.parquet", {"question": ["q"], "answer": [["a"]]}, "row 1: field 'answer' is a list, not text"),
        ("a.json", '[{"question": "q", "answer": "\\ud83d"}]', "row 1: field 'answer' is not valid Unicode"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n{"x": "é"}'.encode("latin-1"), "a.jsonl line 2 is not UTF-8"),
        ("a.json", '[{"question": "\u2019"}]'.encode("cp1252"), "a.json line 1 is not UTF-8"),
        ("a.csv", "question,answer\né,a\n".encode("latin-1"), "a.csv line 2 is not UTF-8"),
        ("a.csv", "question,answer\nq,a\n".encode("utf-16"), "a.csv is not a text file"),
        ("a.csv", f"question,answer\n{LONG},a\nq,\0\n", "a.csv line 3 contains a zero byte"),
        ("a.csv", gzip.compress(b"question,answer\nq,a\n", mtime=0), "a.csv is not"),
        # Quotes that swallow what follows, files that were joined, splits in one file.
        ("a.csv", 'question,answer\n"Hi," he said,a\n', "a.csv row 1 is not readable as CSV"),
        ("a.tsv", 'question\tanswer\nq\ta\n"Hi" he said\ta\n', "a.tsv row 2 is not readable as TSV"),
        ("a.csv", 'question,answer\nq,a\n"q,a\nq,a\n', "a.csv row 2 is not readable as CSV"),
        ("a.csv", "question,answer\nq,a\n\ufeffquestion,answer\nr,b\n", "a.csv row 2 repeats the header"),
        ("a.json", {"train": rows(), "test": rows(5)}, "a.json has rows under several keys (train, test)"),
        ("a.json", {"question": ["q"], "answer": ["a"]}, "a.json row 1: field 'question' is a list, not text"),
        ("a.csv", "question,answer\n", "a.csv has no rows"),
        ("a.csv.gz", gzip.compress(b"question,answer\nq,a\n", mtime=0), "a.csv.gz: the ending must be one of"),
    ],
)
def test_invalid_files_raise_one_line_errors(name: str, content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        QuestionAnswer(write(tmp_path, name, content)).examples("train")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            'question,answer\n"Tis so,a\nq,a\nr,b\nshe said ",c\n',
            "a.csv row 1 has a value of several lines that look like rows",
        ),
        (
            "a.tsv",
            'question\tanswer\nq\ta\n"Tis so\ta\nshe said "\tc\n',
            "a.tsv row 2 has a value of several lines that look like rows",
        ),
        ("a.csv", 'question,answer\n"Dear John, hello.\nYours,\nAnn",c\n', None),
        ("a.csv", "question,answer\nq,a\nr,nan\n", "1 of 2 rows say 'nan', which is how programs write a missing"),
        ("a.csv", "question,answer\nNaN,a\nr,b\n", "1 of 2 rows say 'NaN', which is how programs write a missing"),
        ("a.csv", "question,answer\nnothing,a\nr,nano\n", None),
        ("a.csv", "question,answer\nq,a\nIt\ufffds,b\n", "a.csv row 2: the text was damaged before"),
        (
            "a.csv",
            "question,answer\nq,a\nr,Caf\u00c3\u00a9\n",
            "another encoding than it was written in, as in 'Caf\u00c3\u00a9' (1 r",
        ),
        ("a.csv", "question,answer\nIt\u2019s \u20ac5,Caf\u00e9\n\u00c3,\u65e5\u672c\n", None),
    ],
)
def test_suspicious_files_log_a_warning(
    name: str, content: str, message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    QuestionAnswer(test=write(tmp_path, name, content)).examples("test")
    assert (message in caplog.text) if message else not caplog.text


def test_long_rows_raise_a_context_window_error(tiny: FrozenLM, tmp_path: Path) -> None:
    (example,) = QuestionAnswer(test=write(tmp_path, "a.csv", f"question,answer\n{LONG},a\n")).examples("test")
    with pytest.raises(UserError, match=r"a\.csv row 1.* context window"):
        tiny.check_examples([example], length=3)


@pytest.mark.parametrize(("repeated", "told"), [(60, True), (3, False)])
def test_many_dropped_rows_log_a_warning(
    repeated: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = [*rows(100), *rows(repeated)]
    QuestionAnswer(write(tmp_path, "a.json", table), val_size=40, test_size=40, seed=1).examples("train")
    assert ("train rows dropped: they share questions with the test split" in caplog.text) == told


@pytest.mark.parametrize("value", [None, float("nan"), ["x"], {"x": 1}, float("inf")])
def test_template_field_without_text_raises(value: object, tmp_path: Path) -> None:
    table = [*rows(19, hint="h"), {"question": "q", "answer": "a", "hint": value}]
    data = QuestionAnswer(write(tmp_path, "a.json", table), template="{prompt} {question} {hint} {answer}\n")
    with pytest.raises(UserError, match=r"a\.json row 20: field 'hint' is"):
        data.examples("train")
    assert QuestionAnswer(write(tmp_path, "a.json", table)).examples("train"), "a field that nobody uses may be so"


# Classes


@pytest.mark.parametrize("missing", [None, float("nan"), "nan", "NaN", "NA", "null", "None", "<NA>", "", " "])
def test_auto_labels_reject_missing_values(missing: object, tmp_path: Path) -> None:
    table = [{"question": f"q{n}", "answer": "ab"[n % 2]} for n in range(20)] + [{"question": "q", "answer": missing}]
    with pytest.raises(UserError, match=r"a\.json row 21: "):
        QuestionAnswer(write(tmp_path, "a.json", table), labels="auto").examples("train")
    if isinstance(missing, str) and missing.strip():
        QuestionAnswer(write(tmp_path, "a.json", table), labels=["a", "b", missing]).examples("train")


@pytest.mark.parametrize(
    ("first", "second"),
    [("yes", "Yes"), ("new york", "new  york"), ("caf\u00e9", "cafe\u0301"), (1, 1.0), ("yes", "yes\u200b")],
)
def test_auto_labels_reject_two_ways_to_write_a_class(first: object, second: object, tmp_path: Path) -> None:
    table = [{"question": f"q{n}", "answer": (first, second, "other")[n % 3]} for n in range(20)]
    with pytest.raises(UserError, match=r"data\.labels: auto found .* and .*; name the classes"):
        QuestionAnswer(write(tmp_path, "a.json", table), labels="auto").examples("train")


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("kind", ["QuestionAnswer", "labels", "Classification", "BigBenchHard"])
def test_file_with_a_single_answer_logs_a_warning(
    kind: str, split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    field = {"Classification": "sentence", "BigBenchHard": "input"}.get(kind, "question")
    answer = {"Classification": "label", "BigBenchHard": "target"}.get(kind, "answer")
    options = "\nOptions:\n- 0\n- 1" if kind == "BigBenchHard" else ""
    files = {}
    for name in ("train", "val", "test"):
        values = [0 if name == split else n % 2 for n in range(20)]
        table = [{field: f"{name} {n}{options}", answer: str(value)} for n, value in enumerate(values)]
        files[name] = write(tmp_path, f"{name}.jsonl", lines(table))
    data: TextDataModule = {
        "QuestionAnswer": lambda: QuestionAnswer(**files),
        "labels": lambda: QuestionAnswer(**files, labels=["0", "1"]),
        "Classification": lambda: Classification("mpqa", **files),
        "BigBenchHard": lambda: BigBenchHard("any", **files),
    }[kind]()
    data.examples("train")
    (message,) = caplog.messages
    assert f"all 20 {split} rows have the same answer" in message
    assert f"{split}.jsonl row 1" in message


# Where a generation ends


def worked(answers: list[str]) -> str:
    return lines([{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)])


@pytest.mark.parametrize(
    ("kind", "answers", "settings"),
    [
        (QuestionAnswer, ["one\ntwo"] * 10 + ["three\nfour"] * 10, {}),
        (QuestionAnswer, [f"a {n}" for n in range(20)], {"stop": r"[^\w]"}),
        (QuestionAnswer, [f"a{n}" for n in range(20)], {"stop": ""}),
        (GSM8K, [f"Two.\n\nSo {n}.\n#### {n}" for n in range(20)], {"answer": "solution", "val_size": 2}),
    ],
)
def test_answers_cut_by_stop_raise(kind: Any, answers: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl row \d+: .*data\.stop .*data\.template") as raised:
        kind(train=write(tmp_path, "a.jsonl", worked(answers)), **settings).examples("train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answers", "chat", "advice"),
    [
        (["a.b"], False, r"set data\.stop to '\\n' or another.*, and end data\.template in that text"),
        (["a.\nb"], False, r"set data\.stop to '\\n\\n' or"),
        (["a.\nb", "c.\n\nd"], False, r"set data\.stop to '\\n###' or"),
        (["a.b"], True, r"set data\.stop to '\\n' or another text that no answer holds$"),
    ],
)
def test_error_suggests_a_stop_that_no_answer_contains(
    answers: list[str], chat: bool, advice: str, tmp_path: Path
) -> None:
    template = "{prompt} {question} {answer}" + ("" if chat else ".")
    file = write(tmp_path, "a.jsonl", worked(answers))
    data = QuestionAnswer(test=file, stop="[.]", template=template, chat=chat)
    with pytest.raises(UserError, match=advice):
        data.examples("test")


@pytest.mark.parametrize(
    ("end", "stop", "told"),
    [
        (".", r"\n", True),
        ("\n", r"\n\n", True),
        ("\n", "(?!)", True),
        (" and so on.\n", r"\n", True),
        (".\n", r"[.\n]", False),
        (".", r"[^\w'-]", False),
        ("", r"\n", False),
        (" \n", r"\n", False),
    ],
)
def test_template_end_without_stop_logs_a_warning(
    end: str, stop: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, "a.jsonl", lines(rows(3)))
    QuestionAnswer(test=file, stop=stop, template=f"{{prompt}} {{question}} {{answer}}{end}").examples("test")
    assert ("does not match there: what is generated after an answer counts" in caplog.text) == told


def test_question_and_answer_must_be_two_fields() -> None:
    with pytest.raises(UserError, match=r"data\.question and data\.answer are the same field, 'x'"):
        QuestionAnswer("a.json", question="x", answer="x")


def test_few_answers_cut_by_stop_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, "a.jsonl", worked(["one\ntwo"] + [f"a{n}" for n in range(19)]))
    QuestionAnswer(test=file).examples("test")
    assert "a.jsonl row 1: " in caplog.text
    assert "1 of 20 rows" in caplog.text
    assert "data.stop" in caplog.text
    caplog.clear()
    QuestionAnswer(test=file, stop="\n\n", template="{prompt} {question} {answer}\n\n").examples("test")
    assert not caplog.text


# BIG-Bench Hard


def bbh(folder: Path, targets: list[str], question: str = "Which {}?\nOptions:\n(A) x{}\n(B) y") -> str:
    examples = [{"input": question.format(n, n), "target": target} for n, target in enumerate(targets)]
    return write(folder, "bbh.json", {"canary": "none", "examples": examples})


def test_invalid_big_bench_hard_row_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = bbh(tmp_path, ["(A)", "(B)"] * 3 + ["A", "(C)"] + ["(A)", "y"] * 10 + ["y, z"])
    data = BigBenchHard("ruin_names", train=file, val_size=9)
    assert sum(len(data.examples(split)) for split in ("train", "val", "test")) == 27
    (message,) = caplog.messages
    assert "2 of 29 train rows dropped" in message
    assert "bbh.json row 8: label '(C)' is unknown; known labels: (A), (B)" in message
    assert "bbh.json row 29" in message


def test_row_with_unreadable_options_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [
        {"input": f"Which {n}?\nOptions:\n(A) x\n(B) y", "target": "(A)(B)"[n % 2 * 3 :][:3]} for n in range(30)
    ]
    examples[3]["input"] = "Which?\nOptions:\n(A) x\n(C) y"
    data = BigBenchHard("any", train=write(tmp_path, "bbh.json", {"examples": examples}), val_size=5)
    found = [example for split in ("train", "val", "test") for example in data.examples(split)]
    assert len(found) == 29
    assert all(example.labels for example in found)
    assert "bbh.json row 4: its options cannot be read" in caplog.text


def test_file_of_invalid_rows_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bbh\.json row 1: label 'C' is unknown.*20 of 30 rows are so"):
        BigBenchHard("any", train=bbh(tmp_path, ["C"] * 20 + ["A"] * 10), val_size=5).examples("train")
