from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_prompts.datamodules import (
    Antonyms,
    BigBenchHard,
    Classification,
    Hyperbaton,
    Mixture,
    Navigate,
    QuestionAnswer,
    TextDataModule,
)
from lightning_prompts.datamodules.samplers import EpochSampler, ResumableLoader
from lightning_prompts.datamodules.sources import read_table, shipped_table
from lightning_prompts.datamodules.splits import disjoint_components
from lightning_prompts.errors import UserError
from lightning_prompts.types import Batch

PAIRS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(20)]


def words(examples: list) -> set[str]:
    return {word for example in examples for word in (example.question, example.reference)}


@pytest.mark.parametrize("seed", [0, 1])
def test_antonyms_share_no_word_between_splits(seed: int) -> None:
    data = Antonyms(seed=seed)
    train, val, test = (data.examples(split) for split in ("train", "val", "test"))
    assert not words(train) & words(test)
    assert not words(train) & words(val)
    assert not words(val) & words(test)
    assert len(train) + len(val) + len(test) == 2 * 990
    assert 0.18 < len(test) / 1980 < 0.22
    assert 0.08 < len(val) / 1980 < 0.12


def test_antonyms_go_both_ways_and_depend_on_the_seed() -> None:
    pairs = {(example.question, example.reference) for example in Antonyms().examples("train")}
    assert pairs == {(b, a) for a, b in pairs}
    assert words(Antonyms(seed=1).examples("test")) != words(Antonyms().examples("test"))
    assert sum(len(Antonyms(min_count=0).examples(split)) for split in ("train", "val", "test")) == 2 * 3229


def test_max_train_examples_is_a_seeded_subset() -> None:
    some = [example.question for example in Antonyms(max_train_examples=100).examples("train")]
    assert len(some) == 100
    assert some == [example.question for example in Antonyms(max_train_examples=100).examples("train")]
    assert set(some) < {example.question for example in Antonyms().examples("train")}
    assert len(Antonyms(max_train_examples=100).examples("test")) == len(Antonyms().examples("test"))


@pytest.mark.parametrize(
    ("dataset", "settings", "own"),
    [
        (Antonyms, {}, ""),
        (BigBenchHard, {"task": "date_understanding"}, "Infer the date"),
        (BigBenchHard, {"task": "unknown"}, ""),
        (Classification, {"task": "sst2"}, "Read the following review"),
        (Hyperbaton, {}, "Which sentence"),
        (Mixture, {"members": {"words": Antonyms(instruction="One of them.")}}, ""),
        (Navigate, {}, "If you follow"),
    ],
)
def test_instructions_replace_those_of_the_dataset(
    dataset: type[TextDataModule], settings: dict[str, object], own: str
) -> None:
    found = dataset(**settings).instruction
    assert found.startswith(own)
    assert bool(found) == bool(own)
    assert dataset(**settings, instruction=None).instruction == found
    for given in ("Do it.", ""):
        assert dataset(**settings, instruction=given).instruction == given


def test_components() -> None:
    pairs = [("a", "b"), ("c", "d"), ("b", "e"), ("f", "d")]
    assert sorted(map(sorted, disjoint_components(pairs))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / f"rows{ending}"
    if ending == ".json":
        path.write_text(json.dumps(PAIRS))
    elif ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, PAIRS)))
    elif ending == ".parquet":
        datasets.Dataset.from_list(PAIRS).to_parquet(path)
    else:
        mark = "," if ending == ".csv" else "\t"
        path.write_text("\n".join([f"question{mark}answer", *(mark.join(row.values()) for row in PAIRS)]))
    assert read_table(path) == PAIRS


def test_csv_values_are_kept_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n007,NA\n"a, b",1.50\n')
    assert read_table(path) == [{"question": "007", "answer": "NA"}, {"question": "a, b", "answer": "1.50"}]


def test_fields_by_name_and_other_fields_in_the_template(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"in": n, "out": n + 1, "unit": "m"}) + "\n" for n in range(30)))
    data = QuestionAnswer(str(path), question="in", answer="out", template="{prompt}{question} {unit} ->{answer}")
    example = data.examples("train")[0]
    assert example.after.endswith(" m ->")
    assert int(example.reference) == int(example.question) + 1


def test_hold_out_sizes(pairs_file: Path) -> None:
    data = QuestionAnswer(str(pairs_file), val_size=5, test_size=0.25)
    train, val, test = (data.examples(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (25, 5, 10)
    assert len({example.question for example in train + val + test}) == 40


def test_disjoint_words(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    rows = [{"question": f"w{n}", "answer": f"w{n + 1}"} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = QuestionAnswer(str(path), disjoint="words", test_size=10, val_size=5)
    train, test, val = (data.examples(split) for split in ("train", "test", "val"))
    assert len(test) == 10
    assert not words(train) & words(test)
    assert not words(train) & words(val)


@pytest.mark.parametrize("disjoint", ["rows", "words"])
def test_training_rows_in_the_test_file_are_dropped(disjoint: str, tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    rows = [{"question": f"w{n}", "answer": f"w{n + 1}"} for n in range(40)]
    train.write_text("\n".join(map(json.dumps, rows)))
    test.write_text("\n".join(map(json.dumps, rows[:5])))
    data = QuestionAnswer(str(train), test=str(test), val_size=2, disjoint=disjoint)  # type: ignore[arg-type]
    questions = [example.question for example in data.examples("train")]
    assert not set(questions) & {"w0", "w1", "w2", "w3", "w4"}
    assert ("w5" in questions) == (disjoint == "rows")


def test_held_out_questions_are_none_of_a_given_split(tmp_path: Path) -> None:
    """Whatever the case and the spaces of a question."""
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    rows = [{"question": f"What is {n}?", "answer": n} for n in range(40)]
    train.write_text("\n".join(map(json.dumps, rows)))
    val.write_text("\n".join(json.dumps({**row, "question": f"what  is {row['answer']}?"}) for row in rows[:30]))
    data = QuestionAnswer(str(train), val=str(val), test_size=5)
    answers = {split: {example.reference for example in data.examples(split)} for split in ("train", "val", "test")}
    assert [len(found) for found in answers.values()] == [5, 30, 5]
    assert len(set().union(*answers.values())) == 40


def test_the_same_questions_for_validation_and_testing_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(3)))
    QuestionAnswer(val=str(path), test=str(path)).examples("test")
    assert "3 questions of the val split are also in the test split" in caplog.text


def test_json_values_are_kept_as_written(tmp_path: Path) -> None:
    path = tmp_path / "dates.jsonl"
    path.write_text('{"question": "2020-01-31 10:00:00", "answer": "2020-01-31"}\n' * 2)
    assert read_table(path)[0] == {"question": "2020-01-31 10:00:00", "answer": "2020-01-31"}
    benchmark = tmp_path / "task.json"
    benchmark.write_text('{"canary": "x", "examples": [{"question": "a", "answer": "b"}]}')
    assert read_table(benchmark) == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"question": "why?"}\n{"question": "how?", "answer": " "}\n'),
        ("a.csv", "question,answer\nwhy?,\nhow?,\n"),
    ],
)
def test_predict_needs_no_answers(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    examples = QuestionAnswer(predict=str(path)).examples("predict")
    assert [example.answer for example in examples] == [None, None]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.csv", "question,answer\n", "has no rows"),
        ("a.txt", "x", "the ending must be one of"),
        ("a.jsonl", '{"question": "x", "answr": "y"}', "has no field 'answer' .data.answer.; did you mean answr"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n{"question": "x", "answer": " "}', "row 2: field 'answer' is"),
        (
            "a.jsonl",
            '{"question": "x", "answer": "y"}\n{"question": "x"}',
            "row 2 has no field 'answer'; known",
        ),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n{"question": ', "line 2 is not valid JSON"),
        ("a.json", '[{"question": "x", "answer": "y"},', "is not valid JSON"),
        ("a.json", '{"examples": [\n  {"question": "x",\n   "answer": "y"}\n  {}\n]}\n', "line 4 is not valid JSON"),
        ("a.json", '{"question": "x", "answer": "y"}\n{"question"}\n', "line 2 is not valid JSON"),
        ("a.json", "\n", "has no rows"),
        ("a.jsonl", '{"question": "x", "answer": ["y"]}', "row 1: field 'answer' is a list, not text"),
        ("a.jsonl", '["question", "answer"]', "row 1 is a list, not an object"),
        ("a.parquet", "no parquet", "not readable as parquet"),
        ("a.csv", 'question,answer\n1,2\n"', "a.csv"),
    ],
)
def test_invalid_files_raise(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        QuestionAnswer(str(path)).examples("train")
    assert "\n" not in str(raised.value)


def test_empty_splits_raise(pairs_file: Path) -> None:
    with pytest.raises(UserError, match=r"data.test_size 50 of the 40 rows .* leaves nothing to train on"):
        QuestionAnswer(str(pairs_file), test_size=50).examples("train")
    with pytest.raises(UserError, match="the train split is empty"):
        QuestionAnswer(test=str(pairs_file)).examples("train")
    with pytest.raises(UserError, match="needs a file"):
        QuestionAnswer()


def test_order_depends_only_on_seed_and_epoch() -> None:
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(50, seed=4)) != first


def test_loader_resumes_from_its_state() -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(list(range(10)), batch_size=3, sampler=EpochSampler(10, 0), collate_fn=Batch)

    whole = [batch.examples for batch in loader()]
    half = loader()
    iterator = iter(half)
    next(iterator)
    next(iterator)
    resumed = loader()
    resumed.load_state_dict(half.state_dict())
    next(iter(resumed))
    assert [batch.examples for batch in resumed] == whole[2:], "even if the epoch is begun twice"
    assert resumed.state_dict() == {"epoch": 0, "yielded": 0}
    resumed.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert len(list(resumed)) == 4, "the next epoch is whole again"


def test_rare_antonyms_are_an_out_of_distribution_test_set() -> None:
    data, plain = Antonyms(rare_size=60), Antonyms()
    assert data.splits("test") == ["test", "test/rare_words"]
    assert plain.splits("test") == ["test"]
    rare = data.examples("test/rare_words")
    assert len(rare) == 60
    others = [example for split in ("train", "val", "test") for example in data.examples(split)]
    assert not words(rare) & words(others)
    for split in ("train", "val", "test"):
        assert data.examples(split) == plain.examples(split), "nothing else changes"
    counts = {row["word"]: int(row["count"]) for row in shipped_table("antonyms.tsv")}
    assert all(counts.get(example.question, 0) == 0 for example in rare)


@pytest.mark.parametrize(
    ("size", "message"), [(3, "even number"), (-2, "even number"), (9_000, "only [0-9]+ questions")]
)
def test_invalid_rare_size_raises(size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Antonyms(rare_size=size).examples("test")
