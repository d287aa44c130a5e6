"""A user's own files whose answers are classes, and sentences without labels for a prompt that was learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prompts.cli import run
from lightning_prompts.datamodules import Classification, QuestionAnswer
from lightning_prompts.errors import UserError
from support.models import TINY

TINY_RUN = [
    "--model.lm.name",
    TINY,
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.max_steps",
    "2",
]
POLES = {0: ["negative", "bad"], 1: ["positive", "good"]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opinions(folder: Path, count: int = 20, names: tuple[Any, ...] = (0, 1)) -> str:
    rows = [{"question": f"opinion {n}", "answer": names[n % len(names)]} for n in range(count)]
    return write(folder / "opinions.jsonl", rows)


@pytest.mark.parametrize(
    ("names", "labels", "classes", "answers"),
    [
        ((0, 1), POLES, (("negative", "bad"), ("positive", "good")), {"negative", "positive"}),
        (("0", " bad "), {"0": "negative", "bad": "poor"}, (("negative",), ("poor",)), {"negative", "poor"}),
        (("Up", "DOWN"), ["up", "down"], (("up",), ("down",)), {"up", "down"}),
        (("US", "us"), ["us", "US", "it"], (("us",), ("US",), ("it",)), {"us", "US"}),
        (("b", "c", "a"), "auto", (("a",), ("b",), ("c",)), {"a", "b", "c"}),
        ((0, 1), [0, 1], (("0",), ("1",)), {"0", "1"}),
        (("good", "bad"), POLES, (("negative", "bad"), ("positive", "good")), {"negative", "positive"}),
        # A name is a name before it is another class's other way, in any case.
        (("a", "b"), {"a": ["b"], "b": ["a"]}, (("b",), ("a",)), {"a", "b"}),
        (("A", "B"), {"a": ["b"], "b": ["a"]}, (("b",), ("a",)), {"a", "b"}),
        (("up", "down"), [" up", "down "], (("up",), ("down",)), {"up", "down"}),
        (("free", "text"), None, (), {"free", "text"}),
    ],
)
def test_answers_become_classes(
    names: tuple[Any, ...], labels: Any, classes: tuple[tuple[str, ...], ...], answers: set[str], tmp_path: Path
) -> None:
    data = QuestionAnswer(opinions(tmp_path, names=names), labels=labels)
    found = [example for split in ("train", "val", "test") for example in data.examples(split)]
    assert len(found) == 20
    assert {example.labels for example in found} == {classes}
    assert {example.reference for example in found} == answers
    if classes:
        assert all(example.labels[example.label][0] == example.reference for example in found)  # type: ignore[index]
    if labels == {"a": ["b"], "b": ["a"]}:
        assert next(example for example in found if example.question == "opinion 0").reference == "b"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["up", "down"], r"opinions\.jsonl row 1: '0' is none of data\.labels; known: up, down"),
        ({1: "up", 2: "down"}, r"row 1: '0' is none of data\.labels; known: 1, 2"),
        ({0: "up", 1: None}, r"data\.labels: names and the ways to write them must be texts, got NoneType"),
        (["us", "US"], r"row 1: '0' is none"),
        (["up"], r"data\.labels must name two classes or more, got 1"),
        ([], r"data\.labels must name two classes or more, got 0"),
        (["up", "up"], r"data\.labels: 'up' comes twice"),
        ({0: "up", "0": "down"}, r"data\.labels: '0' comes twice"),
        ({"0": ["up"], "1": []}, r"data\.labels: 1 has no verbaliser"),
        ({"0": ["up"], "1": ["up"]}, r"share the verbaliser 'up'"),
        ([True, False], r"data\.labels: true is no text.*in quotes"),
        ([["up"], "down"], r"data\.labels: names and the ways to write them must be texts, got list"),
        ("up", r"data\.labels must be auto, or name the classes"),
    ],
)
def test_labels_that_cannot_be(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        QuestionAnswer(opinions(tmp_path), labels=labels).examples("train")
    assert "\n" not in str(caught.value)


def test_auto_does_not_take_free_text_for_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"auto found 201 different answers.*leave data\.labels out"):
        QuestionAnswer(opinions(tmp_path, 300, tuple(range(201))), labels="auto").examples("train")
    with pytest.raises(UserError, match=r"auto found only the answer '7'; name the classes"):
        QuestionAnswer(opinions(tmp_path, names=(7,)), labels="auto").examples("train")
    with pytest.raises(UserError, match=r"auto found 'Yes' and 'yes'; name the classes"):
        QuestionAnswer(opinions(tmp_path, names=("yes", "Yes", "no")), labels="auto").examples("train")
    with pytest.raises(UserError, match=r"auto found no answers; name the classes"):
        QuestionAnswer(predict=opinions(tmp_path), labels="auto").examples("predict")


def test_auto_takes_the_classes_of_the_training_file(tmp_path: Path) -> None:
    train = opinions(tmp_path, names=("b", "a"))
    test = write(tmp_path / "test.jsonl", [{"question": "?", "answer": "a"}])
    data = QuestionAnswer(train, test=test, labels="auto")
    assert data.examples("test")[0].labels == (("a",), ("b",))
    typo = write(tmp_path / "typo.jsonl", [{"question": "?", "answer": "aa"}])
    with pytest.raises(UserError, match=r"typo\.jsonl row 1: 'aa' is none of data\.labels; did you mean a\?"):
        QuestionAnswer(train, test=typo, labels="auto").examples("test")
    todo = write(tmp_path / "new.jsonl", [{"question": "?", "answer": answer} for answer in ("TODO", "b", None)])
    found = QuestionAnswer(train, predict=todo, labels="auto").examples("predict")
    assert [example.reference for example in found] == [None, "b", None], "what is no class is no answer"
    assert all(len(example.labels) == 2 for example in found)


def test_classes_are_no_words_in_common(tmp_path: Path) -> None:
    data = QuestionAnswer(opinions(tmp_path), labels=POLES, disjoint="words", val_size=2, test_size=2)
    with pytest.raises(UserError, match="leaves nothing to train on"):  # they have the word `opinion`
        data.examples("train")
    rows = [{"question": f"opinion{n}", "answer": n % 2} for n in range(20)]
    own = QuestionAnswer(write(tmp_path / "own.jsonl", rows), labels=POLES, disjoint="words", val_size=2, test_size=2)
    assert len(own.examples("train")) == 16


def test_balanced_batches_of_own_files(tmp_path: Path) -> None:
    file = opinions(tmp_path, 64, (0, 0, 0, 1))
    data = QuestionAnswer(file, labels=POLES, balanced=True, val_size=4, test_size=4, batch_size=8)
    counts = [Counter(example.label for example in batch.examples) for batch in data.train_dataloader()]
    assert counts == [{0: 4, 1: 4}] * 7
    with pytest.raises(UserError, match=r"has no label, so that data\.balanced cannot be true"):
        QuestionAnswer(file, balanced=True).train_dataloader()


@pytest.mark.parametrize("method", ["SoftPromptTuning", "Ape", "FewShot"])
def test_own_classes_from_the_command_line(method: str, tmp_path: Path) -> None:
    """Learned, tested as classes, and used on sentences that nobody has labelled."""
    folder = tmp_path / "run"
    config = tmp_path / "mine.yaml"
    told = {"train": opinions(tmp_path), "labels": POLES, "instruction": "Good or bad?", "val_size": 4, "test_size": 5}
    config.write_text(yaml.safe_dump({"data": {"class_path": "QuestionAnswer", "init_args": told}}))
    words = ["--model", method, *TINY_RUN, "-c", str(config), "--trainer.default_root_dir", str(folder)]
    chosen: list[str] = []
    if method == "Ape":
        words += ["--model.induced.count", "1", "--model.induced.max_new_tokens", "2"]
    if method == "FewShot":
        assert run(["test", *words]) == 0
    else:
        assert run(["fit", *words]) == 0
        chosen = ["--ckpt_path", "best"]
        assert run(["test", "-c", str(folder / "config.yaml"), *chosen]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test/examples"] == 5
    chosen_classes = {name: value for name, value in metrics.items() if name.startswith("test/predicted/")}
    assert chosen_classes.keys() <= {"test/predicted/negative", "test/predicted/positive"}
    assert sum(chosen_classes.values()) == 5
    assert metrics["test/accuracy"] == metrics["test/exact_match"]
    rows = [{"question": f"new {n}"} for n in range(3)]
    asked = ["predict", "-c", str(folder / "config.yaml"), *chosen]
    assert run([*asked, "--data.predict", write(tmp_path / "new.jsonl", rows)]) == 0
    found = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert [row["question"] for row in found] == ["new 0", "new 1", "new 2"]
    assert {row["generated"] for row in found} <= {"negative", "positive"}
    assert all(row["answer"] is None and row["correct"] is None for row in found)
    if method == "Ape":
        assert "Good or bad?" in (folder / "prompts.jsonl").read_text()


def test_sentences_without_labels_are_classified(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"sentence": f"s {n}", "label": n % 2} for n in range(40)])
    new = write(tmp_path / "new.jsonl", [{"sentence": f"new {n}"} for n in range(3)])
    folder = tmp_path / "run"
    words = [
        "--data",
        "Classification",
        "--data.task",
        "mpqa",
        "--data.train",
        train,
        "--data.val_size",
        "4",
        "--data.test_size",
        "4",
        "--data.predict",
        new,
        "--trainer.default_root_dir",
        str(folder),
    ]
    assert run(["predict", "--model", "FixedPrompt", "--model.text", "Which?", *TINY_RUN, *words]) == 0
    found = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert [row["question"] for row in found] == ["new 0", "new 1", "new 2"]
    assert {row["generated"] for row in found} <= {"negative", "positive"}
    sizes = {"val_size": 4, "test_size": 4}
    data = Classification("mpqa", train=train, predict=new, **sizes)
    assert {example.labels for example in data.examples("predict")} == {(("negative",), ("positive",))}
    assert not {example.question for example in data.examples("train")} & {"new 0", "new 1", "new 2"}
    alone = Classification("mpqa", predict=new)  # which would ask the hub for all else
    assert [example.question for example in alone.examples("predict")] == ["new 0", "new 1", "new 2"]
    other = write(tmp_path / "other.jsonl", [{"text": "new"}])
    for files in ({"train": train}, {}):
        with pytest.raises(UserError, match=r"other\.jsonl row 1 has no field 'sentence'; known: text"):
            Classification("mpqa", predict=other, **files).examples("predict")
