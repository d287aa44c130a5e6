"""Runs in one process: the LM is loaded once, and results are those of fresh loads."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from lightning_prompts.cli import main as cli
from lightning_prompts.cli import run
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, Usage
from lightning_prompts.lm.reuse import keep_lms, load_or_reuse
from lightning_prompts.methods import LoraTuning
from lightning_prompts.runs.launcher import RunSpec, attempt, launch, launch_all, words
from lightning_prompts.runs.reader import Run
from lightning_prompts.runs.record import clear
from support.models import SMALLEST

CPU = torch.device("cpu")
DATA = {
    "data": "Antonyms",
    "data.max_train_examples": 64,
    "data.val_fraction": 0.01,
    "data.test_fraction": 0.01,
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 3,
    "trainer.enable_progress_bar": False,
}
SOFT = {"model": "SoftPromptTuning", "model.length": 2, "model.lm.name": SMALLEST, "model.max_new_tokens": 2, **DATA}
SEARCH = {**SOFT, "model": "HardPromptSearch", "model.candidates": 8, "model.top_k": 20}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[LMConfig]:
    """The configs of all LMs that are loaded."""
    found: list[LMConfig] = []
    load: Callable[..., FrozenLM] = FrozenLM.load

    def noted(config: LMConfig, *args: Any, **kwargs: Any) -> FrozenLM:
        found.append(config)
        return load(config, *args, **kwargs)

    monkeypatch.setattr(FrozenLM, "load", noted)
    return found


def specs(folder: Path, *methods: dict[str, Any], seeds: tuple[int, ...] = (0, 1)) -> list[RunSpec]:
    return [
        RunSpec(str(folder / f"{settings['model']}-{seed}"), settings=settings, seed=seed)
        for settings in methods
        for seed in seeds
    ]


def written(folder: Path) -> dict[str, Any]:
    """All that a run computed: metrics and answers, the trained prompt, and what it cost in tokens."""
    run = Run(folder)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    costs = {name: value for name, value in run.budget.items() if name not in ("seconds", "memory_gb")}
    curves = {name: points for name, points in run.curves.items() if "second" not in name and "memory" not in name}
    return {
        "metrics": run.metrics,
        "predictions": run.predictions,
        "budget": costs,
        "curves": curves,
        "state": {name: value.tolist() for name, value in saved["state_dict"].items()},
    }


def test_runs_in_one_process_equal_separate_runs_to_the_digit(tmp_path: Path, loads: list[LMConfig]) -> None:
    together = [*specs(tmp_path / "together", SOFT), *specs(tmp_path / "together", SEARCH, seeds=(0,))]
    assert launch_all(together) == {}
    assert len(loads) == 1
    alone = [*specs(tmp_path / "alone", SOFT, seeds=(1,)), *specs(tmp_path / "alone", SEARCH, seeds=(0,))]
    for spec in alone:  # the first of the others has loaded its LM itself
        assert run(["fit", *spec.words, "--trainer.default_root_dir", spec.folder]) == 0
        assert run(["test", "-c", f"{spec.folder}/config.yaml", "--ckpt_path", "best", "--verbose", "false"]) == 0
    assert len(loads) == 1 + 4
    for spec in together[1:]:
        name = Path(spec.folder).name
        assert written(Path(spec.folder)) == written(tmp_path / "alone" / name), name
    first, second = (written(Path(spec.folder))["state"] for spec in together[:2])
    assert first != second, "seeds differ"


def test_a_reused_lm_keeps_nothing_of_earlier_runs(loads: list[LMConfig]) -> None:
    config = LMConfig(SMALLEST)
    with keep_lms():
        first = load_or_reuse(config, CPU)
        first.usage.calls = 5
        first.embedding_matrix()
        first.unfuse()
        gone, weights = weakref.ref(first), first.model
        second = load_or_reuse(config, CPU)
        assert second is not first
        assert second.model is weights
        assert second.usage == Usage()
        assert second._matrix is None
        assert second._compile == "auto"
        assert not hasattr(first, "model"), "two runs never share one LM at the same time"
        head = second.model.get_output_embeddings()
        assert [hook.__self__ for hook in head._forward_pre_hooks.values()] == [second]
        del first
        gc.collect()
        assert gone() is None, "the model does not hold the LM of the earlier run"
        assert load_or_reuse(LMConfig(SMALLEST, attention="explicit"), CPU).model is not weights
    assert len(loads) == 2
    assert load_or_reuse(config, CPU).model is not weights, "outside, each load is fresh"


def test_the_last_block_frees_its_lms() -> None:
    """At once, as a device has no room for two."""

    def load() -> weakref.ref[FrozenLM]:
        return weakref.ref(load_or_reuse(LMConfig(SMALLEST), CPU))

    gc.disable()
    try:
        with keep_lms(), keep_lms():
            gone = load()
            with keep_lms():
                pass
            assert gone() is not None
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["hook", "module", "trainable"])
def test_a_changed_lm_is_loaded_again(change: str, loads: list[LMConfig]) -> None:
    with keep_lms():
        lm = load_or_reuse(LMConfig(SMALLEST), CPU)
        layer = next(module for module in lm.model.modules() if isinstance(module, nn.Linear))
        if change == "hook":
            layer.register_forward_hook(lambda module, inputs, output: output + 1)
        elif change == "module":
            layer.add_module("adapter", nn.Linear(2, 2))
        else:
            layer.weight.requires_grad_(True)
        assert load_or_reuse(LMConfig(SMALLEST), CPU).model is not lm.model
    assert len(loads) == 2


def test_methods_that_change_their_lm_load_their_own(loads: list[LMConfig]) -> None:
    with keep_lms() as kept:
        for _ in range(2):
            LoraTuning(rank=1, lm=LMConfig(SMALLEST)).configure_model()
        assert not kept.lms
    assert len(loads) == 2


def test_quantised_lms_are_loaded_each_time(loads: list[LMConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with keep_lms() as kept:
        monkeypatch.setattr(FrozenLM, "load", lambda config, device: loads.append(config))
        for _ in range(2):
            load_or_reuse(LMConfig(SMALLEST, quantization="nf4"), CPU)
        assert not kept.lms
    assert len(loads) == 2


def test_lms_that_no_run_needs_are_freed(tmp_path: Path, loads: list[LMConfig]) -> None:
    few = {"model": "FewShot", "model.shots": 1, "model.lm.name": SMALLEST, "model.max_new_tokens": 1, **DATA}
    other = {**few, "model.lm.name": SMALLEST.replace("num_hidden_layers=1", "num_hidden_layers=2")}
    with keep_lms() as kept:
        launch(RunSpec(str(tmp_path / "a"), settings=few))
        launch(RunSpec(str(tmp_path / "b"), settings=few, seed=1))
        assert len(loads) == 1
        launch(RunSpec(str(tmp_path / "c"), settings=other))
        assert [config.name for config, _ in kept.lms] == [other["model.lm.name"]]
    assert len(loads) == 2


def test_a_run_leaves_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run asks for deterministic algorithms; the next one does not have them."""
    found: list[tuple[bool, str | None]] = []

    def execute(args: list[str]) -> None:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("LOCAL_RANK")))
        torch.use_deterministic_algorithms(True)
        os.environ["LOCAL_RANK"] = "0"
        folder = Path(args[args.index("--trainer.default_root_dir") + 1])
        (folder / "metrics.json").write_text("{}")

    monkeypatch.setattr(cli, "execute", execute)
    few = {"model": "FewShot"}
    for name in ("a", "b"):
        launch(RunSpec(str(tmp_path / name), settings=few))
    assert found == [(False, None), (False, None)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "LOCAL_RANK" not in os.environ


def test_errors_are_one_line_and_stop_no_other_run(tmp_path: Path) -> None:
    few = {"model": "FewShot", "model.shots": 1, "model.lm.name": SMALLEST, "model.max_new_tokens": 1, **DATA}
    bad = [
        RunSpec(str(tmp_path / "value"), settings={**few, "model.shots": -1}),
        RunSpec(str(tmp_path / "option"), settings={**few, "model.shotz": 1}),
        RunSpec(str(tmp_path / "none"), settings=DATA),
    ]
    good = RunSpec(str(tmp_path / "good"), settings=few)
    (tmp_path / "file").touch()
    nowhere = RunSpec(str(tmp_path / "file" / "x"), settings=few)
    ended: list[tuple[str, str]] = []
    errors = launch_all([*bad, nowhere, good], end=lambda spec, error: ended.append((Path(spec.folder).name, error)))
    assert [name for name, _ in ended] == ["value", "option", "none", "x", "good"]
    assert dict(ended)["good"] == ""
    assert set(errors) == {spec.folder for spec in (*bad, nowhere)}
    told = dict(ended)
    assert "shots must be" in told["value"]
    assert "shotz" in told["option"]
    assert "names no method" in told["none"]
    assert "Not a directory" in told["x"]
    assert all("\n" not in line for line in errors.values())
    assert f"error: {told['value']}" in (tmp_path / "value" / "output.txt").read_text()


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143), SystemExit(130)])
def test_signals_end_all_runs(ending: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(args: list[str]) -> None:
        raise ending

    monkeypatch.setattr(cli, "execute", execute)
    started: list[RunSpec] = []
    spec = RunSpec(str(tmp_path / "a"), settings={"model": "FewShot"})
    with pytest.raises(type(ending)):
        launch_all([spec, spec], started.append)
    assert started == [spec]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def execute(args: list[str]) -> None:
        Freed()
        (tmp_path / "a" / "metrics.json").write_text("{}")

    monkeypatch.setattr(cli, "execute", execute)
    started: list[RunSpec] = []
    spec = RunSpec(str(tmp_path / "a"), settings={"model": "FewShot"})
    with pytest.raises(KeyboardInterrupt):
        launch_all([spec, spec], started.append)
    assert started == [spec]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_kept_and_read(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def execute(args: list[str]) -> None:
        calls.append(args)
        if args[0] == "test":
            (tmp_path / "run" / "metrics.json").write_text(json.dumps({"test/nll": 2.0}))

    spec = RunSpec(
        str(tmp_path / "run"), settings={"model": "SoftPromptTuning", "model.length": 4}, seed=3, checkpoint="last"
    )
    run = launch(spec, execute)
    assert [args[0] for args in calls] == ["fit", "test"]
    fit = ["--seed_everything", "3", "--data.seed", "3", "--model=SoftPromptTuning", "--model.length=4"]
    assert calls[0] == ["fit", *fit, "--trainer.default_root_dir", spec.folder]
    last = ["-c", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "last"]
    assert calls[1] == ["test", *last, "--trainer.default_root_dir", spec.folder, "--verbose", "false"]
    assert run.folder == Path(spec.folder)
    assert run.results == {
        "test/nll": 2.0,
        "budget/tokens": 0.0,
        "budget/steps": 0.0,
        "seconds": run.results["seconds"],
    }
    launch(spec, execute)
    assert len(calls) == 2
    with pytest.raises(UserError, match="made with other options"):
        launch(replace(spec, settings={**spec.settings, "model.length": 5}), execute)
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert words(again.settings) == ["--model=SoftPromptTuning", "--model.length=4"]


def test_the_order_of_options_matters_only_where_they_overlap(tmp_path: Path) -> None:
    given = {"data.batch_size": 16, "budget.tokens": 9, "model.init": "FromText", "model.init.text": "a"}
    spec = RunSpec(str(tmp_path), settings=given)
    (tmp_path / "metrics.json").touch()

    def check(*names: str) -> None:
        replace(spec, settings={name: given[name] for name in names}).check_record()

    (tmp_path / "run.json").write_text(json.dumps(spec.record))
    check("model.init", "budget.tokens", "model.init.text", "data.batch_size")
    for names in (("model.init.text", "model.init", "data.batch_size", "budget.tokens"), list(given)[1:]):
        with pytest.raises(UserError, match="made with other options"):
            check(*names)
    (tmp_path / "run.json").write_text('{"options": 3}')
    with pytest.raises(UserError, match="made with other options"):
        spec.check_record()


def test_a_run_that_was_made_by_hand_is_neither_counted_nor_replaced(tmp_path: Path) -> None:
    """Whether it was tested already; and whether it was made where this run was before."""
    spec = RunSpec(str(tmp_path), settings={"model": "SoftPromptTuning"})
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"

    def by_hand() -> None:
        checkpoint.parent.mkdir(exist_ok=True)
        for file in (checkpoint, tmp_path / "config.yaml"):
            file.touch()

    def execute(args: list[str]) -> None:
        by_hand()
        if args[0] == "test":
            (tmp_path / "metrics.json").write_text("{}")

    def check() -> None:
        with pytest.raises(UserError, match=r"made by hand, as it has no run\.json; give another folder"):
            launch(spec, execute)
        assert checkpoint.exists()

    by_hand()
    check()
    clear(tmp_path)
    launch(spec, execute)
    clear(tmp_path)  # as `fit --overwrite true` does
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    by_hand()
    (tmp_path / "metrics.json").write_text("{}")
    check()


def test_a_launch_that_failed_can_be_repeated_with_other_settings(tmp_path: Path) -> None:
    """Unless its training was done; a killed one is repeated from the start."""
    calls: list[str] = []

    def execute(args: list[str]) -> None:
        calls.append(args[0])
        assert not (tmp_path / "config.yaml").exists() or args[0] == "test"
        (tmp_path / "config.yaml").touch()
        if failures[:1] == args[:1]:
            del failures[0]
            raise UserError("out of memory")
        if args[0] == "test":
            (tmp_path / "metrics.json").write_text("{}")

    spec = RunSpec(str(tmp_path), settings={"model": "SoftPromptTuning"})
    other = replace(spec, seed=1)
    failures = ["fit", "fit", "test"]
    for given in (spec, spec, other):
        with pytest.raises(UserError, match="out of memory"):
            launch(given, execute)
    with pytest.raises(UserError, match="made with other options"):
        launch(spec, execute)
    launch(other, execute)
    assert calls == ["fit", "fit", "fit", "test", "fit", "test"]


def test_only_what_is_missing_is_run_again(tmp_path: Path) -> None:
    """Of a trained run: its test after an error, and a validation that is asked for later."""
    calls: list[str] = []
    failures = ["test"]

    def execute(args: list[str]) -> None:
        calls.append(args[0])
        if failures[:1] == args[:1]:
            raise UserError(f"out of memory in {failures.pop()}")
        if args[0] == "fit":
            (tmp_path / "checkpoints").mkdir()
            for name in ("config.yaml", "checkpoints/last.ckpt"):
                (tmp_path / name).touch()
        for command, file in (("validate", "validation.json"), ("test", "metrics.json")):
            if args[0] == command:
                assert args[args.index("--trainer.default_root_dir") + 1] == str(tmp_path), "the run may have moved"
                assert args[1:5] == ["-c", str(tmp_path / "config.yaml"), "--ckpt_path", "best"]
                (tmp_path / file).write_text("{}")

    spec = RunSpec(str(tmp_path), settings={"model": "SoftPromptTuning"})
    with pytest.raises(UserError, match="out of memory"):
        launch(spec, execute)
    seconds = (tmp_path / "seconds.json").read_text()
    launch(spec, execute)
    launch(replace(spec, validate=True), execute)
    launch(spec, execute)
    assert calls == ["fit", "test", "test", "validate"]
    assert (tmp_path / "seconds.json").read_text() == seconds


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a" / "output.txt").mkdir(parents=True)
    specs = [RunSpec(str(tmp_path / name), settings={"model": "FewShot"}) for name in "ab"]
    with patch("lightning_prompts.runs.launcher.launch"):
        errors = launch_all(specs)
    assert errors == {specs[0].folder: f"{tmp_path}/a/output.txt: Is a directory"}


def test_a_prompt_before_training_is_tested_and_not_trained(tmp_path: Path) -> None:
    calls: list[str] = []
    spec = RunSpec(str(tmp_path), settings={"model": {"class_path": "SoftPromptTuning"}}, train=False)
    launch(spec, lambda args: calls.append(args[0]))
    assert calls == ["test"]


def test_an_output_names_an_unexpected_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(args: list[str]) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(cli, "execute", execute)
    assert attempt(RunSpec(str(tmp_path), settings={"model": "FewShot"})) == "ZeroDivisionError: division by zero"
    assert "Traceback" in (tmp_path / "output.txt").read_text()
