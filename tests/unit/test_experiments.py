"""The scripts under experiments/ do what RESULTS.md says they do."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_prompts.cli import run
from lightning_prompts.lm import FrozenLM, LMConfig
from support.models import SMALLEST, TINY
from support.project import ROOT

EXPERIMENTS = ROOT / "experiments"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXPERIMENTS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SCRIPTS = sorted(path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.py"))
ELSEWHERE = ("benchmarks/nanogcg_score.py", "peers/")  # run in environments of their own


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith(ELSEWHERE)])
def test_every_script_finds_what_it_imports(name: str) -> None:
    script(name)


def test_the_benchmark_compares_the_same_thing(real: FrozenLM) -> None:
    """PEFT is an independent implementation, so this is also a test of the loss and its gradient."""
    benchmark = script("benchmarks/prompt_tuning.py")
    benchmark.BATCH = 4
    row = benchmark.compare(real, 4, "antonyms", 1, torch.float32)
    assert row["first_loss_ours"] == pytest.approx(row["first_loss_peft"], abs=1e-4)
    assert row["gradient_difference"] < 1e-4
    assert row["ratio"] > 0
    assert row["peak_share_ours"] > 0


def test_the_candidate_benchmark_compares_the_same_thing(real: FrozenLM) -> None:
    """A Hugging Face forward pass is an independent implementation, so this is also a test of the grid's scores."""
    benchmark = script("benchmarks/hard_search.py")
    model = AutoModelForCausalLM.from_pretrained(benchmark.embedded_folder(benchmark.NAME), dtype=torch.float32).eval()
    rows = benchmark.ten_tokens(real, 5, "train")[:4]
    assert all(len(row.context) + len(row.answer) == 15 for row in rows)
    candidates = benchmark.replacements(real, benchmark.initial(real, 5), rows, torch.Generator().manual_seed(0))[:3]
    scores = benchmark.CandidateScorer(real).score(rows, candidates)
    for c, filled in enumerate(benchmark.fill(rows, candidates.tolist())):
        assert torch.allclose(scores.nll[c], benchmark.hugging_face(model, filled), atol=1e-4)


def test_the_antonym_table_is_made_from_wordnet_s_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    licence = "  1 This software and database is being provided to you\n"
    # offset, file, part of speech, words (count in hexadecimal, each with a number), pointers, gloss
    (tmp_path / "data.adj").write_text(
        licence
        + "00000010 00 a 02 hot 0 warm(p) 0 002 ! 00000020 a 0101 & 00000030 a 0000 | high in heat\n"
        + "00000020 00 a 01 cold 0 001 ! 00000010 a 0101 | low in heat\n"
        + "00000030 00 a 02 red_hot 0 Hot 0 001 ! 00000020 a 0101 | not a single lower-case word\n"
    )
    for name in ("adv", "noun", "verb"):
        (tmp_path / f"data.{name}").write_text(licence)
    (tmp_path / "cntlist.rev").write_text("hot%3:00:01:: 1 5\nhot%3:00:02:: 2 2\ncold%3:00:01:: 1 4\n")
    table = tmp_path / "table.tsv"
    monkeypatch.setattr(sys, "argv", ["make_table.py", str(tmp_path), str(table)])
    script("antonyms/make_table.py").main()
    assert table.read_text() == "word\tantonym\tpart\tcount\ncold\thot\tadj\t4\n"
    assert "1 pairs, 1 of them" in capsys.readouterr().out


@pytest.mark.parametrize("order", ["prompt first", "example first"])
@pytest.mark.parametrize("ways", [1, 2])
def test_the_scoring_benchmark_compares_the_same_numbers(order: str, ways: int) -> None:
    benchmark = script("benchmarks/dln_scoring.py")
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=2048"))
    arguments = argparse.Namespace(prompts=3, examples=3, repeats=1, ways=ways, memory_mb=256.0)
    row = benchmark.compare(lm, lm.model, order, 6, arguments)
    assert row["difference"] < 1e-4
    assert row["ratio"] > 0


def test_a_network_s_run_is_analysed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model:\n  class_path: DeepLanguageNetwork\n  init_args:\n"
        "    layers: [{prompt: Think., max_new_tokens: 4}, {prompt: Say.}]\n"
        "    proposals: [{class_path: LanguageModelProposals, init_args: {count: 2, max_new_tokens: 4, shown: 1}}]\n"
        "    posterior: {samples: 2}\n"
        f'    lm: {{name: "{SMALLEST},max_position_embeddings=2048"}}\n'
        "data:\n  class_path: Hyperbaton\n  init_args: {train_size: 8, val_size: 6, test_size: 6, batch_size: 4}\n"
        "trainer: {max_steps: 2, val_check_interval: 1, check_val_every_n_epoch: null, accelerator: cpu, "
        f"enable_progress_bar: false, max_epochs: -1, default_root_dir: {tmp_path / 'trained'}}}\n"
    )
    assert run(["fit", "-c", str(config)]) == 0
    (tmp_path / "trained").rename(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert any("'val/exact_match'" in key for key in saved["callbacks"]), "the best is the one of the best accuracy"
    analysis = script("dln/analysis.py")
    monkeypatch.setattr(sys, "argv", ["analysis.py", str(tmp_path / "run"), "--examples", "3", "--draws", "2"])
    analysis.main()
    printed = capsys.readouterr().out
    for heading in ("Prompts over time", "Proposals", "Messages", "Hidden texts", "What they carry"):
        assert f"{heading}\n\n|" in printed
    assert "| 0 | LanguageModelProposals | " in printed
    assert printed.count("Which sentence has the correct adjective order") == 3
    assert "| initial | " in printed
    monkeypatch.setattr(sys, "argv", ["analysis.py", *[str(tmp_path / "run")] * 2])
    analysis.main()
    both = capsys.readouterr().out
    assert both.startswith("Best prompts\n\n|")
    tried = [
        int(line.split("|")[3])
        for text in (printed, both)
        for line in text.splitlines()
        if line.startswith("| 0 | LanguageModelProposals | ")
    ]
    assert tried[1] == 2 * tried[0] > 0, "of all runs together"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], r"prompts\.jsonl does not exist"),
        ([".", "--draws", "0"], "--draws must be at least 1, got 0"),
        ([".", "--examples", "-1"], "--examples must be at least 1, got -1"),
        ([".", "--measured", "0"], "--measured must be at least 1, got 0"),
    ],
)
def test_what_is_no_run_to_analyse(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = script("dln/analysis.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["analysis.py", *words])
    with pytest.raises(SystemExit) as caught:
        analysis.main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: .*{told}", last)


@pytest.mark.parametrize(
    ("content", "told"),
    [('{"kind": "LanguageModelProposals"}\n', "has no validation"), ('{"kind": "valid', r"prompts\.jsonl line 1")],
)
def test_a_run_that_ended_early_is_no_run_to_analyse(
    content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    monkeypatch.setattr(sys, "argv", ["analysis.py", *[str(tmp_path)] * 2])
    with pytest.raises(SystemExit):
        script("dln/analysis.py").main()
    assert re.search(f"error: .*{told}", capsys.readouterr().err.splitlines()[-1])


def test_prompts_with_odd_line_ends_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON does not escape them."""
    text = "one\u2028two\x85three"
    row = {"kind": "validation", "step": 1, "accuracy": 0.5, "prompts": [text]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["analysis.py", *[str(tmp_path)] * 2])
    script("dln/analysis.py").main()
    assert capsys.readouterr().out.count(f"| 0.5 | 0.5 | 1 | {text} |") == 2


def test_mutual_information_of_known_cases() -> None:
    mutual_information = script("dln/analysis.py").mutual_information
    same = torch.tensor([[0.3, 0.7]] * 4).log()
    assert mutual_information(same).item() == pytest.approx(0.0, abs=1e-6)
    decided = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert mutual_information(decided).item() == pytest.approx(math.log(2))
    table = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.5, 0.5, 0.0]])
    joint = table / 3
    mean = joint.sum(0)
    expected = sum(
        float(joint[k, y]) * math.log(float(table[k, y] / mean[y])) for k in range(3) for y in range(2)
    )  # sum over p(k, y) log p(y | k) / p(y)
    assert mutual_information(table.log()).item() == pytest.approx(expected, abs=1e-6)


def test_paired_comparison(tmp_path: Path) -> None:
    """A difference that every question shows is found, where the spread over questions hides it; none is not found."""
    paired = script("paired.py")
    generator = np.random.default_rng(0)
    hard = generator.normal(3, 2, size=60)
    for name, shift in (("first", 0.0), ("better", -0.1), ("same", 0.0)):
        values = hard + shift + generator.normal(0, 0.05, size=60)
        for seed in range(2):
            folder = tmp_path / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            lines = [
                json.dumps({"question": f"q{n}", "answer": "a", "nll": value, "correct": bool(value < 3)})
                for n, value in enumerate(values[seed::2])
            ]
            (folder / "predictions.jsonl").write_text("\n".join(lines))
    lines = paired.table([tmp_path / name for name in ("first", "better", "same")], "nll")
    better, same = (line.split("|") for line in lines[3:5])
    assert float(better[3].split()[0]) == pytest.approx(-0.1, abs=0.03)
    assert better[4].strip() == "≤ 0.0001"
    assert float(same[4]) > 0.05
    with pytest.raises(SystemExit, match="run lightning-prompts sweep first"):
        paired.table([tmp_path], "nll")


def test_paired_comparison_is_of_the_main_test_set(tmp_path: Path) -> None:
    """As in a report: a set out of distribution is left out, and a question of two seeds is one question."""
    paired = script("paired.py")
    for name, far in (("first", 9.0), ("other", 1.0)):
        for seed in range(2):
            folder = tmp_path / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            rows = [("test", "a", 1.0), ("test", "b", 2.0), ("test/far", "c", far)]
            lines = [json.dumps({"split": split, "question": q, "answer": "x", "nll": nll}) for split, q, nll in rows]
            (folder / "predictions.jsonl").write_text("\n".join(lines))
    lines = paired.table([tmp_path / "first", tmp_path / "other"], "nll")
    assert lines[2].startswith("| first | 1.500 ")
    assert lines[3].startswith("| other | 1.500 ")
    assert "| +0.000 " in lines[3]
    assert lines[-1] == "2 questions"


def test_prompts_move_between_quantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each form is trained on once, and scored on all; runs that are there are kept."""
    transfer = script("quantization_transfer.py")
    blocks = SMALLEST.replace("hidden_size=32,intermediate_size=48", "hidden_size=64,intermediate_size=128")
    words = ["x", "--folder", str(tmp_path), "--seeds", "0", "--", str(EXPERIMENTS / "antonyms" / "soft_prompt.yaml")]
    options = [
        f"--model.lm.name={blocks}",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=2",
        "--data.max_train_examples=16",
        "--data.batch_size=4",
        "--data.eval_batch_size=4",
        "--trainer.limit_test_batches=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    monkeypatch.setattr(sys, "argv", [words[0], *options, *words[1:]])
    transfer.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["| trained on", "| bfloat16", "| int8", "| nf4"]
    assert all(line.count("/") == 3 for line in table[1:])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    assert len(made) == 9
    transfer.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")} == made


def test_paired_comparison_without_nll_is_of_exact_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server may give no log-probabilities."""
    paired = script("paired.py")
    file = tmp_path / "seed-0" / "predictions.jsonl"
    file.parent.mkdir()
    file.write_text('{"question": "q", "answer": "a", "nll": null, "correct": true}\n')
    monkeypatch.setattr(sys, "argv", ["paired.py", str(tmp_path)])
    paired.main()
    printed = capsys.readouterr().out
    assert f"{tmp_path} has no nll\n" in printed
    assert f"| {tmp_path.name} | 1.000 " in printed
    file.write_text('{"question": "q",\n')
    with pytest.raises(SystemExit, match=r"error: .*predictions\.jsonl line 1"):
        paired.main()
