"""Loggers get settings, metrics, prompts and samples: W&B, MLflow, TensorBoard, and stand-ins for others."""

from __future__ import annotations

import csv
import json
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger

from lightning_prompts.runs import loggers
from lightning_prompts.runs.launcher import execute_here
from support.commands import FIT, SMALL, code, expect_error

MADE: list[Any] = []


class Settings(Logger):
    """Takes settings and metrics."""

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self.place, self.settings = save_dir, dict[str, Any]()
        self.metrics, self.tables = dict[str, float](), dict[str, Any]()
        MADE.append(self)

    @property
    def name(self) -> str:
        return "tables"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings = params

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.update(metrics)


class Tables(Settings):
    """Takes tables, as the logger of W&B does."""

    def log_table(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.tables[key] = (columns, data, step)


class Client:
    """Takes tables as files, as the client of MLflow does."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        assert run_id == "run"
        self.tables[artifact_file] = data


class Files(Settings):
    """Has such a client."""

    run_id = "run"

    def __init__(self, save_dir: str = "./mlruns", uri: str | None = None) -> None:
        super().__init__(save_dir)
        if uri == "wrong":
            raise RuntimeError("This kind of store is no longer kept.\n  Set tracking_uri to sqlite:///runs.db.")
        self.experiment = Client()


def metrics(folder: Path) -> list[str]:
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [row["val/nll"] for row in csv.DictReader(file) if row["val/nll"]]


def fit(folder: Path, logger: Any) -> int:
    config = folder.parent / "logger.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    return code(*FIT, *SMALL, "-c", str(config), "--trainer.default_root_dir", str(folder))


def test_named_loggers_get_settings_metrics_prompts_and_samples(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    MADE.clear()
    assert fit(folder, [{"class_path": f"test_loggers.{name}"} for name in ("Tables", "Files")]) == 0
    tables, files = MADE
    for logger in (tables, files):
        assert logger.place == str(folder)
        assert logger.settings["model.length"] == 3
        assert logger.settings["data"] == "Antonyms"
        assert logger.metrics["best/nll"] == pytest.approx(logger.metrics["val/nll"])
        assert f"{logger.metrics['val/nll']:.6f}" == f"{float(metrics(folder)[-1]):.6f}"
    assert set(tables.tables) == {"samples", "prompt"}
    columns, rows, step = tables.tables["samples"]
    assert (columns, len(rows), step) == (["question", "answer", "generated"], 5, 2)
    columns, rows, _ = tables.tables["prompt"]
    assert (columns, len(rows)) == (["place", "nearest token", "cosine similarity", "norm"], 3)
    assert files.experiment.tables["samples.json"]["step"] == [2] * 5
    assert list(files.experiment.tables["samples.json"]) == ["step", "question", "answer", "generated"]
    record = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"]
    assert [node["init_args"]["save_dir"] for node in record] == ["", ""], "holds of another run folder, too"
    MADE.clear()
    again = ["fit", "-c", str(folder / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert code(*again) == 0
    assert MADE[0].place == str(tmp_path / "again")


def test_tensorboard_by_name_needs_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert fit(folder, "TensorBoardLogger") == 0
    assert list((folder / "lightning_logs").rglob("events*"))
    assert metrics(folder)
    own = tmp_path / "own"
    assert fit(tmp_path / "other", {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(own)}}) == 0
    assert list(own.rglob("events*"))


def test_tensorboard_shows_settings_prompts_and_the_best_score(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert fit(tmp_path / "run", None) == 0
    found = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "version_0"))
    found.Reload()
    assert {"val/nll", "best/nll", "train/loss"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("val/nll")] == [2]
    assert {"samples/text_summary", "prompt/text_summary"} <= set(found.Tags()["tensors"])
    assert found.summary_metadata["_hparams_/session_start_info"]
    text = found.Tensors("prompt/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| place | nearest token | cosine similarity | norm |\n")


def wandb_records(folder: Path) -> dict[str, list[Any]]:
    """What W&B wrote offline, once its own process has written the start and the end of the run."""
    found = written_so_far(folder)
    for _ in range(300):
        if {"run", "exit"} <= set(found):
            break
        time.sleep(0.1)
        found = written_so_far(folder)
    return found


def written_so_far(folder: Path) -> dict[str, list[Any]]:
    """Records by kind, from a log in the format of LevelDB."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("run-*.wandb")
    data, place, part = path.read_bytes(), 7, b""
    found: dict[str, list[Any]] = {}
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete
            record, part = pb.Record.FromString(part), b""
            name = record.WhichOneof("record_type")
            found.setdefault(name, []).append(getattr(record, name))
    return found


def test_wandb_offline_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings and metrics arrive, a resumed run has the ID of the first, and a failed one says so."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "sweep" / "seed-0"
    config = tmp_path / "logger.yaml"
    config.write_text("trainer: {logger: {class_path: WandbLogger, init_args: {offline: true}}}\n")
    words = [*FIT, *SMALL, "-c", str(config), "--trainer.default_root_dir", str(folder)]
    execute_here(words)
    with pytest.raises(RuntimeError, match="broken"):
        execute_here([*words, "--ckpt_path", "last", "--trainer.max_steps", "6"], callbacks=[Broken()])
    first, second = (wandb_records(place) for place in sorted((folder / "wandb").glob("offline-run-*")))
    run, again = first["run"][0], second["run"][0]
    assert (run.display_name, run.project) == ("sweep/seed-0", "lightning-prompts")
    assert again.run_id == run.run_id
    assert [first["exit"][0].exit_code, second["exit"][0].exit_code] == [0, 1]
    settings = {item.key: json.loads(item.value_json) for item in first["config"][0].update}
    assert (settings["model"], settings["model.length"], settings["data"]) == ("SoftPromptTuning", 3, "Antonyms")
    assert not any("callbacks" in name for name in settings)
    rows = [{item.key or "/".join(item.nested_key): item.value_json for item in row.item} for row in first["history"]]
    steps = {name: row["trainer/global_step"] for row in rows for name in row}
    assert steps["val/nll"] == steps["samples/nrows"] == steps["prompt/nrows"] == steps["best/nll"] == "2"


class Broken(L.Callback):
    """Fails in the fifth step."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("broken")


def test_mlflow_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of files, as making a database takes longer than all else here."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, store = tmp_path / "sweep" / "seed-0", f"file:{tmp_path / 'store'}"
    config = tmp_path / "logger.yaml"
    config.write_text(f"trainer: {{logger: {{class_path: MLFlowLogger, init_args: {{tracking_uri: '{store}'}}}}}}\n")
    words = [*SMALL, "-c", str(config), "--trainer.default_root_dir", str(folder)]
    execute_here([*FIT, *words])
    client = tracking.MlflowClient(store)
    found = client.get_experiment_by_name("lightning-prompts")
    (run,) = client.search_runs([found.experiment_id])
    assert (run.info.run_name, run.info.status) == ("sweep/seed-0", "FINISHED")
    assert (run.data.params["model"], run.data.params["model.length"]) == ("SoftPromptTuning", "3")
    with pytest.raises(RuntimeError, match="broken"):
        execute_here([*FIT, *words, "--ckpt_path", "last", "--trainer.max_steps", "6"], callbacks=[Broken()])
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FAILED"
    execute_here(["test", *FIT[1:], *words, "--ckpt_path", "last", "--verbose", "false"])
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    history = {
        name: [point.step for point in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert (history["val/nll"], history["test/nll"]) == ([2], [2])
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["prompt.json", "samples.json"]


def test_mlflow_uses_its_own_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(get_tracking_uri=lambda: "sqlite:///here.db"))
    settings = Namespace(tracking_uri=None, save_dir="", run_name="mine", experiment_name="a", run_id=None)
    undo = loggers.fill(Namespace(class_path="x.MLFlowLogger", init_args=settings), tmp_path, resumed=False)
    assert (settings.tracking_uri, settings.run_name) == ("sqlite:///here.db", "mine")
    undo()
    assert (settings.tracking_uri, settings.save_dir) == (None, "")


def test_no_logger_is_no_logger(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", False) == 0
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("CometLogger", "CometLogger: Requirement 'comet-ml>=3.44.4' not met. HINT"),
        (
            {"class_path": "test_loggers.Files", "init_args": {"uri": "wrong"}},
            "Files: This kind of store is no longer kept. Set tracking_uri to sqlite:///runs.db.",
        ),
        (
            [
                {"class_path": "test_loggers.Tables"},
                {"class_path": "test_loggers.Files", "init_args": {"uri": "wrong"}},
            ],
            "error: This kind of store is no longer kept. Set tracking_uri to sqlite:///runs.db.",
        ),
    ],
)
def test_why_a_logger_cannot_be_made(
    logger: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    folder = tmp_path / "run"
    expect_error([*FIT, *SMALL, "-c", str(config), "--trainer.default_root_dir", str(folder)], words, capsys)
    assert not folder.exists()
