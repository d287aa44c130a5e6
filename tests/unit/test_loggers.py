"""Every logger gets what it can take, and metrics.csv is there beside each. Stand-ins, as the packages are optional."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger

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
    """Takes texts as files, as the client of MLflow does."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        assert run_id == "run"
        self.texts[artifact_file] = text


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
        assert logger.settings["model"]["init_args"]["length"] == 3
        assert logger.settings["data"]["class_path"].endswith("Antonyms")
        assert f"{logger.metrics['val/nll']:.6f}" == f"{float(metrics(folder)[-1]):.6f}"
    assert set(tables.tables) == {"samples", "prompt"}
    columns, rows, step = tables.tables["samples"]
    assert (columns, len(rows), step) == (["question", "answer", "generated"], 5, 3)
    assert len(tables.tables["prompt"][1][0][0].split(" ")) >= 3
    assert files.experiment.texts["samples/3.md"].startswith("| question | answer | generated |\n| --- | --- | --- |\n")
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


def test_no_logger_is_no_logger(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", False) == 0
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("WandbLogger", "WandbLogger: Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install"),
        ("MLFlowLogger", "MLFlowLogger: Requirement 'mlflow>=1.0.0' not met. HINT: Try running `pip install"),
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
        (
            ["CSVLogger", "MLFlowLogger"],
            "error: MLFlowLogger: Requirement 'mlflow>=1.0.0' not met. HINT: Try running `pip install",
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
