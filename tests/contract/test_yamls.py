"""Every YAML under experiments/ trains a step and saves, on a tiny model.

The saved prompt is reloaded and tested for one YAML of each method and of each dataset.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from lightning_prompts.cli import run
from lightning_prompts.cli.main import execute
from lightning_prompts.datamodules.classification import TASKS
from support.models import SMALLEST
from support.openai_server import Handler, State
from support.project import CONFIGS, ROOT

SMALL = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--model.max_new_tokens",
    "2",
    "--model.lm.name",
    f"{SMALLEST},max_position_embeddings=2048",
    "--model.lm.dtype",
    "float32",
    "--trainer.limit_test_batches",
    "1",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.devices",
    "1",
    "--trainer.num_nodes",
    "1",
    "--trainer.strategy",
    "auto",
    "--data.batch_size",
    "4",
    "--data.eval_batch_size",
    "4",
    "--data.max_train_examples",
    "200",
]


def tested() -> set[Path]:
    """The first YAML of each method and of each dataset."""
    found: set[Path] = set()
    seen: set[str] = set()
    for config in CONFIGS:
        parts = yaml.safe_load(config.read_text())
        classes = {parts.get("model", {}).get("class_path", ""), parts.get("data", {}).get("class_path", "")}
        if classes - seen:
            found.add(config)
        seen |= classes
    return found


TESTED = tested()


@pytest.fixture
def answering() -> Iterator[tuple[str, State]]:
    """A server in this process that answers all questions alike: its URL, and what it was asked."""
    choice = {"text": " Say it.", "message": {"role": "assistant", "content": "Say it."}, "finish_reason": "stop"}

    class Alike(Handler):
        state = State({"tiny": SMALLEST}, None)

    Alike.state.said = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Alike)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Alike.state
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_trains_and_saves(config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = config.read_text()
    parts = yaml.safe_load(text)
    for axis in ("prompt:", "estimator:", "objective:") if "model" in parts else ():
        assert axis in text, f"a YAML of a method opens with its triple; {axis} is missing"
    settings = parts.get("data", {}).get("init_args", {})
    words = ["-c", str(config), *SMALL, "--trainer.default_root_dir", str(tmp_path / "run")]
    if "model" not in parts:
        words += ["--model", "SoftPromptTuning"]
    if "data" not in parts:
        words += ["--data", "Antonyms"]
    if "train" in settings:  # a user's own file
        rows = [{settings["question"]: f"w{n}", settings["answer"]: f"v{n}"} for n in range(400)]
        (tmp_path / "own.json").write_text(json.dumps(rows))
        words += ["--data.train", str(tmp_path / "own.json")]
    if "context_file" in parts.get("model", {}).get("init_args", {}):
        (tmp_path / "context.txt").write_text("a word for each vector, " * 20)
        words += ["--model.context_file", str(tmp_path / "context.txt")]
    if parts.get("data", {}).get("class_path") == "GSM8K":  # from the hub
        rows = [{"question": f"How much is {n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(500)]
        for split, part in (("train", rows[:300]), ("test", rows[300:])):
            (tmp_path / f"{split}.json").write_text(json.dumps(part))
            words += [f"--data.{split}", str(tmp_path / f"{split}.json")]
    if parts.get("data", {}).get("class_path") == "Classification":
        rows = [{"sentence": f"Sentence {n}.", "label": n % len(TASKS[settings["task"]].classes)} for n in range(600)]
        (tmp_path / "own.json").write_text(json.dumps(rows))
        words += ["--data.train", str(tmp_path / "own.json")]
    if parts.get("model", {}).get("class_path") == "ReinforceRefiner":  # the tiny model has 256 tokens in all
        words += ["--model.support", "TopK", "--model.support.count", "20"]
    texts = ("DeepLanguageNetwork", "Ape", "DemonstrationSearch", "Gepa", "Capo")
    if parts.get("model", {}).get("class_path") in texts:
        words += ["--data.batch_size", "2", "--data.eval_batch_size", "2"]
    asked = None
    if (parts.get("model", {}).get("init_args", {}).get("proposer") or {}).get("server"):
        url, asked = request.getfixturevalue("answering")
        words += ["--model.proposer.name", "tiny", "--model.proposer.server.base_url", url]
    if parts.get("model", {}).get("class_path") in ("FixedPrompt", "FewShot", "ChainOfThought"):
        assert run(["test", *words, "--verbose", "false"]) == 0
    else:
        trainer = execute(["fit", *words, "--trainer.max_steps", "1"]).trainer
        assert 0 < trainer.callback_metrics["val/nll"] < 20
        assert all(math.isfinite(value) for value in trainer.callback_metrics.values())
        checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
        assert asked is None or asked.requests, "the server was asked"
        if config not in TESTED:
            return
        saved = tmp_path / "run" / "config.yaml"
        assert run(["test", "-c", str(saved), "--ckpt_path", "last", "--verbose", "false"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["test/nll"] < 20
    assert all(math.isfinite(value) for value in metrics.values()), "a member that no batch has is left out"
