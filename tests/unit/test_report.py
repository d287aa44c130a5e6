"""The report: its numbers against other ways to compute them, its page against what a browser would do with it."""

from __future__ import annotations

import base64
import configparser
import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import statistics as plain
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_prompts.api.comparison import Comparison
from lightning_prompts.cli import commands, run
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.report import charts
from lightning_prompts.report.charts import frontier
from lightning_prompts.report.comparability import unequal_settings
from lightning_prompts.report.data import Method, Task, compare, group, values
from lightning_prompts.report.statistics import bootstrap, holm, over_seeds, permutation, questions_needed
from lightning_prompts.report.verdict import _cheaper, _sure
from lightning_prompts.runs.configs import flat
from lightning_prompts.runs.reader import Prediction, Run, find
from support.commands import TINY_RUN

SHIFTS = {"soft": 0.0, "static": 1.5, "search": 0.6}  # what a method's NLL is above the question's own
FILES = (
    "config.yaml",
    "metrics.json",
    "predictions.jsonl",
    "logs/version_0/metrics.csv",
    "budget.json",
    "samples.jsonl",
    "prompt.jsonl",
    "environment.json",
)


def rows_of(method: str, seed: int, count: int = 30) -> list[dict[str, Any]]:
    generator = np.random.default_rng([seed, len(method), int(10 * SHIFTS[method])])
    hard = np.random.default_rng(7 + seed).gamma(2, 1, size=count)
    found = []
    for index in range(count):
        nll = float(hard[index] + SHIFTS[method] + generator.normal(0, 0.3))
        correct = nll < 2.5
        # The first five questions come with every seed, the others with one.
        name = f"q{index if index < 5 else 100 * seed + index}"
        found.append(
            {
                "split": "test",
                "question": name,
                "answer": f"a{index}",
                "generated": f"a{index}" if correct else "no",
                "nll": nll,
                "correct": correct,
            }
        )
    return found


def write_run(folder: Path, method: str, seed: int, rows: list[dict[str, Any]] | None = None) -> Path:
    """A run folder as training and testing leave it."""
    rows = rows_of(method, seed) if rows is None else rows
    (folder / "logs" / "version_0").mkdir(parents=True)
    place = {"trainer": {"max_steps": 20, "default_root_dir": str(folder)}, "seed_everything": seed}
    model = {"class_path": f"some.where.{method.title()}", "init_args": {"length": len(method), "lm": {"name": "tiny"}}}
    member = {"class_path": "lightning_prompts.datamodules.Antonyms", "init_args": {"seed": 0, "batch_size": 8}}
    data = {"class_path": "lightning_prompts.datamodules.Mixture", "init_args": {"seed": seed, "members": [member]}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**place, "model": model, "data": data}))
    metrics = {
        "test/nll": plain.fmean(row["nll"] for row in rows),
        "test/examples": len(rows),
        "test/exact_match": plain.fmean(row["correct"] for row in rows),
        "test/far/nll": 5.25 + seed,
        "test/far/exact_match": 0.125,
        "test/far/examples": 4,
        "test/bertscore": 0.5,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_rows(folder / "predictions.jsonl", rows)
    lines = ["budget/tokens,epoch,step,train/nll,val/exact_match,val/nll"]
    for step in range(1, 21):
        lines.append(f"{100.0 * step},0,{step - 1},{5 / step + seed},,")
        if step % 10 == 0:
            lines.append(f",0,{step - 1},,{step / 40},{3 + SHIFTS[method] - step / 20}")
    (folder / "logs" / "version_0" / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "budget.json").write_text(
        json.dumps({"tokens": 2000 + seed, "seconds": 12.5, "calls_remote": 3, "steps": 20, "memory_gb": 1.5})
    )
    samples = [{"step": step, "question": "what?", "answer": "this", "generated": f"at {step}"} for step in (10, 20)]
    write_rows(folder / "samples.jsonl", samples)
    near = {"tokens": [" so", "ft"], "cosine": [0.5, 0.25], "nll_as_words": 7.5}
    readout = [{"step": step, **near, "distance": step / 10} for step in (10, 20)]
    write_rows(folder / "prompt.jsonl", readout)
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "torch": "2.0", "dtype": "float32"}))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_study(folder: Path) -> Path:
    """Three methods, two seeds each, as sweep stores them."""
    for method, seed in itertools.product(SHIFTS, range(2)):
        write_run(folder / method / f"seed-{seed}", method, seed)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Runs that a test may change."""
    return write_study(tmp_path / "runs")


@pytest.fixture
def drawn() -> None:
    """For tests of what Matplotlib draws. In all others an empty picture stands for each chart, as drawing is slow."""


@pytest.fixture(autouse=True)
def _empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(charts, "_svg", lambda *args: "<svg></svg>")


def report(*words: Path | str) -> int:
    try:
        return commands.run(["report", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)


class Page:
    """A report, read back: as XML, which is stricter than a browser, and as Markdown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.html, self.markdown = path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")
        self.root = ElementTree.fromstring(self.html.removeprefix("<!DOCTYPE html>\n"))
        self.text = "\n".join("".join(node.itertext()) for node in self.root.iter() if node.tag in ("p", "figcaption"))
        self.verdict = [(node.tag, "".join(node.itertext())) for node in self.root.iter() if node.tag in ("dt", "dd")]
        self.headings = ["".join(node.itertext()) for node in self.root.iter() if re.fullmatch("h[1-6]", str(node.tag))]
        self.tables = [
            [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
            for table in self.root.iter("table")
        ]
        self.in_markdown = _tables(self.markdown)

    def says(self, word: str) -> str:
        """What the verdict says under a word."""
        return next(text for (_, found), (_, text) in itertools.pairwise(self.verdict) if found == word)

    def summary(self) -> list[list[str]]:
        return self.table("method", "exact match", "95%")[1:]

    def pairs(self, title: str = "NLL") -> list[list[str]]:
        return self.table("method", "against", "rows in common", title)[1:]

    def table(self, *header: str) -> list[list[str]]:
        return next(
            table
            for table in self.tables
            if all(map(str.startswith, table[0], header)) and len(table[0]) >= len(header)
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a study, with its charts; only to be read."""
    runs = write_study(tmp_path_factory.mktemp("study") / "runs")
    assert report(runs, "--baseline", runs / "static", "--out", runs.parent / "a b" / "page.html") == 0
    return Page(runs.parent / "a b" / "page.html")


def _tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        if line.startswith("| "):
            cells = re.split(r"(?<!\\)\|", line[1:-1])
            clean = [re.sub(r"\\(.)", r"\1", cell.strip().replace("<br>", "\n")) for cell in cells]
            found[-1].append([html.unescape(cell) for cell in clean])
        elif not line.startswith("|-") and found[-1]:
            found.append([])
    return [table for table in found if table]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_the_textbook_s() -> None:
    low, high = over_seeds([2.0, 4.0, 9.0]) or (0, 0)
    reach = 4.302653 * math.sqrt(13) / math.sqrt(3)
    assert (low, high) == pytest.approx((5 - reach, 5 + reach), abs=1e-4)
    assert over_seeds([2.0]) is None


def enumerated(differences: np.ndarray, groups: list[int]) -> float:
    """All swaps, one after the other."""
    extreme = 0
    names = sorted(set(groups))
    for signs in itertools.product((-1, 1), repeat=len(names)):
        total = sum(signs[names.index(name)] * value for name, value in zip(groups, differences, strict=True))
        extreme += abs(total) >= abs(differences.sum()) - 1e-12
    return extreme / 2 ** len(names)


def test_permutation_counts_all_swaps_of_few_and_draws_them_of_many() -> None:
    generator = np.random.default_rng(0)
    few = generator.normal(0.4, 1, size=9)
    assert permutation(few, generator) == pytest.approx(enumerated(few, list(range(9))), abs=1e-12)
    assert permutation(np.append(few, np.zeros(50)), generator) == pytest.approx(enumerated(few, list(range(9))))
    many = generator.normal(0.35, 1, size=16)
    exact = enumerated(many, list(range(16)))
    assert 0.02 < exact < 0.9
    assert permutation(many, np.random.default_rng(1)) == pytest.approx(exact, abs=0.015)
    groups = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 9]
    together = permutation(many, generator, np.array(groups))
    assert together == pytest.approx(enumerated(many, groups), abs=1e-12)
    assert permutation(np.zeros(5), generator) == 1.0


def test_the_bootstrap_is_near_the_normal_interval_and_draws_questions_whole() -> None:
    data = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = bootstrap(data, np.random.default_rng(1)) or (0, 0)
    reach = 1.96 * data.std(ddof=1) / 20
    assert (low, high) == pytest.approx((data.mean() - reach, data.mean() + reach), abs=0.02)
    # The same question with four seeds is one piece of evidence, and not four.
    ends = bootstrap(np.tile(data, 4), np.random.default_rng(1), np.tile(np.arange(400), 4))
    assert ends == pytest.approx((low, high), abs=1e-9)
    assert bootstrap(data[:3], np.random.default_rng(1), np.zeros(3, dtype=np.int64)) is None, "of a single question"


def test_holm_s_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_questions_needed_is_the_textbook_s() -> None:
    assert questions_needed(0.5, 1.0) == 32, "((1.960 + 0.842) / 0.5) ** 2"
    assert questions_needed(-0.5, 1.0, tests=5) == 47, "((2.576 + 0.842) / 0.5) ** 2"
    assert questions_needed(0.0, 1.0) is None


def test_frontier_keeps_what_nothing_beats() -> None:
    points = [(10.0, 0.5), (5.0, 0.4), (20.0, 0.5), (30.0, 0.9), (5.0, 0.3), (0.0, 0.35)]
    assert frontier(points, larger=True) == [(5.0, 0.4), (10.0, 0.5), (30.0, 0.9)]
    assert frontier(points, larger=False) == [(5.0, 0.3)], "what costs nothing is beaten here alone"


def test_rows_are_matched_by_seed_set_question_and_answer() -> None:
    def row(split: str, question: str, answer: str, nll: float | None) -> Prediction:
        return Prediction(split, question, answer, "", nll, None)

    mine = {
        "0": [
            row("test", "q", "a", 1.0),
            row("test", "q", "a", 3.0),
            row("test", "q", "b", 5.0),
            row("far", "q", "a", 7.0),
            row("test", "x", "a", None),
        ],
        "1": [row("test", "q", "a", 9.0)],
    }
    other = {
        "0": [
            row("test", "q", "b", 4.5),
            row("test", "q", "a", 0.5),
            row("test", "q", "a", 1.5),
            row("test", "q", "a", 2.5),
            row("test", "x", "a", 1.0),
        ],
        "2": [row("test", "q", "a", 0.0)],
    }
    found = compare(values(mine, "nll"), values(other, "nll"))
    assert found is not None
    assert found.count == 3, "both of a pair that is there twice, and what is there once; no other seed, set or answer"
    assert found.difference == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert compare(values({"3": mine["0"]}, "nll"), values(other, "nll")) is None


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_page(whole: Page) -> None:
    page = whole
    assert "6 runs of 3 methods on 1 task" in page.text
    summary = page.summary()
    assert [row[0] for row in summary] == ["soft", "search", "static (baseline)"], "the best first"
    for label, match, _, _, nll, over, _, _, count in summary:
        by_seed = [rows_of(label.split()[0], seed) for seed in range(2)]
        means = [plain.fmean(row["nll"] for row in rows) for rows in by_seed]
        assert nll == f"{plain.fmean(means):.3f} ± {plain.stdev(means):.3f}"
        reach = 12.7062 * plain.stdev(means) / math.sqrt(2)
        assert [float(end) for end in over.strip("[]").split(",")] == pytest.approx(
            [plain.fmean(means) - reach, plain.fmean(means) + reach], abs=2e-3
        )
        shares = [100 * plain.fmean(row["correct"] for row in rows) for rows in by_seed]
        assert match == f"{plain.fmean(shares):.1f} ± {plain.stdev(shares):.1f}%"
        assert count == "30"
    for title, field, scale in (("NLL", "nll", 1), ("exact match, points", "correct", 100)):
        pairs = page.pairs(title)
        assert [tuple(row[:2]) for row in pairs] == [("search", "static"), ("soft", "static"), ("soft", "search")]
        for mine, other, count, change, ends, drawn, adjusted in pairs:
            both = [list(zip(rows_of(mine, seed), rows_of(other, seed), strict=True)) for seed in range(2)]
            differences = [scale * (first[field] - second[field]) for rows in both for first, second in rows]
            mean = plain.fmean(differences)
            assert (count, change) == ("60", f"{mean:+.3f}" if field == "nll" else f"{mean:+.1f}")
            low, high = (float(end) for end in ends.strip("[]").split(","))
            assert low < mean < high
            assert high - low == pytest.approx(4 * plain.stdev(differences) / math.sqrt(60), rel=0.35)
            small, larger = (float(text.removeprefix("≤ ")) for text in (drawn, adjusted))
            assert small <= larger <= 3 * small + 1e-4
            if field == "nll":
                assert drawn == "≤ 0.0001", "random swaps give no smaller p-value, so this one is a bound"
                assert adjusted == "≤ 0.0003"
    assert page.table("method", "far: exact match", "far: NLL")[1][1:] == ["12.5 ± 0.0%", "5.750 ± 0.707"]
    assert page.table("method", "bertscore")[1][1] == "0.500 ± 0.000"
    assert page.table("method", "tokens")[0][1:] == ["tokens", "seconds", "calls remote", "steps", "memory, GB"]
    assert page.table("method", "tokens")[1][1:] == ["2,000 (2,000–2,001)", "12.5", "3", "20", "1.5"]
    assert page.table("method", "seed", "prompt")[1] == [
        "search",
        "0",
        "' so' (0.50), 'ft' (0.25)",
        "20",
        "7.500",
        "2.600",
        "50.0%",
        "2.000",
    ]
    differing = {row[0]: row[1:] for row in page.table("setting")[1:]}
    assert differing == {"model": ["Search", "Soft", "Static"], "model.length": ["6", "4", "6"]}
    assert ["dtype", "float32"] in page.table("", "all")
    assert page.table("question", "reference", "step 10")[1] == ["what?", "this", "at 10", "at 20"]


def test_verdict_opens_the_page(whole: Page) -> None:
    page = whole
    assert page.html.index('<dl class="verdict">') < page.html.index("<h2>")
    soft, static = (page.table("method", "exact match", "95%")[row][1] for row in (1, 3))
    change, ends = page.pairs("exact match, points")[1][3:5]
    best = f"soft, exact match {soft} against {static} for the baseline static: {change} points (95% interval {ends})."
    assert page.says("Best here") == best
    adjusted = page.pairs("exact match, points")[1][-1]
    sure = page.says("How sure")
    assert sure.startswith(
        "Established for these prompts on other questions: paired permutation test over 55 questions"
    )
    assert f"p (Holm) {'' if '≤' in adjusted else '= '}{adjusted}." in sure
    seeds = [
        plain.fmean(a["correct"] - b["correct"] for a, b in zip(rows_of("soft", n), rows_of("static", n), strict=True))
        for n in range(2)
    ]
    low = 100 * (plain.fmean(seeds) - 12.7062 * plain.stdev(seeds) / math.sqrt(2))
    assert re.search(rf"For other seeds: (not )?established \(95% interval \[{re.escape(f'{low:+.1f}')}, ", sure)
    assert ("For other seeds: established" in sure) == (low > 0)
    assert "second best, search" in sure
    assert page.says("Cost").startswith("soft: 2,000 training tokens, 12.5 seconds; search: ")
    told, command = page.says("Next").split(": ")
    assert told == "Export it (seed 0, the best on validation)"
    assert command == f"lightning-prompts export {page.path.parents[1]}/runs/soft/seed-0 --format peft"
    assert page.says("Then").endswith("train with at least 3 seeds.")
    assert "**Best here**" in page.markdown.split("## ")[0]


def alike(folder: Path, right: dict[str, int]) -> Path:
    """Methods that answer so many of the same 30 questions rightly."""
    for method, count in right.items():
        rows = [
            {**row, "question": f"q{n}", "nll": 2.0, "correct": n < count} for n, row in enumerate(rows_of(method, 0))
        ]
        write_run(folder / method, method, 0, rows)
    return folder


def test_verdict_without_evidence_says_how_much_is_needed(tmp_path: Path) -> None:
    assert report(alike(tmp_path, {"static": 20, "soft": 22}), "--baseline", tmp_path / "static") == 0
    page = Page(tmp_path / "report.html")
    assert page.says("How sure").startswith("Not established")
    assert "p (Holm) = 0.5000" in page.says("How sure"), "two questions differ: two of the four swaps are as large"
    deviation = math.sqrt((2 * (1 - 2 / 30) ** 2 + 28 * (2 / 30) ** 2) / 29)
    needed = math.ceil((2.8015852 * deviation / (2 / 30)) ** 2)
    rounded = -(-needed // 10) * 10
    told = f"About {rounded} test questions would establish a difference of this size (now: 30)."
    assert page.says("Next") == told
    assert "export" not in page.html.split("<h2>")[0]


@pytest.mark.parametrize(
    ("metric", "best", "rival", "word"),
    [
        ("exact_match", [0.5, 0.5], [0.3, 0.3], "established"),
        ("exact_match", [0.1, 0.1, 1.0], [0.3, 0.3], "not established"),  # the best by a seed that only it has
        ("nll", [1.0, 1.0], [2.0, 2.0], "established"),
        ("nll", [3.0, 3.0, 0.1], [4.0, 2.0, 3.5], "not established"),
        ("nll", [3.0, 3.0, 0.1], [2.5, 2.5], "not established"),
    ],
)
def test_verdict_over_seeds_has_a_direction(metric: str, best: list[float], rival: list[float], word: str) -> None:
    def method(name: str, figures: list[float]) -> Method:
        runs: Any = [SimpleNamespace(seed=n, metrics={f"test/{metric}": value}) for n, value in enumerate(figures)]
        return Method(name, tuple(runs))

    mine, other = method("soft", best), method("static", rival)
    found: Any = SimpleNamespace(adjusted=0.5, p_value=0.5, difference=0.1, questions=9)
    told = _sure(Task("", (mine, other), other), mine, other, found)
    assert f"For other seeds: {word} (95% interval [" in told
    assert told.endswith(f"over {min(len(best), len(rival))} seeds).")


def test_the_seeds_of_the_interval_are_those_that_both_methods_were_tested_on() -> None:
    def method(tested: int) -> Method:
        figures = [{"test/exact_match": 0.5} if seed < tested else {} for seed in range(3)]
        runs: Any = [SimpleNamespace(seed=seed, metrics=each) for seed, each in enumerate(figures)]
        return Method("", tuple(runs))

    mine, other = method(2), method(3)
    found: Any = SimpleNamespace(adjusted=0.5, p_value=0.5, difference=0.1, questions=9)
    assert _sure(Task("", (mine, other), other), mine, other, found).endswith("over 2 seeds).")


def test_the_cheaper_method_is_known_where_both_costs_are() -> None:
    def method(*costs: float | None, trained: bool = True) -> Method:
        budgets: list[dict[str, float]] = [{} if cost is None else {"tokens": cost} for cost in costs]
        runs: Any = [SimpleNamespace(trained=trained, budget=budget) for budget in budgets]
        return Method("", tuple(runs))

    cheap, dear, unknown, untrained = method(20, 20), method(25, 25, None), method(None), method(None, trained=False)
    for one, other, cheaper in (
        (cheap, dear, cheap),  # a seed of unknown cost is no cheap one
        (cheap, unknown, None),
        (cheap, untrained, untrained),
        (unknown, untrained, None),
        (cheap, method(20), None),
    ):
        assert _cheaper(one, other) is _cheaper(other, one) is cheaper


def test_a_method_of_unknown_cost_is_not_called_cheap(tmp_path: Path) -> None:
    runs = alike(tmp_path, {"static": 5, "soft": 22, "search": 21})
    budget = runs / "search" / "budget.json"
    budget.write_text(json.dumps({"tokens": 1000}))
    for cheaper in (True, False):
        assert report(runs, "--baseline", runs / "static") == 0
        told = Page(runs / "report.html").says("Or")
        assert told.startswith("soft and search may be equally good")
        assert ("the cheaper one, search, will do" in told) == cheaper
        budget.unlink(missing_ok=True)


def test_verdict_where_the_baseline_is_best(study: Path) -> None:
    assert report(study, "--baseline", study / "soft") == 0
    page = Page(study / "report.html")
    assert "the baseline. No other method is better; the second best is search with" in page.says("Best here")
    assert page.says("Next").startswith("Keep the baseline")


def test_verdict_of_a_single_run_asks_for_a_baseline(study: Path) -> None:
    assert report(study / "soft" / "seed-0") == 0
    folder = study / "soft" / "seed-0"
    command = f"lightning-prompts test -c {folder}/config.yaml --trainer.default_root_dir {folder}/untrained"
    page = Page(folder / "report.html")
    assert page.says("Next").endswith(command)
    assert page.says("Result").startswith("Soft, exact match")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("text", "Export it: lightning-prompts export {run} --format text"),
        ("text, last", "Export it: lightning-prompts export {run} --format text --checkpoint last"),
        (
            "own",
            "Answer questions with it: lightning-prompts predict -c {run}/config.yaml --ckpt_path "
            "{run}/checkpoints/best.ckpt",
        ),
        (
            "own, last",
            "Answer questions with it: lightning-prompts predict -c {run}/config.yaml --ckpt_path "
            "{run}/checkpoints/last.ckpt",
        ),
        ("server", "Its text is in {run}/prompt.txt."),
        ("untrained", "Use it as it is: lightning-prompts predict -c {run}/config.yaml"),
    ],
)
def test_verdict_names_the_command_that_uses_the_winner(change: str, told: str, tmp_path: Path) -> None:
    run_of = alike(tmp_path, {"static": 2, "soft": 28}) / "soft"
    change, _, tested = change.partition(", ")
    if tested:
        (run_of / "tested.json").write_text(json.dumps({"checkpoint": f"checkpoints/{tested}.ckpt", "step": 20}))
    if change in ("text", "server"):
        (run_of / "prompt.txt").write_text("Answer.")
    if change == "server":
        config = yaml.safe_load((run_of / "config.yaml").read_text())
        config["model"]["init_args"]["lm"]["server"] = {"url": "http://localhost"}
        (run_of / "config.yaml").write_text(yaml.safe_dump(config))
    if change == "own":
        rows = [json.loads(line) for line in (run_of / "predictions.jsonl").read_text().splitlines()]
        write_rows(run_of / "predictions.jsonl", [{**row, "prompt": "its own"} for row in rows])
    if change == "untrained":
        (run_of / "budget.json").unlink()
        shutil.rmtree(run_of / "logs")
    assert report(tmp_path, "--baseline", tmp_path / "static") == 0
    assert Page(tmp_path / "report.html").says("Next") == told.format(run=run_of)


def test_the_exported_seed_is_the_best_one_at_the_tested_checkpoint(study: Path) -> None:
    """Seed 1 has the best validation of all, and ends with the worst."""
    path = study / "soft" / "seed-1" / "logs" / "version_0" / "metrics.csv"
    path.write_text("step,val/nll\n9,0.5\n19,9.5\n")
    for tested, seed, more in (("best", 1, ""), ("last", 0, " --checkpoint last")):
        for folder in (study / "soft").iterdir():
            (folder / "tested.json").write_text(json.dumps({"checkpoint": f"checkpoints/{tested}.ckpt", "step": 20}))
        assert report(study, "--baseline", study / "static") == 0
        assert Page(study / "report.html").says("Next") == (
            f"Export it (seed {seed}, the best on validation): lightning-prompts export {study}/soft/seed-{seed} "
            f"--format peft{more}"
        )


def test_little_validation_is_told_ahead_of_the_numbers(study: Path, whole: Page) -> None:
    assert "Chance may have chosen" not in whole.text, "unknown how many there were"
    kept = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    for path in study.glob("soft/*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        settings = {"init_args": {"monitor": "val/exact_match", "mode": "max"}}
        config["trainer"]["callbacks"] = [kept | settings]
        path.write_text(yaml.safe_dump(config))
        curve = path.parent / "logs" / "version_0" / "metrics.csv"
        rows = ["step,val/examples,val/exact_match", "4,40,0.5", "9,40,0.5", "14,40,0.525"]
        curve.write_text("\n".join(rows if "seed-0" in str(path) else [*rows, "19,40,0.6"]) + "\n")
    assert report(study) == 0
    page = Page(study / "report.html")
    (told,) = [line for line in page.text.split("\n") if line.startswith("Chance may have chosen")]
    lead = "1 of 40 questions ahead of the next best validation"
    few = "soft (1 of 2 seeds): 40 validation questions"
    assert f" {few}, {lead}; {few}. More" in told
    assert page.html.index("Chance may have chosen") < page.html.index("<table")


def test_test_sets_and_metrics_are_told_apart(study: Path) -> None:
    for path in study.glob("*/*/metrics.json"):
        metrics = json.loads(path.read_text())
        path.write_text(json.dumps({**metrics, "test/accuracy": metrics["test/exact_match"], "test/Antonyms/nll": 2.5}))
    assert report(study) == 0
    page = Page(study / "report.html")
    titles = ["Summary", "Datasets of the mixture", "Out-of-distribution test sets", "Other metrics"]
    assert [name for name in page.headings if name in titles] == titles
    assert [cell for table in page.tables for cell in table[0] if cell.startswith("Antonyms")] == ["Antonyms: NLL"]
    assert not any("accuracy" in table[0] for table in page.tables), "the same as exact match"
    for path in study.glob("soft/*/metrics.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "test/accuracy": 0.5}))
    assert report(study) == 0
    assert any("accuracy" in table[0] for table in Page(study / "report.html").tables)


def test_settings_are_rounded(study: Path) -> None:
    for path in study.glob("soft/*/config.yaml"):
        path.write_text(path.read_text().replace("length: 4", "length: 0.8149999976\n    betas: [0.9000000001, 1]"))
    assert report(study) == 0
    rows = Page(study / "report.html").table("setting")
    assert ["model.length", "6", "0.815", "6"] in rows
    assert ["model.betas", "–", "[0.9, 1]", "–"] in rows


def test_what_moved_is_told_where_the_nearest_tokens_did_not(study: Path) -> None:
    def packed(vectors: list[list[float]]) -> str:
        return base64.b64encode(np.array(vectors, "<f2").tobytes()).decode()

    common = {"size": 2, "places": [0, 1], "token_vectors": packed([[0, 0], [1, 0]])}
    start = {"step": 0, "vectors": packed([[0, 0], [1, 0]]), "vocabulary": packed([[0, 0], [0, 2], [0, 4]])}
    end = {"step": 20, "vectors": packed([[3, 4], [1, 1]])}
    path = study / "soft" / "seed-0" / "prompt_path.jsonl"
    for first, same in (([" so", "ft"], True), ([" so", "x"], False)):
        write_rows(path, [{**common, **start, "tokens": first}, {**common, **end, "tokens": [" so", "ft"]}])
        assert report(study) == 0
        page = Page(study / "report.html")
        prompt = next(row for row in page.table("method", "seed", "prompt") if row[:2] == ["soft", "0"])[2]
        assert ("the tokens that the prompt started from" in prompt) == same
        assert page.table("method", "place")[1:] == [
            ["soft", "1", "' so'", "the same", "5.00", "5.00", "2.00"],
            ["soft", "2", repr(first[1]), "the same" if same else "'ft'", "1.00", "1.00", "2.00"],
        ]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_diverged_prompt_has_no_picture(value: float, study: Path) -> None:
    """Vectors are stored as float16, whose largest number is 65,504."""

    def packed(number: float) -> str:
        return base64.b64encode(np.full((1, 2), number, "<f2").tobytes()).decode()

    common = {"size": 2, "places": [0], "tokens": [" so"], "token_vectors": packed(1), "vocabulary": packed(2)}
    rows = [{**common, "step": step, "vectors": packed(number)} for step, number in ((0, 1), (20, value))]
    write_rows(study / "soft" / "seed-0" / "prompt_path.jsonl", rows)
    assert report(study) == 0
    page = Page(study / "report.html")
    assert (
        "Without finite vectors in prompt_path.jsonl, so without a picture of the path: soft (1 of 2 seeds)."
        in page.text
    )
    assert not any("the path of" in line or "What moved" in line for line in page.text.split("\n"))


def test_markdown_has_the_same_tables_and_pictures(whole: Page) -> None:
    page = whole
    assert page.tables
    stripped = [[[cell.strip() for cell in row] for row in table] for table in page.tables]
    assert page.in_markdown == stripped
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.markdown)
    assert len(linked) == len(page.html.split("<svg ")) - 1 > 8
    for path in linked:
        text = (page.path.parent / path).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "prefers-color-scheme: dark" in text
        assert not re.search(r'(?:href|src)="(?!#)', text)


def test_the_page_needs_nothing_but_itself(whole: Page) -> None:
    text = whole.html
    assert not re.findall(r'(?:src|href|action|data|poster)\s*=\s*"(?!#)[^"]*"', text)
    assert not re.search(r"<(link|iframe|object|embed|img|base)\b|@import|url\((?!#)|javascript:|\bon\w+=", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text, (
        "no other script runs"
    )
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names)), "each picture's names are its own"
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert used
    assert {first or second for first, second in used} <= set(names)


def test_templates_are_installed() -> None:
    root = Path(charts.__file__).parents[2]
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    patterns = re.split(r"[,\s]+", config["options.package_data"]["lightning_prompts"])
    templates = list((root / "lightning_prompts" / "report" / "templates").iterdir())
    assert {path.name for path in templates} == {"page.html", "sort.js"}
    for path in templates:
        assert any(path.relative_to(root / "lightning_prompts").match(pattern) for pattern in patterns)


def test_colours_follow_the_reader(whole: Page) -> None:
    text = whole.html
    pictures = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) > 8
    for picture in pictures:
        assert re.match(r'<svg role="img" aria-label="[^"]+"', picture)
        # Black and white would vanish in one of the two; matplotlib's defaults are among them.
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", picture)) == set()
        assert "var(--text)" in picture
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


@pytest.mark.usefixtures("drawn")
def test_texts_of_models_and_data_are_only_texts(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>|*b* `c` [d](http://e.org) ![f](http://g.org/h.png) &amp; \\| $x$\n# no\x00\x1b"
    for method in ("soft", "static"):
        rows = [
            {**row, "question": f"{evil}{index}", "generated": evil, "prompt": evil}
            for index, row in enumerate(rows_of(method, 0))
        ]
        folder = write_run(tmp_path / "runs" / f"<b>{method}</b>|$y$" / "seed-0", method, 0, rows)
        write_rows(
            folder / "samples.jsonl", [{"step": n, "question": evil, "answer": evil, "generated": evil} for n in (1, 2)]
        )
        (folder / "prompt.txt").write_text(evil.replace("\x00", ""))
        (folder / "environment.json").write_text(json.dumps({evil: evil}))
    assert report(tmp_path / "runs") == 0
    page = Page(tmp_path / "runs" / "report.html")
    assert len(re.findall(r"<script", page.html)) == 1, "the page's own"
    assert not re.search(r"<b>|http://e.org\"", page.html)
    assert not re.search(r"<script|<b>|(?<!\\)!?\[[df](?<!\\)\]\(", page.markdown)
    shown = evil.replace("\x00", "�").replace("\x1b", "�")
    assert page.table("question", "reference")[1][0] == f"{shown}0"
    assert all(len({len(row) for row in table}) == 1 for table in page.in_markdown), "no cell begins another one"
    assert "<b>soft</b>|$y$ (baseline)" in [row[0] for row in page.summary()]


def test_the_prompt_shown_is_that_of_the_best_checkpoint(study: Path) -> None:
    """As the run itself chose it: here by the largest NLL, which is that of the first validation."""
    path = study / "soft" / "seed-0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    kept = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    for monitor, mode, step, place in (("val/nll", "max", "10", "2.500"), ("val/exact_match", "max", "20", "2.000")):
        settings = {"init_args": {"monitor": monitor, "mode": mode}}
        config["trainer"]["callbacks"] = [kept | {"init_args": {"filename": "last"}}, kept | settings]
        path.write_text(yaml.safe_dump(config))
        assert report(path.parent) == 0
        page = Page(path.parent / "report.html")
        assert page.headings[0] == "soft", "seed-0 is no name for a page"
        row = page.table("method", "seed", "prompt")[1]
        assert (row[3], row[5]) == (step, place)


def test_what_was_not_trained_is_the_baseline(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(study) == 0
    assert str(study / "report.html") in capsys.readouterr().out
    assert "Baseline: search" in Page(study / "report.html").text, "the first, where all were trained"
    for seed in (study / "static").iterdir():
        (seed / "budget.json").unlink()
        shutil.rmtree(seed / "logs")
    assert report(study) == 0
    assert "Baseline: static" in Page(study / "report.html").text


def test_a_trained_prompt_that_was_tested_elsewhere_is_no_baseline(study: Path) -> None:
    place = study / "aside"
    place.mkdir()
    for name in ("metrics.json", "predictions.jsonl"):
        shutil.copy(study / "search" / "seed-0" / name, place / name)
    for tested, baseline in ((("best.ckpt", 130), "soft"), ((None, None), "aside")):
        (place / "tested.json").write_text(json.dumps(dict(zip(("checkpoint", "step"), tested, strict=True))))
        assert report(study / "soft", place, "--out", study / "report.html") == 0
        page = Page(study / "report.html")
        assert f"Baseline: {baseline}." in page.text
        unknown = "nothing was trained" if baseline == "aside" else "its cost was not recorded"
        assert f"aside: {unknown}" in page.says("Cost")


def test_a_training_of_unknown_cost_did_not_cost_nothing(study: Path) -> None:
    (study / "soft" / "seed-0" / "budget.json").unlink()
    assert "budget/tokens" not in Run(study / "soft" / "seed-0").results
    table = Comparison(study, ["soft"]).table
    assert table.loc["soft", "train_tokens"] == 2001, "of the other seed"
    (study / "soft" / "seed-1" / "budget.json").unlink()
    assert math.isnan(Comparison(study, ["soft"]).table.loc["soft", "train_tokens"])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_costs_its_part_and_a_line(name: str, study: Path, whole: Page) -> None:
    (study / "soft" / "seed-1" / name).unlink()
    if name == "metrics.json":  # which the predictions could stand in for
        (study / "soft" / "seed-1" / "predictions.jsonl").unlink()
    assert report(study) == 0
    page = Page(study / "report.html")
    if name == "prompt.jsonl":
        assert len(page.table("method", "seed", "prompt")) == len(whole.table("method", "seed", "prompt")) - 1
    short = "metrics.csv" if name.startswith("logs") else name
    assert any(re.search(rf"Without .*{short}.*: soft", line) for line in page.text.split("\n")), name
    assert len(page.summary()) == 3
    for method in SHIFTS:
        for seed in range(2):
            (study / method / f"seed-{seed}" / name).unlink(missing_ok=True)
    assert report(study) == 0
    assert not set(Page(study / "report.html").headings) - set(whole.headings)


def test_a_run_with_nothing_but_predictions(study: Path) -> None:
    for path in study.rglob("*"):
        if path.is_file() and path.name != "predictions.jsonl":
            path.unlink()
    for folder in study.glob("*/*/logs"):
        shutil.rmtree(folder)
    assert report(study) == 0
    page = Page(study / "report.html")
    mean = plain.fmean(plain.fmean(row["nll"] for row in rows_of("soft", seed)) for seed in range(2))
    assert next(row for row in page.summary() if row[0] == "soft")[4].startswith(f"{mean:.3f} ±")
    assert page.headings[1:] == [
        "Summary",
        "Differences, question by question",
        "Answers side by side",
        "Differences of the configs",
        "Environment",
        "How the numbers were made",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("predictions.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q', "line 2 is not valid JSON"),
        ("predictions.jsonl", b'{"question": "q", "answer": "a", "nll": "much"}', "nll must be a number, got 'much'"),
        ("predictions.jsonl", b'{"answer": "a", "nll": 1}', "a row has no question"),
        ("predictions.jsonl", b"\0\0\0", "not a text file"),
        ("predictions.jsonl", b'{"question": "\xff"}', "not UTF-8"),
        ("metrics.json", b"[1, 2]", "must contain names and values, got list"),
        ("metrics.json", b'{"test/nll": {}}', "test/nll must be a number"),
        ("metrics.json", b"[" * 100_000, "not valid JSON"),
        ("config.yaml", b"model: [", r"line \d is not valid YAML"),
        ("config.yaml", BOMB.encode(), "no config of a run"),
        ("config.yaml", b"a: " + b"[" * 20_000, "nested too deeply|not valid YAML"),
        ("logs/version_0/metrics.csv", b"step,val/nll\n1,2.5\n2,oops\n", "line 3 is not a row of numbers"),
        ("logs/version_0/metrics.csv", b"step,val/nll\nnan,2.5\n", "line 2 is not a row of numbers"),
        ("budget.json", b'{"tokens": "all"}', "tokens must be a number, got 'all'"),
        ("prompt_path.jsonl", b'{"step": 1, "size": 4, "vectors": "!"}', "not what PromptPath writes"),
    ],
)
def test_a_broken_file_is_one_line(
    name: str, content: bytes, told: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "soft" / "seed-1" / name
    path.write_bytes(content)
    assert report(study) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert re.search(told, error)
    assert not (study / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["{study}/nowhere"], 1, "is no folder"),
        (["{study}/empty"], 1, "holds no run"),
        (["{study}", "--baseline", "{study}/empty"], 1, "none of the runs; give one of .*soft"),
        (["{study}", "--baseline", "{study}"], 1, "several methods are there"),
        (["{study}", "--out", "{study}/page.txt"], 1, "must end in .html"),
        (["{study}", "--out", "{study}/soft/seed-0/config.yaml/page.html"], 1, "cannot be written"),
        ([], 2, "RUN"),
        (["{study}", "--base", "x"], 2, "--base"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], code: int, told: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "empty").mkdir()
    assert report(*(word.format(study=study) for word in words)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(told, error)


@pytest.mark.usefixtures("drawn")
def test_names_and_texts_that_no_file_can_hold(tmp_path: Path) -> None:
    """Halves of characters, which JSON and file names may have."""
    half = "\ud83d"
    for name in ("soft", "static"):
        rows = [{**row, "question": f"{row['question']} {half}"} for row in rows_of(name, 0)]
        folder = write_run(tmp_path / "made" / name, name, 0)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "environment.json").write_text(json.dumps({half: half}))
        (folder / "prompts.jsonl").write_text(json.dumps({"accuracy": 0.5, "prompts": [half], "step": f"<b>{half}"}))
        os.renames(folder, os.fsencode(tmp_path / "runs" / name) + b"\xff")
    assert report(tmp_path / "runs") == 0
    page = Page(tmp_path / "runs" / "report.html")
    assert "soft�" in page.html
    assert page.in_markdown == page.tables
    assert "<b>" not in page.markdown


@pytest.mark.usefixtures("drawn")
def test_a_mean_that_is_not_finite_has_no_interval(study: Path) -> None:
    path = study / "soft" / "seed-0" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test/nll": math.nan}))
    assert report(study) == 0
    row = next(row for row in Page(study / "report.html").summary() if row[0] == "soft")
    assert row[4:7] == ["nan", "–", "–"]
    assert "–" not in (*row[1:4], *row[7:])


def test_rows_in_common_are_counted_for_each_figure(study: Path) -> None:
    """A server without log-probabilities leaves no NLL, and answers all the same."""
    for path in study.glob("static/*/predictions.jsonl"):
        rows = [{**json.loads(line), "nll": None} for line in path.read_text().splitlines()]
        write_rows(path, rows)
    assert report(study) == 0
    page = Page(study / "report.html")
    assert {row[2] for row in page.pairs("exact match, points")} == {"60"}
    assert [row[2] for row in page.pairs("NLL")] == ["60", "none in common", "none in common"]


def test_unequal_terms_are_told_ahead_of_the_numbers(study: Path, whole: Page) -> None:
    assert "on equal terms" not in whole.text
    for path in study.glob("soft/*/config.yaml"):
        path.write_text(path.read_text().replace("name: tiny", "name: larger"))
    assert report(study) == 0
    page = Page(study / "report.html")
    assert "were not compared on equal terms. model.lm.name is " in page.text
    assert "larger for soft" in page.text
    assert "the methods may not be the cause" in page.says("How sure")
    assert page.html.index("on equal terms") < page.html.index("<table")
    assert "on equal terms" in page.markdown


DATA = {"class_path": "lightning_prompts.datamodules.QuestionAnswer"}
LAYERS = {"class_path": "methods.DeepLanguageNetwork"}


@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        ({"model": {"lm": {"name": "a", "revision": None}}}, {"model": {"lm": {"name": "a"}}}, ""),
        (
            {"model": {"lm": {"name": "a"}}},
            {"model": {"lm": {"name": "b"}}},
            "model.lm.name is a for mine; b for other.",
        ),
        ({"model": {"lm": {"quantization": "none"}}}, {"model": {"lm": {"quantization": None}}}, ""),
        ({"model": {"lm": {"quantization": "int8"}}}, {}, "model.lm.quantization is int8 for mine; not set for other."),
        ({"model": {"proposer": {"name": "a"}, "length": 4}}, {}, ""),
        (
            {"model": {"lm": {"dtype": "float16"}}},
            {"model": {"lm": {"dtype": "float32"}}},
            "model.lm.dtype is float16 for mine; float32 for other.",
        ),
        (
            {"model": {"lm": {"server": {"parameters": {"temperature": 0}}}}},
            {"model": {"lm": {"server": {"parameters": None}}}},
            "model.lm.server.parameters.temperature is 0 for mine; not set for other.",
        ),
        (
            {"model": {**LAYERS, "init_args": {"layers": [{"lm": None}, {"lm": {"name": "b"}}]}}},
            {"model": {**LAYERS, "init_args": {"layers": [{"lm": None}, {"lm": None}]}}},
            "model.layers.item#2.lm.name is b for mine; not set for other.",
        ),
        ({"data": {"batch_size": 4, "balanced": True, "test": "x", "seed": 1}}, {"data": {"batch_size": 8}}, ""),
        (
            {"data": {"max_train_examples": 100}},
            {"data": {"max_train_examples": None}},
            "data.max_train_examples is 100 for mine; not set for other.",
        ),
        ({"data": {"train": "my.jsonl"}}, {"data": {"train": str(Path("my.jsonl").absolute())}}, ""),
        (
            {"data": {"train": "/a/my.jsonl"}},
            {"data": {"train": "/b/my.jsonl"}},
            "data.train is /a/my.jsonl for mine; /b/my.jsonl for other.",
        ),
        ({"data": {"stop": "\n"}}, {"data": {"stop": r"\n"}}, ""),
        (
            {"data": {"template": "a\n"}},
            {"data": {"template": r"a\n"}},
            r"data.template is a\n for mine; a\\n for other.",
        ),
        (
            {"data": {"system": "y" * 70 + "a"}},
            {"data": {"system": "y" * 70 + "b"}},
            f"data.system is {'y' * 59}… for mine; {'y' * 59}… for other (these begin alike).",
        ),
        (
            {"data": {**DATA, "init_args": {"val_size": 4}}},
            {"data": {"class_path": "my.Own", "init_args": {"val_size": 5}}},
            "data is QuestionAnswer for mine; Own for other.",
        ),
        (
            {"data": {"members": {"a": {**DATA, "init_args": {"template": "x", "val_size": 4}}}}},
            {"data": {"members": {"a": {**DATA, "init_args": {"template": "y", "val_size": 5}}}}},
            "data.members.a.val_size is 4 for mine; 5 for other.",
        ),
    ],
)
def test_unequal_settings_are_named(mine: dict[str, Any], other: dict[str, Any], told: str) -> None:
    methods = tuple(
        Method(name, (SimpleNamespace(settings=flat(config, "x"), environment=None),))  # type: ignore[arg-type]
        for name, config in (("mine", mine), ("other", other))
    )
    assert unequal_settings(Task("task", methods, methods[0])) == ([told] if told else [])


# --- which runs belong together ---------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_method(tmp_path: Path) -> None:
    for name, method, seed in (("a", "soft", 0), ("b", "soft", 1), ("c", "search", 0), ("again", "soft", 0)):
        write_run(tmp_path / name, method, seed)
    untrained = write_run(tmp_path / "untrained", "soft", 0)  # the same config, and nothing trained
    for path in ("logs/version_0/metrics.csv", "budget.json"):
        (untrained / path).unlink()
    (untrained / "logs" / "version_0").rmdir()
    (untrained / "logs").rmdir()
    runs = [Run(tmp_path / name) for name in ("a", "b", "c", "again", "untrained")]
    (task,) = group(runs, tmp_path / "c")
    assert {method.name: [run.folder.name for run in method.runs] for method in task.methods} == {
        "a, b": ["a", "b"],
        "c": ["c"],
        "again": ["again"],
        "untrained": ["untrained"],
    }
    assert task.baseline.name == "c"


@pytest.mark.parametrize("turn", range(5))
def test_runs_of_two_folders_are_not_mixed(turn: int, tmp_path: Path) -> None:
    names = ["best/soft/seed-0", "best/soft/seed-1", *(f"last/soft/seed-{seed}" for seed in range(3))]
    runs = [Run(write_run(tmp_path / name, "soft", int(name[-1]))) for name in names]
    tasks = group(runs[turn:] + runs[:turn], None)
    found = [[run.folder.relative_to(tmp_path).as_posix() for run in method.runs] for method in tasks[0].methods]
    assert sorted(found) == [names[:2], names[2:]]
    (only,) = group([runs[0], runs[1], runs[4]], None)[0].methods
    assert only.name == "best/soft, last/soft", "the runs of one sweep in two folders"


def test_rows_in_python_are_the_same_data_in_every_run(tmp_path: Path) -> None:
    """Each run has a copy of its own, whose name is a hash of the rows."""

    def settings(folder: Path, rows: str) -> None:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"] = {"class_path": "QuestionAnswer", "init_args": {"train": f"{folder}/data/train-{rows}.jsonl"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    for name, method, seed in (("a", "soft", 0), ("b", "soft", 1), ("c", "search", 0)):
        settings(write_run(tmp_path / name, method, seed), "0123456789ab")
    (task,) = group([Run(tmp_path / name) for name in "abc"], None)
    assert [method.name for method in task.methods] == ["a, b", "c"]
    assert unequal_settings(task) == []
    settings(tmp_path / "c", "00000000000f")
    (task,) = group([Run(tmp_path / name) for name in "abc"], None)
    assert "data.train is" in " ".join(unequal_settings(task))


def test_runs_are_found_by_what_a_run_writes(tmp_path: Path) -> None:
    """Whatever they are called; other programs' files of the same names are no runs."""
    names = ["checkpoints/soft", "logs", "settings", "states/soft", "wandb"]
    for name in names:
        write_run(tmp_path / name, "soft", 0)
        other = tmp_path / name / "wandb" / "run-1" / "files" / "config.yaml"
        other.parent.mkdir(parents=True)
        other.write_text("wandb_version: 1\n")
    write_run(tmp_path / "settings" / "untrained", "soft", 0)
    (tmp_path / "config.yaml").write_text("model: {class_path: FewShot}\n")
    found = [run.folder.relative_to(tmp_path).as_posix() for run in find(tmp_path)]
    assert found == sorted([*names, "settings/untrained"])


def test_a_run_that_is_named_twice_is_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_run(tmp_path / "runs" / name, name, 0) for name in ("soft", "static"))
    (tmp_path / "runs" / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    assert report("runs/static", "runs/soft", first, "runs/../runs/soft", "runs/link", second, "--out", "x.html") == 0
    assert [row[0] for row in Page(tmp_path / "x.html").summary()] == ["soft", "static (baseline)"]


def test_tasks_are_told_apart_by_their_questions(tmp_path: Path) -> None:
    for place, method, seed in itertools.product(("sums", "words"), ("soft", "static"), range(2)):
        rows = [{**row, "question": f"{place} {row['question']}"} for row in rows_of(method, seed)]
        write_run(tmp_path / place / method / f"seed-{seed}", method, seed, rows)
    tasks = group(find(tmp_path), tmp_path / "words" / "static")
    assert [(task.name, [method.name for method in task.methods]) for task in tasks] == [
        ("sums", ["soft", "static"]),
        ("words", ["soft", "static"]),
    ]
    assert [task.baseline.name for task in tasks] == ["static", "static"]
    assert report(tmp_path) == 0
    assert [heading for heading in Page(tmp_path / "report.html").headings if heading in ("sums", "words")][:2] == [
        "sums",
        "words",
    ]


def test_one_seed_each_and_no_word_of_it(tmp_path: Path) -> None:
    """Folders of before a config was written for tests: paired by their questions all the same."""
    for method in ("soft", "static"):
        write_run(tmp_path / method, method, 0)
        if method == "static":
            (tmp_path / method / "config.yaml").unlink()
    assert report(tmp_path) == 0
    page = Page(tmp_path / "report.html")
    assert page.pairs()[0][:3] == ["static", "soft", "30"]
    assert "over seeds" not in " ".join(page.table("method", "exact match")[0])
    assert "among the 30 questions that all have answered" in page.text.lower()


def test_runs_of_different_seeds_are_paired_by_their_questions(tmp_path: Path) -> None:
    """Any two runs can be held against each other; of several seeds the mean of each question counts."""
    rows = {
        (method, seed): [{**row, "question": f"q{index}"} for index, row in enumerate(rows_of(method, seed))]
        for method, seed in (("soft", 3), ("static", 0), ("static", 1))
    }
    for (method, seed), own in rows.items():
        write_run(tmp_path / method / f"seed-{seed}", method, seed, own)
    for given in (["soft/seed-3", "static/seed-1"], ["soft", "static"]):
        places = [tmp_path / place for place in given]
        assert report(*places, "--baseline", places[0], "--out", tmp_path / "page.html") == 0
        page = Page(tmp_path / "page.html")
        ((mine, other, count, nll, _, p_value, *_),) = page.pairs()
        assert (mine[:6], other[:4], count) == ("static", "soft", "30")
        seeds = (1,) if "seed-1" in given[1] else (0, 1)
        means = [plain.fmean(rows["static", seed][n]["nll"] for seed in seeds) for n in range(30)]
        differences = [mean - row["nll"] for mean, row in zip(means, rows["soft", 3], strict=True)]
        assert nll == f"{plain.fmean(differences):+.3f}"
        assert float(p_value.removeprefix("≤ ")) < 0.01
        assert "among the 30 questions that all have answered." in page.text


def test_a_resumed_run_s_curve_is_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "soft", "soft", 0)
    (folder / "logs" / "version_1").mkdir()
    (folder / "logs" / "version_1" / "metrics.csv").write_text("step,val/nll\n14,1.5\n29,1.25\n")
    assert Run(folder).curves["val/nll"] == {10: 2.5, 15: 1.5, 30: 1.25}


def test_names_in_charts_are_short_and_differ() -> None:
    rates = [f"soft_prompt-length=2,lr=0.{digits}" for digits in ("0123", "0045")]
    assert charts.shown(["soft", *rates], 26) == ["soft", "soft_prompt-l…=2,lr=0.0123", "soft_prompt-l…=2,lr=0.0045"]
    lengths = [f"soft_prompt-length={length},learning_rate=0.0123" for length in (2, 4)]
    assert len(set(charts.shown(lengths, 26))) == 2, "longer where the middle is what differs"
    assert max(map(len, charts.shown([*lengths, "x" * 200], 26))) == 40


@pytest.mark.usefixtures("drawn")
def test_methods_whose_names_begin_alike_are_all_in_the_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(charts.STYLE, "svg.fonttype", "none")  # texts as texts
    names = [f"soft_prompt-length=2,learning_rate=0.{digits}" for digits in ("0123", "0045", "1")]
    looks = [charts.Look(0), charts.Look(1), charts.Look(None)]
    line = np.array([1.0, 2.0])
    curves = [charts.Curve(name, look, line, line, line, line) for name, look in zip(names, looks, strict=True)]
    text = charts.curves("", [*curves, curves[-1]], "steps", percent=False)
    legend = [found for found in re.findall(r">([^<>]+)</text>", text) if re.search("[a-z]{4}", found)]
    assert [name.partition("rate")[2] or name for name in legend] == ["steps", "=0.0123", "=0.0045", "other methods"]
    text = charts.bars("", [charts.Result(name, charts.Look(0), [0.5]) for name in names], percent=True)
    assert len({found for found in re.findall(r">([^<>]+)</text>", text) if "rate" in found}) == 3


@pytest.mark.parametrize("count", [1, 12, 13])
@pytest.mark.usefixtures("drawn")
def test_one_method_or_many(count: int, tmp_path: Path) -> None:
    for index in range(count):
        rows = [{**row, "nll": row["nll"] + index} for row in rows_of("soft", 0, count=8)]
        folder = write_run(tmp_path / f"m{index:02}", "soft", 0, rows)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"]["init_args"]["length"] = index
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert report(tmp_path) == 0
    page = Page(tmp_path / "report.html")
    assert len(page.summary()) == count
    if count > 1:
        pairs = count - 1 if count > 12 else count * (count - 1) // 2
        assert len(page.pairs()) == pairs
        assert ("compared with the baseline alone" in page.text) == (count > 12)
        assert max(len(table[0]) for table in page.tables) <= 11
        assert "have colours" in page.text


# --- from runs as the command line makes them -------------------------------------------------------------------------

COMMON = [
    *TINY_RUN,
    "--data",
    "Antonyms",
    "--data.max_train_examples",
    "32",
    "--data.val_fraction",
    "0.01",
    "--data.test_fraction",
    "0.01",
]


@pytest.mark.usefixtures("drawn")
def test_runs_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    fit = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    soft, search = ["SoftPromptTuning", "--model.length", "3"], ["HardPromptSearch", "--model.length", "2"]
    for name, model, seed in (("soft", soft, 0), ("soft", soft, 1), ("search", search, 0)):
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        root = ["--trainer.default_root_dir", str(runs / name / f"seed-{seed}")]
        assert run(["fit", "--model", *model, *COMMON, *seeds, *fit, *root]) == 0
        assert run(["test", "-c", f"{root[1]}/config.yaml", "--ckpt_path", "best", "--verbose", "false"]) == 0
    root = ["--trainer.default_root_dir", str(runs / "static" / "seed-0")]
    seeds = ["--seed_everything", "0", "--data.seed", "0"]
    assert run(["test", "--model", "FixedPrompt", "--model.text", " x", *COMMON, *seeds, *root]) == 0
    capsys.readouterr()
    assert report(runs, "--baseline", runs / "static") == 0
    page = Page(runs / "report.html")
    summary = {row[0].split()[0]: row for row in page.summary()}
    assert {name: row[-2] for name, row in summary.items()} == {"search": "1", "soft": "2", "static": "1"}
    for name, row in summary.items():
        found = [json.loads(path.read_text())["test/nll"] for path in (runs / name).glob("*/metrics.json")]
        spread = f" ± {plain.stdev(found):.3f}" if len(found) > 1 else ""
        assert row[4] == f"{plain.fmean(found):.3f}{spread}"
    assert {row[0]: row[1:] for row in page.table("setting")[1:]}["model"] == [
        "HardPromptSearch",
        "SoftPromptTuning",
        "FixedPrompt",
    ]
    environment = {row[0]: row[1] for row in page.table("", "all")[1:]}
    assert environment["dtype"] == "float32"
    assert environment["device"] == "cpu"
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__
    assert "Without" not in page.text
    chosen_by = len(Antonyms(val_fraction=0.01, test_fraction=0.01).examples("val"))
    assert set(Run(runs / "soft" / "seed-0").curves["val/examples"].values()) == {chosen_by}
    assert f": {chosen_by} validation questions" in page.text
    assert len(page.table("method", "place")) == 1 + 3, "of the first seed of the method that has a start"
    assert len([name for name in re.findall(r"files/([\w-]+)\.svg", page.markdown) if "path" in name]) == 2


def test_a_tested_prompt_has_a_record_and_a_trained_one_keeps_its_own(tmp_path: Path) -> None:
    words = ["--model", "SoftPromptTuning", "--model.length", "2", *COMMON, "--trainer.max_steps", "1"]
    root = ["--trainer.default_root_dir", str(tmp_path / "untrained")]
    assert run(["test", *words, *root, "--verbose", "false"]) == 0
    record = tmp_path / "untrained" / "config.yaml"
    again = ["--trainer.default_root_dir", str(tmp_path / "trained")]
    assert run(["fit", "-c", str(record), *again]) == 0, "it can be trained as it stands"
    before = (tmp_path / "trained" / "config.yaml").read_bytes()
    assert json.loads((tmp_path / "untrained" / "tested.json").read_text()) == {"checkpoint": None, "step": None}
    first, second = (yaml.safe_load(path.read_text()) for path in (record, tmp_path / "trained" / "config.yaml"))
    assert first["model"] == second["model"]
    assert first["data"] == second["data"]
    assert (
        run(["test", "-c", str(tmp_path / "trained" / "config.yaml"), "--ckpt_path", "last", "--verbose", "false"]) == 0
    )
    assert (tmp_path / "trained" / "config.yaml").read_bytes() == before
    tested = json.loads((tmp_path / "trained" / "tested.json").read_text())
    assert tested == {"checkpoint": "checkpoints/last.ckpt", "step": 1}
    own = tmp_path / "own" / "config.yaml"
    own.parent.mkdir()
    own.write_bytes(record.read_bytes())
    before = own.read_bytes()
    assert run(["test", "-c", str(own), "--trainer.default_root_dir", str(own.parent), "--verbose", "false"]) == 0
    assert own.read_bytes() == before, "a config that no run has written is the user's"


def test_the_path_is_that_of_the_prompt(tmp_path: Path) -> None:
    """What is kept are the vectors, projected: those of the checkpoint, and distances are about what they were."""
    words = [
        "--model",
        "SoftPromptTuning",
        "--model.length",
        "8",
        *COMMON,
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "1",
    ]
    assert run(["fit", *words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "prompt_path.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["places"] == [0, 1, 3, 4, 6, 7]
    assert ["vocabulary" in row for row in rows] == [True, False, False]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    (prompt,) = (
        value
        for value in state.values()
        if value.shape == (8, 32)
        and value.requires_grad is False
        and not torch.equal(value, state.get("prompt.initial"))
    )
    projection = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    kept = np.frombuffer(base64.b64decode(rows[-1]["vectors"]), "<f2").reshape(6, 32).astype(np.float32)
    assert torch.allclose(torch.from_numpy(kept), prompt[rows[-1]["places"]] @ projection, atol=2e-3, rtol=2e-3)
    assert (tmp_path / "prompt_path.jsonl").stat().st_size < 12_000
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert not any("PromptPath" in name for name in torch.load(last, weights_only=True)["callbacks"]), "it stays small"
    more = ["fit", "-c", str(tmp_path / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert run(more) == 0
    again = [json.loads(line) for line in (tmp_path / "prompt_path.jsonl").read_text().splitlines()]
    assert again[:3] == rows
    assert [row["step"] for row in again[3:]] == [3]
