"""What `Budget` counts, against hooks in the LMs' layers that know nothing of it."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prompts.callbacks import Budget, ValidateAtEnd
from lightning_prompts.callbacks.budget import forget_peak, peak_memory
from lightning_prompts.cli import run
from lightning_prompts.dln.proposals import Crossover, InducedInstructions, Paraphrases, Reflection
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.baselines import SelfCritical
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.estimators.relaxations import GumbelSoftmax
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import (
    Ape,
    Capo,
    DeepLanguageNetwork,
    DemonstrationSearch,
    Gepa,
    HardPromptSearch,
    LoraTuning,
    PrefixTuning,
    PromptDistillation,
    PromptMethod,
    RefinerTuning,
    ReinforceRefiner,
    RelaxedPromptTuning,
    ScratchTransformer,
    SoftPromptTuning,
)
from lightning_prompts.methods.self_study import SelfStudy
from lightning_prompts.objectives import BertScoreLoss
from lightning_prompts.objectives.rewards import ExactMatch
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.prefix import PrefixMLP
from lightning_prompts.refiners.networks import MLPRefiner
from lightning_prompts.search.scoring import Racing
from support.dln_toys import Toy, network
from support.faults import Run
from support.models import SMALLEST
from support.training import data

LM = LMConfig(SMALLEST)
WIDE = LMConfig(f"{SMALLEST},max_position_embeddings=700")
OTHER = LMConfig(f"{SMALLEST},max_position_embeddings=700")
METHODS: dict[str, Callable[[], PromptMethod]] = {
    "soft": lambda: SoftPromptTuning(3, lm=LM, max_new_tokens=2),
    "prefix": lambda: PrefixTuning(3, mlp=PrefixMLP(4, 5), lm=LM, max_new_tokens=2),
    "distillation": lambda: PromptDistillation(3, shots=2, lm=LM, max_new_tokens=2),
    "distillation, self-study": lambda: PromptDistillation(
        3, "prefix", context="Up.", self_study=SelfStudy(size=9, max_question_tokens=4), lm=LM, max_new_tokens=2
    ),
    "relaxed": lambda: RelaxedPromptTuning(3, GumbelSoftmax(), lm=LM, max_new_tokens=2),
    "lora": lambda: LoraTuning(rank=2, lm=LM, max_new_tokens=2),
    "scratch": lambda: ScratchTransformer(2, 16, 2, max_new_tokens=2),
    "search": lambda: HardPromptSearch(init=FromText(" ab"), candidates=6, top_k=30, lm=LM, max_new_tokens=2),
    "search, racing, fluency": lambda: HardPromptSearch(
        init=FromText(" ab"), candidates=6, top_k=30, fluency=0.5, racing=Racing(2, 0.4), lm=LM, max_new_tokens=2
    ),
    "refiner": lambda: RefinerTuning(3, MLPRefiner(8), lm=LM, max_new_tokens=2),
    "refiner, states in every step": lambda: RefinerTuning(
        3, MLPRefiner(8), objective=BertScoreLoss(), cache_states=False, lm=LM, max_new_tokens=2
    ),
    "reinforce": lambda: ReinforceRefiner(2, 3, support=TopK(20), lm=LM, max_new_tokens=2),
    "reinforce, greedy, written": lambda: ReinforceRefiner(
        2, 3, baseline=SelfCritical(), reward=ExactMatch(), support=TopK(20), lm=LM, max_new_tokens=2
    ),
    "dln": lambda: network(),
    "dln, two models": lambda: network(proposer=OTHER),
    "ape": lambda: Ape(
        "Say.",
        InducedInstructions(3, 1, max_new_tokens=8),
        Paraphrases(2, max_new_tokens=8),
        max_prompt_tokens=60,
        lm=WIDE,
    ),
    "gepa": lambda: Gepa(text="Say.", reflection=Reflection(2, max_new_tokens=8), max_prompt_tokens=60, lm=WIDE),
    "capo": lambda: Capo(
        "Say.",
        InducedInstructions(2, 1, 1.0, 8),
        Crossover(2, 1.0, 8),
        Paraphrases(2, 1.0, 8),
        2,
        2,
        racing=Racing(2, 0.4),
        lm=WIDE,
    ),
    "demonstrations": lambda: DemonstrationSearch("Say.", racing=Racing(2, 0.4), lm=WIDE),
}
TEXT = (DeepLanguageNetwork, Ape, Gepa, DemonstrationSearch)  # Capo is one


class Watch(L.Callback):
    """Counts what comes out of each LM's first layer in training."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.on = False
        self.candidates: list[float] = []
        self.texts = 0  # of the caches of text methods, which count what they ask by themselves
        self._before = 0

    def count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if self.on:
            self.counts["passes"] += 1
            kind = "tokens_with_gradient" if states.requires_grad else "tokens_without_gradient"
            self.counts[kind] += states.shape[:-1].numel()

    def switch(self, method: L.LightningModule, on: bool) -> None:
        texts = method.calls if isinstance(method, TEXT) else 0
        if self.on:
            self.texts += texts - self._before
        self.on, self._before = on, texts

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        method: Any = pl_module
        lms = [cached.lm for cached in method.cached_lms.values()] if isinstance(method, TEXT) else [method.lm]
        for lm in lms:
            lm.model.model.layers[0].register_forward_hook(self.count)
        self.switch(pl_module, True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if "train/candidates" in trainer.callback_metrics:
            self.candidates.append(float(trainer.callback_metrics["train/candidates"]))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.switch(pl_module, False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.switch(pl_module, True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.switch(pl_module, False)


def fitting(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, ValidateAtEnd()],
        **{
            "max_steps": 3,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            **settings,
        },
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_counted_the_same_way(name: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    method, watch, budget = METHODS[name](), Watch(), Budget()
    fit = fitting(tmp_path, watch, budget)
    fit.fit(method, datamodule=Toy() if isinstance(method, TEXT) else data())
    used = json.loads((tmp_path / "budget.json").read_text())
    assert used["steps"] == 3
    for kind in ("tokens_with_gradient", "tokens_without_gradient", "passes"):
        assert used[kind] == watch.counts[kind], kind
    assert used["tokens"] == watch.counts["tokens_with_gradient"] + watch.counts["tokens_without_gradient"] > 0
    assert used["calls_remote"] == used["tokens_remote"] == 0
    assert (used["tokens_with_gradient"] > 0) == (not isinstance(method, (*TEXT, ReinforceRefiner)))
    for kind in ("tokens", "tokens_with_gradient", "calls", "seconds", "memory_gb"):
        logged = fit.callback_metrics[f"budget/{kind}"]
        assert 0 <= float(logged) <= used[kind] * (1 + 1e-6)
    assert used["memory_gb"] == pytest.approx(peak_memory(torch.device("cpu")) / 1e9, rel=0.2)
    rows = 3 * 4  # steps of four examples
    if isinstance(method, TEXT):
        assert used["calls"] == watch.texts > rows
    elif name == "search":
        assert used["calls"] == rows + 4 * sum(watch.candidates), "the gradient, and each candidate on each example"
    elif name == "reinforce":
        assert used["calls"] == len(method.remembered), "each prompt on its question"  # type: ignore[arg-type]
    elif name in ("soft", "prefix", "relaxed", "lora", "scratch", "refiner"):
        assert used["calls"] == rows
    elif name == "distillation":
        assert used["calls"] == 2 * rows, "the teacher and the student"
    elif name == "refiner, states in every step":
        assert used["calls"] == 4 * rows, "the question, the answer, and both answers for BERTScore"
    else:
        assert used["calls"] > rows


def test_a_search_that_runs_out_of_memory_counts_its_texts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fails in (False, True):
        L.seed_everything(0)
        method = METHODS["search"]()
        method.configure_model()
        usual, left = method.lm.logits, [fails]

        def failing(embeddings: torch.Tensor, *args: Any, usual: Any = usual, left: Any = left, **kwargs: Any) -> Any:
            if left[0] and not torch.is_grad_enabled() and len(embeddings) > 30:
                left[0] = False
                raise torch.OutOfMemoryError("out of memory")
            return usual(embeddings, *args, **kwargs)

        monkeypatch.setattr(method.lm, "logits", failing)
        fitting(tmp_path, budget := Budget(), limit_val_batches=0, max_steps=1).fit(method, datamodule=data())
        assert not left[0], "it has run out where it should"
        found.append(budget.used)
    assert found[0]["calls"] == found[1]["calls"]
    assert found[0]["passes"] < found[1]["passes"]


def test_memory_is_that_of_this_run(tmp_path: Path) -> None:
    """What an earlier run of the process has held, and given back, is not counted."""
    torch.empty(300_000_000, dtype=torch.uint8).fill_(1)
    before = peak_memory(torch.device("cpu")) / 1e9
    fit = fitting(tmp_path, budget := Budget(), max_steps=1)
    fit.fit(METHODS["soft"](), datamodule=data())
    assert 0.05 < budget.used["memory_gb"] < before - 0.15
    held = torch.empty(300_000_000, dtype=torch.uint8).fill_(1)
    fit = fitting(tmp_path, more := Budget(), max_steps=1)
    fit.fit(METHODS["soft"](), datamodule=data())
    assert more.used["memory_gb"] > budget.used["memory_gb"] + 0.15, held.shape


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's peak as other systems tell it, and nothing where they tell none."""
    device = torch.device("cpu")
    usual = peak_memory(device)

    class Nowhere(type(Path())):  # type: ignore[misc]
        def read_text(self, *args: Any, **kwargs: Any) -> str:
            raise FileNotFoundError(self)

        def write_text(self, *args: Any, **kwargs: Any) -> int:
            raise FileNotFoundError(self)

    monkeypatch.setattr("lightning_prompts.callbacks.budget.Path", Nowhere)
    forget_peak(device)
    assert peak_memory(device) >= 0.9 * usual
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(device) == 0


@pytest.mark.parametrize("limit", [{"calls": 30}, {"tokens": 400}, {"seconds": 1e-9}, {"memory_gb": 1e-3}])
def test_any_limit_stops_training(limit: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    L.seed_everything(0)
    (name, value), budget = next(iter(limit.items())), Budget(**limit)  # type: ignore[arg-type]
    method = SoftPromptTuning(3, lm=LM, max_new_tokens=1)
    validated: list[int] = []

    class Look(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            validated.append(trainer.global_step)

    with caplog.at_level(logging.WARNING):
        fit = fitting(tmp_path, budget, Look(), max_steps=300)
        fit.fit(method, datamodule=data())
    steps = {"calls": 8, "seconds": 1, "memory_gb": 1}.get(name, fit.global_step)
    assert fit.global_step == steps < 100
    assert validated[-1] == steps, "the last prompt is measured"
    used = json.loads((tmp_path / "budget.json").read_text())
    assert used[name] >= value
    assert used[name] * (steps - 1) / steps < value or name == "memory_gb"
    said = [record.getMessage() for record in caplog.records if f"budget.{name} is" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("stopping")
    rate = fit.optimizers[0].param_groups[0]["lr"]
    if name == "memory_gb":
        assert rate > 0.01, "memory says nothing about how far the run is"
    elif name != "seconds":  # where there was one step alone
        assert rate < 4e-3, "the learning rate has fallen"


def test_counts_go_on_in_a_resumed_run(tmp_path: Path) -> None:
    L.seed_everything(0)
    fit = fitting(tmp_path, Budget(calls=22))
    method = SoftPromptTuning(3, lm=LM, max_new_tokens=1)
    fit.fit(method, datamodule=data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    first = json.loads((tmp_path / "budget.json").read_text())
    assert first["calls"] == 12
    again = fitting(tmp_path, Budget(calls=22), max_steps=100)
    method = SoftPromptTuning(3, lm=LM, max_new_tokens=1)
    again.fit(method, datamodule=data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    second = json.loads((tmp_path / "budget.json").read_text())
    assert (second["calls"], second["steps"]) == (24, 6)
    assert all(second[name] >= first[name] for name in first)
    budget = Budget()
    budget.load_state_dict({"tokens": 5, "seconds": 1.5, "steps": 2})  # of a checkpoint from before there were calls
    assert budget.used["tokens"] == 5
    assert budget.used["calls"] == 0


@pytest.mark.parametrize("limit", [{"calls": 22}, {"memory_gb": 1e-3}])
def test_a_limit_waits_for_gradients_that_are_being_accumulated(limit: dict[str, Any], tmp_path: Path) -> None:
    fit = fitting(tmp_path, budget := Budget(**limit), max_steps=100, accumulate_grad_batches=4)
    fit.fit(METHODS["soft"](), datamodule=data())  # epochs of five batches, so of two steps
    wanted = {"calls": 36, "steps": 3} if "calls" in limit else {"calls": 16, "steps": 1}
    assert {name: budget.used[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["soft", "search", "reinforce", "dln", "ape", "demonstrations"])
def test_a_used_up_budget_trains_nothing_more(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = []
    for checkpoint in (None, tmp_path / "x.ckpt"):
        method = METHODS[name]()
        fit = fitting(tmp_path, Budget(calls=2), max_steps=100)
        fit.fit(
            method, datamodule=Toy() if isinstance(method, TEXT) else data(), ckpt_path=checkpoint, weights_only=True
        )
        fit.save_checkpoint(tmp_path / "x.ckpt")
        counts.append((tmp_path / "budget.json").read_text())
        assert fit.global_step == 1
        assert ("so there is no training" in caplog.text) == (checkpoint is not None)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["tokens", "calls", "seconds", "memory_gb"])
def test_a_limit_is_above_zero(name: str) -> None:
    with pytest.raises(UserError, match=rf"budget\.{name} must be above 0, got -1"):
        Budget(**{name: -1})
    with pytest.raises(UserError, match=rf"budget\.{name} must be a finite number"):
        Budget(**{name: float("nan")})


def test_processes_count_together(tmp_path: Path) -> None:
    """Two that share batches of four are as one, and stop at the same step."""
    words = [
        "fit",
        "--model",
        "SoftPromptTuning",
        "--model.lm.name",
        SMALLEST,
        "--model.length",
        "3",
        "--data",
        "Antonyms",
        "--data.max_train_examples",
        "64",
        "--trainer.max_steps",
        "100",
        "--trainer.max_epochs",
        "-1",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--model.max_new_tokens",
        "1",
        "--budget.calls",
        "21",
    ]
    used = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        more = [
            "--data.batch_size",
            "4",
            "--trainer.devices",
            str(count),
            "--trainer.default_root_dir",
            str(folder),
            *(["--trainer.strategy", "ddp"] if count > 1 else []),
        ]
        if count == 1:
            assert run([*words, *more]) == 0
        else:
            process = Run([*words, *more], tmp_path / "log")
            assert process.wait() == 0, process.output
        used.append(json.loads((folder / "budget.json").read_text()))
    assert [counts["calls"] for counts in used] == [24, 24]
    assert [counts["steps"] for counts in used] == [6, 6]
    assert used[0]["passes"] * 2 == used[1]["passes"]
