"""The Python API does what the command line does, to the digit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_prompts as lp
from lightning_prompts.api.comparison import _jobs
from lightning_prompts.callbacks import NonFiniteGuard
from lightning_prompts.cli import run as run_command
from lightning_prompts.datamodules import Addition, Mixture
from lightning_prompts.lm import FrozenLM, KeyValues, LMConfig
from lightning_prompts.methods import PrefixTuning, SoftPromptTuning
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.runs.reader import Run
from support.models import SMALLEST

ROWS = [{"question": f"w{n}", "answer": f"v{n % 7}"} for n in range(60)]
QUICK: dict[str, Any] = {"lm": SMALLEST, "max_new_tokens": 2, "accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def data() -> lp.QuestionAnswer:
    return lp.QuestionAnswer.from_rows(ROWS, batch_size=8)


@pytest.fixture(scope="module")
def fitted(data: lp.QuestionAnswer, tmp_path_factory: pytest.TempPathFactory) -> lp.PromptRun:
    folder = tmp_path_factory.mktemp("runs") / "a"
    run = lp.fit("soft_prompt", data, length=3, max_steps=6, folder=folder, **QUICK)
    run.test()
    return run


def test_a_run_equals_that_of_the_command_line(fitted: lp.PromptRun, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = f"""--model SoftPromptTuning --model.length 3 --model.lm.name {SMALLEST} --model.max_new_tokens 2
        --data QuestionAnswer --data.train {file} --data.batch_size 8 --trainer.max_steps 6 --trainer.accelerator cpu
        --trainer.enable_progress_bar false --trainer.default_root_dir {tmp_path / "run"}"""
    words = text.split()
    assert run_command(["fit", *words]) == 0
    assert run_command(["test", *words, "--ckpt_path", "best", "--verbose", "false"]) == 0
    there, here = Run(tmp_path / "run"), Run(fitted.folder)
    assert here.metrics == there.metrics
    assert here.predictions == there.predictions
    assert here.curves["train/nll"] == there.curves["train/nll"]
    saved = [torch.load(run.folder / "checkpoints" / "best.ckpt", weights_only=True) for run in (there, here)]
    assert torch.equal(*(one["state_dict"]["prompt.embeddings"] for one in saved))


def test_answers_equal_the_predictions(fitted: lp.PromptRun) -> None:
    questions = fitted.predictions["question"].tolist()
    found = fitted.answer(questions)
    assert found["question"].tolist() == questions
    assert found["answer"].tolist() == fitted.predictions["generated"].tolist()
    assert fitted.answer(pd.DataFrame({"question": questions})).equals(found)
    assert fitted.answer(questions[0])["answer"].tolist() == found["answer"].tolist()[:1]


def test_questions_are_answered_in_batches(fitted: lp.PromptRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size that the tests had, which bounds the memory."""
    questions = [f"w{n}" for n in range(130)]
    sizes: list[int] = []
    evaluate = SoftPromptTuning.evaluate_batch

    def noted(self: SoftPromptTuning, examples: Any) -> list[dict[str, Any]]:
        sizes.append(len(examples))
        return evaluate(self, examples)

    monkeypatch.setattr(SoftPromptTuning, "evaluate_batch", noted)
    found = fitted.answer(questions)
    assert sizes == [64, 64, 2]
    assert found["question"].tolist() == questions
    assert fitted.answer(questions[-2:])["answer"].tolist() == found["answer"].tolist()[-2:]
    assert fitted.answer([]).empty


def test_a_prefix_is_plain_numbers_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device and the precision of the run."""
    key, value = (torch.rand(2, 1, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    method = PrefixTuning(length=2)
    monkeypatch.setattr(method, "current_prompt", lambda: KeyValues([(key, value)] * 2))
    monkeypatch.setattr(lp.PromptRun, "_restored", lambda self: (SimpleNamespace(method=method), None))
    found = lp.PromptRun(tmp_path).prompt
    assert isinstance(found, KeyValues)
    for layer in found.layers:
        for part, own in zip(layer, (key, value), strict=True):
            assert (part.dtype, part.device.type, part.requires_grad) == (torch.float32, "cpu", False)
            assert torch.equal(part, own.detach().float())


def test_results_are_tables(fitted: lp.PromptRun) -> None:
    assert fitted.metrics.loc["test", "examples"] == len(fitted.predictions) == 6
    assert isinstance(fitted.prompt, torch.Tensor)
    assert fitted.prompt.shape == (3, 32)
    assert "train/nll" in fitted.curves
    html = fitted._repr_html_()
    assert "<td>0.0%</td>" in html
    assert "data:image/svg+xml;base64," in html, "the learning curves"
    assert "restores" not in html, "no counts of training among the test metrics"
    assert repr(fitted) == (
        f"<SoftPromptTuning in {fitted.folder}: test nll {fitted.metrics.loc['test', 'nll']:.3f}, "
        "test exact match 0.0%>"
    )
    assert repr(SoftPromptTuning(length=3)).startswith("SoftPromptTuning(lm='smollm2-135m-instruct', max_new_tokens=")


def test_a_saved_run_is_loaded_and_exported(fitted: lp.PromptRun, tmp_path: Path) -> None:
    copy = fitted.save(tmp_path / "copy")
    again = lp.load(copy.folder)
    assert torch.equal(again.prompt, fitted.prompt)  # type: ignore[arg-type]
    assert (again.export("safetensors") / "prompt.safetensors").is_file()
    with pytest.raises(lp.UserError, match="exists; give another folder"):
        fitted.save(copy.folder)


def test_a_comparison_is_a_table_and_continues(
    data: lp.QuestionAnswer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"text": "static", "two": {"method": "soft_prompt", "length": 2}}
    settings = {"seeds": 2, "max_steps": 2, "folder": tmp_path / "c", "budget": {"tokens": 5000}, **QUICK}
    table = lp.compare(methods, data, **settings).table
    assert table.index.tolist() == ["text", "two"]
    assert table["seeds"].tolist() == [2, 2]
    assert table.loc["text", "train_tokens"] == 0 < table.loc["two", "train_tokens"]
    values = [Run(tmp_path / "c" / "two" / f"seed-{seed}").metrics["test/nll"] for seed in (0, 1)]
    assert table.loc["two", "nll"] == pytest.approx(sum(values) / 2)
    assert table.loc["two", "nll_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("metrics.json")}
    again = lp.compare(methods, data, **settings)
    assert again.table.equals(table)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("metrics.json")}
    assert "two" in again.report().read_text()
    html = again._repr_html_()
    assert "<th>two</th><td>2</td>" in html
    assert f"{table.loc['two', 'nll']:.3f} ± {table.loc['two', 'nll_sd']:.3f}" in html
    assert html.count("<img") == 2


def test_a_seed_without_a_number_leaves_no_mean(tmp_path: Path) -> None:
    """Rather than the mean of the other seeds. A copy of a run beside it is no seed."""
    for seed, nll in {"0": 1.03, "1": 2.03, "2": float("nan"), "0.bak": 9.0}.items():
        folder = tmp_path / "soft" / f"seed-{seed}"
        folder.mkdir(parents=True)
        found = {"test/nll": nll, "test/exact_match": 0.5, **({"test/accuracy": 0.5} if seed == "0" else {})}
        (folder / "metrics.json").write_text(json.dumps(found))
    comparison = lp.Comparison(tmp_path, ["soft"])
    row = comparison.table.loc["soft"]
    assert row["seeds"] == 3
    assert row["exact_match"] == 0.5
    assert row[["nll", "nll_sd", "accuracy", "accuracy_sd"]].isna().all()
    html = comparison._repr_html_()
    assert html.count("<td>nan</td>") == 2
    assert html.count("<img") == 1


def test_settings_of_a_method_override_those_of_all(data: lp.QuestionAnswer) -> None:
    """Wherever either stands."""
    methods = {
        "a": {"method": "soft_prompt", "trainer": {"max_steps": 5}},
        "b": {"method": "soft_prompt", "max_steps": 6, "trainer": {"accelerator": "cpu"}},
        "c": "soft_prompt",
    }
    jobs = _jobs(methods, data, None, {"max_steps": 7, "accelerator": "gpu"}, {"max_steps": 130})
    steps = {name: (job.options["trainer.max_steps"], job.options["trainer.accelerator"]) for name, job in jobs.items()}
    assert steps == {"a": (5, "gpu"), "b": (6, "cpu"), "c": (130, "gpu")}


def test_a_failed_run_does_not_stop_the_others(data: lp.QuestionAnswer, tmp_path: Path) -> None:
    methods = {"good": "static", "bad": {"method": "soft_prompt", "length": 300}}
    found = lp.compare(methods, data, seeds=1, folder=tmp_path, max_steps=1, **QUICK)
    assert found.table["seeds"].tolist() == [1, 0]
    assert [Path(place).parent.name for place in found.errors] == ["bad"]
    assert "failed" in found._repr_html_()


def test_the_lm_is_loaded_once(data: lp.QuestionAnswer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lp.free_lms()
    loads: list[str] = []
    load = FrozenLM.load

    def counting(config: LMConfig, *args: Any, **settings: Any) -> FrozenLM:
        loads.append(config.name)
        return load(config, *args, **settings)

    monkeypatch.setattr(FrozenLM, "load", counting)
    run = lp.fit("soft_prompt", data, max_steps=1, folder=tmp_path / "a", **QUICK)
    run.test()
    run.answer("hot")
    texts = {text: {"method": "static", "text": text} for text in ("one", "two")}
    lp.compare(texts, data, seeds=1, folder=tmp_path / "b", **QUICK)
    assert loads == [SMALLEST]


def test_objects_equal_names_and_settings(tmp_path: Path) -> None:
    task = Addition(max_digits=1, ood_digits=[2], train_size=20, val_size=5, test_size=5, batch_size=4)
    method = SoftPromptTuning(length=2, init=FromText("ab"), lm=LMConfig(SMALLEST), max_new_tokens=2)
    quick = {name: value for name, value in QUICK.items() if name not in ("lm", "max_new_tokens")}
    one = lp.fit(method, task, max_steps=2, folder=tmp_path / "one", **quick)
    same: dict[str, Any] = {"init": FromText("ab"), "max_steps": 2, **QUICK}
    other = lp.fit("SoftPromptTuning", task, length=2, folder=tmp_path / "other", **same)
    assert torch.equal(one.prompt, other.prompt)  # type: ignore[arg-type]
    assert one.test().equals(other.test())
    assert set(one.metrics.index) == {"test", "test/2_digits"}
    config = tmp_path / "method.yaml"
    config.write_text("model: {class_path: SoftPromptTuning, init_args: {length: 2}}\n")
    third = lp.fit(config, task, folder=tmp_path / "third", **same)
    assert torch.equal(third.prompt, one.prompt)  # type: ignore[arg-type]


def test_callbacks_and_loggers_are_used(data: lp.QuestionAnswer, tmp_path: Path) -> None:
    class Count(L.Callback):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

    count, logger = Count(), CSVLogger(tmp_path / "mine")
    lp.fit("soft_prompt", data, max_steps=2, folder=tmp_path / "a", callbacks=[count], logger=logger, **QUICK)
    assert count.batches == 2
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    tested = CSVLogger(tmp_path / "tested")
    lp.load(tmp_path / "a").test(logger=tested)
    assert "test/nll" in next((tmp_path / "tested").rglob("metrics.csv")).read_text()


def test_a_trainer_is_used_as_it_is(fitted: lp.PromptRun, data: lp.QuestionAnswer, tmp_path: Path) -> None:
    class Mine(L.Trainer):
        """A subclass, which settings could not name."""

    class Count(L.Callback):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

    lm = {name: value for name, value in QUICK.items() if name in ("lm", "max_new_tokens")}
    count, guard = Count(), NonFiniteGuard(patience=3)
    same: dict[str, Any] = {"max_steps": 6, "gradient_clip_val": 1.0, "log_every_n_steps": 5, "accelerator": "cpu"}
    trainer = Mine(**same, devices=1, default_root_dir=tmp_path / "run", callbacks=[count, guard])
    run = lp.fit("soft_prompt", data, length=3, trainer=trainer, verbose=False, **lm)
    assert run.folder == tmp_path / "run"
    assert count.batches == trainer.global_step == 6
    assert torch.equal(run.prompt, fitted.prompt)  # type: ignore[arg-type]
    assert run.test().equals(fitted.metrics)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert len(set(kinds)) == len(kinds)
    assert guard in trainer.callbacks  # type: ignore[attr-defined]
    record = yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]
    assert {name: record[name] for name in same} == same
    assert not (tmp_path / "lightning_logs").exists()
    with pytest.raises(lp.UserError, match="this Trainer has already run"):
        lp.fit("soft_prompt", data, trainer=trainer, folder=tmp_path / "again")
    settings = {name: value for name, value in QUICK.items() if name not in lm}
    other = lp.fit("soft_prompt", data, length=3, trainer={**settings, "max_steps": 6}, folder=tmp_path / "d", **lm)
    assert torch.equal(other.prompt, fitted.prompt)  # type: ignore[arg-type]


def test_what_a_trainer_keeps_of_its_loggers_and_checkpoints(data: lp.QuestionAnswer, tmp_path: Path) -> None:
    lm: dict[str, Any] = {"lm": SMALLEST, "max_new_tokens": 2, "verbose": False}
    mine = CSVLogger(tmp_path / "mine")
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=mine, enable_checkpointing=False)
    run = lp.fit("soft_prompt", data, trainer=trainer, folder=tmp_path / "a", **lm)
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    assert not list(run.folder.rglob("*.ckpt"))
    trainer = L.Trainer(accelerator="cpu", enable_progress_bar=False)
    tested = lp.fit("static", data, text="Say.", trainer=trainer, folder=tmp_path / "b", **lm)
    assert tested.metrics.loc["test", "examples"] == 6
    trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=[ModelCheckpoint(monitor="val/nll")])
    with pytest.raises(lp.UserError, match="leave this ModelCheckpoint out"):
        lp.fit("soft_prompt", data, trainer=trainer, folder=tmp_path / "c", **lm)


def test_classes_are_chosen(tmp_path: Path) -> None:
    rows = [{"question": f"film {n}", "answer": ("good", "bad")[n % 2]} for n in range(30)]
    run = lp.fit(
        "static",
        lp.QuestionAnswer.from_rows(rows, labels="auto"),
        text="Say.",
        folder=tmp_path / "static/seed-0",
        **QUICK,
    )
    assert "accuracy" in run.metrics
    assert run.metrics.index.tolist() == ["test"]
    assert run.metrics.filter(like="predicted/").loc["test"].sum() == run.metrics.loc["test", "examples"]
    assert (run.export() / "prompt.txt").read_text() == "Say."
    assert set(run.answer(["film a", "film b"])["answer"]) <= {"good", "bad"}
    assert run.prompt == "Say."
    columns = lp.Comparison(tmp_path, ["static"]).table.columns
    assert "accuracy" in columns
    assert not [column for column in columns if column.startswith("predicted/")]


def test_a_refused_run_leaves_the_old_one(fitted: lp.PromptRun) -> None:
    before = {path: path.read_bytes() for path in fitted.folder.rglob("*") if path.is_file()}
    others = lp.QuestionAnswer.from_rows([{"question": f"x{n}", "answer": "y"} for n in range(30)])
    for method in ("soft_prompt", "static"):
        with pytest.raises(lp.UserError, match="already holds a run"):
            lp.fit(method, others, folder=fitted.folder, **QUICK)
    with pytest.raises(lp.UserError, match="prompt"):
        lp.fit("soft_prompt", others, folder=fitted.folder, overwrite=True, length=300, **QUICK)
    after = {path: path.read_bytes() for path in fitted.folder.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before


def test_a_comparison_refuses_other_settings_and_rows(data: lp.QuestionAnswer, tmp_path: Path) -> None:
    lp.compare(["static"], data, seeds=1, folder=tmp_path, text="a", **QUICK)
    with pytest.raises(lp.UserError, match="holds a run that was made with other options"):
        lp.compare(["static"], data, seeds=1, folder=tmp_path, text="b", **QUICK)
    others = lp.QuestionAnswer.from_rows(ROWS[:50], batch_size=8)
    with pytest.raises(lp.UserError, match="holds a run that was made with other options"):
        lp.compare(["static"], others, seeds=1, folder=tmp_path, text="a", **QUICK)
    with pytest.raises(lp.UserError, match="seeds must be at least 1"):
        lp.compare(["static"], data, seeds=0)
    with pytest.raises(lp.UserError, match="two methods have the same name"):
        lp.compare([SoftPromptTuning(length=4), SoftPromptTuning(length=8)], data)


def test_settings_of_every_kind_arrive(tmp_path: Path) -> None:
    """Texts that YAML reads as something else, classes by number, NumPy, a method's own LM, other fields."""
    rows = [{"input": f"film {n}", "output": n % 2, "question": "no"} for n in range(30)]
    labels = {1: ["good"], 0: ["bad"]}
    task = lp.QuestionAnswer.from_rows(
        pd.DataFrame(rows), question="input", answer="output", labels=labels, val_size=np.int64(3)
    )
    methods = {text: {"method": "static", "text": text} for text in ("nulls", "yes")}
    found = lp.compare(
        {**methods, "own": {"method": "static", "lm": LMConfig(SMALLEST)}}, task, seeds=1, folder=tmp_path, **QUICK
    )
    assert not found.errors
    assert [run.prompt for name in methods for run in found.runs(name)] == list(methods)
    run = found.runs("nulls")[0]
    asked = run.answer([{"input": "film a", "question": "no"}])
    assert asked["question"].tolist() == ["film a"]
    assert run.answer({"input": "film a"}).equals(asked)
    assert set(run.predictions["answer"]) == {"good", "bad"}


class _Fixed(lp.QuestionAnswer):
    """A subclass that sets a setting of its base class."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(template="{prompt} {question} = {answer}\n", **kwargs)


def test_mixtures_and_subclasses(tmp_path: Path) -> None:
    run = lp.fit("static", _Fixed.from_rows(ROWS, batch_size=8), text="a", folder=tmp_path / "a", **QUICK)
    assert run.metrics.loc["test", "examples"] == 6
    rows = [{"question": f"x{n}", "answer": f"y{n}"} for n in range(40)]
    members = {"one": lp.QuestionAnswer.from_rows(ROWS), "two": lp.QuestionAnswer.from_rows(rows)}
    both = lp.fit("static", Mixture(members), text="a", folder=tmp_path / "b", **QUICK)
    assert {"test", "test/one", "test/two"} <= set(both.metrics.index)
    with pytest.raises(lp.UserError, match="have templates or classes of their own"):
        both.answer("hot")


def test_a_saved_run_has_its_own_rows(fitted: lp.PromptRun, tmp_path: Path) -> None:
    again = fitted.save(tmp_path / "b")
    assert str(fitted.folder / "data") not in (again.folder / "config.yaml").read_text()
    assert again.test().equals(fitted.metrics)
    (tmp_path / "file").touch()
    with pytest.raises(lp.UserError, match=r"cannot be made: .*/file is a file"):
        fitted.save(tmp_path / "file" / "run")
    with pytest.raises(lp.UserError, match="unknown format 'onnx'"):
        fitted.export("onnx")
    with pytest.raises(lp.UserError, match=r"unknown option 'exmples'; did you mean examples\?"):
        fitted.export("peft", exmples=2)


def test_a_saved_run_is_tested_from_its_config(fitted: lp.PromptRun, tmp_path: Path) -> None:
    """The original's results stay, and so does every other setting, whatever the folder is called."""
    again = fitted.save(tmp_path / "my 'copy': #1")
    config = again.folder / "config.yaml"
    before, after = (yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (fitted, again))
    assert after["trainer"]["default_root_dir"] == str(again.folder)
    rows = after["data"]["init_args"]["train"]
    assert Path(rows).parent == again.folder / "data"
    before["trainer"]["default_root_dir"], before["data"]["init_args"]["train"] = str(again.folder), rows
    assert after == before
    metrics = fitted.folder / "metrics.json"
    written = metrics.stat().st_mtime_ns
    (again.folder / "metrics.json").unlink()
    assert run_command(["test", "-c", str(config), "--ckpt_path", "best", "--verbose", "false"]) == 0
    assert metrics.stat().st_mtime_ns == written
    assert (again.folder / "metrics.json").exists()


def test_a_run_of_another_machine_is_read(fitted: lp.PromptRun, tmp_path: Path) -> None:
    """On the device that is there, whatever that of the run was."""
    again = fitted.save(tmp_path / "b")
    config = again.folder / "config.yaml"
    text = config.read_text()
    assert "accelerator: cpu\n" in text
    config.write_text(text.replace("accelerator: cpu\n", "accelerator: tpu\n"))
    assert torch.equal(again.prompt, fitted.prompt)  # type: ignore[arg-type]


def test_a_notebook_shows_errors_in_one_line() -> None:
    """IPython calls this method instead of formatting the traceback."""
    assert lp.UserError("what to do")._render_traceback_() == ["UserError: what to do"]


def test_a_run_without_checkpoint_is_not_tested_as_trained(data: lp.QuestionAnswer, tmp_path: Path) -> None:
    run = lp.fit("soft_prompt", data, max_steps=1, enable_checkpointing=False, logger=False, folder=tmp_path, **QUICK)
    assert not (tmp_path / "logs").exists()
    with pytest.raises(lp.UserError, match="holds no checkpoint"):
        run.test()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda data: lp.fit("soft_promt", data), "unknown method 'soft_promt'; did you mean soft_prompt"),
        (lambda data: lp.fit("soft_prompt", data, lenght=3), "unknown setting 'lenght'; did you mean length?"),
        (lambda data: lp.fit("soft_prompt", data, length="abc"), "length: expected int, got 'abc'"),
        (lambda data: lp.fit("soft_prompt", data, budget=3), "budget must be a dict"),
        (lambda data: lp.fit("soft_prompt", "Antonym"), "unknown dataset 'Antonym'; did you mean Antonyms"),
        (lambda data: lp.fit("soft_prompt", "no.yaml"), "no.yaml"),
        (lambda data: lp.fit("no.yaml", data), "no.yaml does not exist"),
        (lambda data: lp.fit("soft_prompt", [1, 2]), "train row 1 is a int, not a dict"),
        (lambda data: lp.fit("soft_prompt", data, callbacks_=1), "unknown setting 'callbacks_'"),
        (
            lambda data: lp.fit(SoftPromptTuning(optimizer=lambda p: torch.optim.SGD(p, lr=1.0)), data),
            "the optimizer of a method object cannot be recorded",
        ),
        (
            lambda data: lp.fit("soft_prompt", data, trainer={"max_step": 1}),
            "setting of the trainer 'max_step'; did you mean",
        ),
        (lambda data: lp.fit("soft_prompt", data, trainer={"logger": 1}), "use the argument logger"),
        (lambda data: lp.fit("soft_prompt", data, fast_dev_run=True), "set max_steps=1 instead"),
        (lambda data: lp.fit("soft_prompt", data, trainer=L.Trainer(barebones=True)), "trainer.barebones turns off"),
        (lambda data: lp.fit("soft_prompt", data, trainer=L.Trainer(), max_steps=1), "give it to your Trainer"),
        (lambda data: lp.fit("soft_prompt", data, trainer=L.Trainer(logger=False), logger=True), "leave out logger"),
        (
            lambda data: lp.fit("soft_prompt", data, trainer=L.Trainer(default_root_dir="x"), folder="y"),
            "leave out one of them",
        ),
        (lambda data: lp.compare(["static"], data, trainer=L.Trainer()), "a Trainer trains once"),
        (
            lambda data: lp.compare({"a": {"method": "static", "trainer": L.Trainer()}}, data),
            "a Trainer trains once",
        ),
        (lambda data: lp.compare(["static"], data, trainer="gpu"), "trainer must be a dict such as"),  # type: ignore[arg-type]
        (lambda data: lp.compare(["static"], data, lenght=3), "no method has the setting 'lenght'"),
        (lambda data: lp.compare({"a": {"length": 3}}, data), "'a' has no key 'method'"),
        (lambda data: lp.load("nowhere"), "nowhere is no run folder"),
        (lambda data: lp.fit("static", data, folder="afile/run"), "cannot be made: afile is a file"),
        (lambda data: lp.compare(["static"], data, folder="afile/runs"), "cannot be made: afile is a file"),
    ],
)
def test_errors_are_one_line(
    call: Callable[[lp.QuestionAnswer], object],
    words: str,
    data: lp.QuestionAnswer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    with pytest.raises(lp.UserError) as caught:
        call(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("config.yaml"))
