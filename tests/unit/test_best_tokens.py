"""One rule says which tokens are the best: best.ckpt, last.ckpt, prompt.txt and the method agree."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prompts.callbacks import PromptReadout
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import HardPromptSearch, PromptMethod, ReinforceRefiner, RelaxedPromptTuning
from lightning_prompts.methods.discrete import NOT_TEXT, DiscretePromptMethod
from lightning_prompts.methods.evaluation import Monitor
from lightning_prompts.prompts.initializers import FromText
from support.models import TINY
from support.odd_tokenizers import save_model
from support.training import data, trainer


def saves(folder: Path, method: type[PromptMethod]) -> list[L.Callback]:
    name, mode = method.monitor
    settings: dict[str, Any] = {
        "dirpath": folder,
        "save_top_k": 1,
        "enable_version_counter": False,
        "save_on_train_epoch_end": False,
    }
    return [
        PromptReadout(),
        ModelCheckpoint(filename="best", monitor=name, mode=mode, **settings),
        ModelCheckpoint(filename="last", **settings),
    ]


def best_ids(path: Path) -> list[int]:
    ids: torch.Tensor = torch.load(path, weights_only=True)["state_dict"]["best_ids"]
    return ids.tolist()


def check_agreement(folder: Path, model: DiscretePromptMethod) -> None:
    ids = model.best_ids.tolist()
    assert best_ids(folder / "best.ckpt") == best_ids(folder / "last.ckpt") == ids
    assert (folder / "prompt.txt").read_bytes().decode() == model.lm.text(ids)


@pytest.mark.parametrize("seed", range(3))
def test_all_files_hold_the_same_tokens(seed: int, tmp_path: Path) -> None:
    L.seed_everything(seed)
    model = RelaxedPromptTuning(3, lm=LMConfig(TINY), max_new_tokens=1)
    fit = trainer(
        tmp_path, max_steps=-1, max_epochs=4, enable_checkpointing=True, callbacks=saves(tmp_path, RelaxedPromptTuning)
    )
    fit.fit(model, datamodule=data())
    check_agreement(tmp_path, model)


def test_files_agree_where_the_likeliest_tokens_are_no_text(tmp_path: Path, tiny: FrozenLM) -> None:
    """Tokens with the smallest NLL that no text has come first, then tokens of a text."""
    half = tiny.encoder.tokens("é")[0]
    texts, halves = [[65 + n, 66] for n in range(20)], [[half, 40 + n] for n in range(60)]
    rows = data().examples("val")
    nll = [tiny.score(rows, tiny.embed(torch.tensor(ids))).nll.mean().item() for ids in texts + halves]
    lowest = min(nll[20:])
    no_text = halves[nll[20:].index(lowest)]
    ranked = [ids for value, ids in sorted(zip(nll[:20], texts, strict=True)) if value > lowest]
    best, worst = ranked[0], ranked[-1]
    assert best != worst
    L.seed_everything(0)
    model = RelaxedPromptTuning(2, lm=LMConfig(TINY), max_new_tokens=1)
    steps = [worst, no_text, best]
    model.token_ids = lambda: torch.tensor(steps[model.trainer.global_step])  # type: ignore[method-assign]
    fit = trainer(
        tmp_path,
        max_steps=2,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=saves(tmp_path, RelaxedPromptTuning),
    )
    fit.fit(model, datamodule=data())
    assert model.best_ids.tolist() == best
    check_agreement(tmp_path, model)


@pytest.mark.parametrize("kind", ["llama 2", "metaspace always"])
def test_all_files_agree_on_tokenizers_that_drop_a_space(kind: str, tmp_path: Path) -> None:
    name = LMConfig(save_model(tmp_path / "model", kind, TINY))
    for model in (
        RelaxedPromptTuning(3, lm=name, max_new_tokens=1),
        HardPromptSearch(init=FromText(" a word"), candidates=6, top_k=60, lm=name, max_new_tokens=1),
    ):
        folder = tmp_path / type(model).__name__
        L.seed_everything(0)
        fit = trainer(
            folder, max_steps=-1, max_epochs=2, enable_checkpointing=True, callbacks=saves(folder, type(model))
        )
        fit.fit(model, datamodule=data())
        check_agreement(folder, model)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_text_of_a_policy_is_that_of_its_best_checkpoint(mode: str, tmp_path: Path) -> None:
    """By its own metric, or by another one."""
    L.seed_everything(0)
    model = ReinforceRefiner(2, 4, support=TopK(40), readable=True, lm=LMConfig(TINY), max_new_tokens=1)
    nll = [0.0, 2.0, 1.0, 3.0]
    model.answer_nll = lambda examples, prompt: [nll[model.trainer.global_step]] * len(examples)  # type: ignore[method-assign]
    model.prompt_text = lambda: f"step {model.trainer.global_step}"  # type: ignore[method-assign]
    callbacks = saves(tmp_path, ReinforceRefiner)
    if mode == "max":
        model.on_validation_epoch_end = lambda: model.log("val/own", -nll[model.trainer.global_step])  # type: ignore[method-assign]
        callbacks[1].monitor, callbacks[1].mode = "val/own", "max"  # type: ignore[attr-defined]
    fit = trainer(
        tmp_path,
        max_steps=3,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=callbacks,
    )
    fit.fit(model, datamodule=data())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 2
    assert (tmp_path / "prompt.txt").read_text() == "step 2"


def test_the_rule_is_one_number(tiny: FrozenLM) -> None:
    """Tokens that no text has lose to all that some text has; then the smaller NLL wins, whatever came first."""
    half = tiny.encoder.tokens("é")[0]
    known = [([65, 66], 2.0), ([65, 67], 2.5), ([half, half], 1.0), ([half, 66], 1.0 + 1e-6)]
    model = RelaxedPromptTuning(2, lm=LMConfig(TINY))
    model.configure_model()
    for order in itertools.permutations(known):
        model.best_nll.fill_(float("inf"))
        best, kept = float("inf"), None
        for ids, nll in order:
            model.token_ids = lambda ids=ids: torch.tensor(ids)  # type: ignore[method-assign]
            value = model.keep_better(nll)
            assert value == pytest.approx(nll + NOT_TEXT * (half in ids), abs=1e-3)
            if value < best:
                best, kept = value, ids
            assert model.best_ids.tolist() == kept
        assert kept == [65, 66]


def test_a_monitor_tells_strictly_better_values() -> None:
    for mode, better, worse in (("min", 1.0, 2.0), ("max", 2.0, 1.0)):
        monitor = Monitor("val/x", mode)  # type: ignore[arg-type]
        assert monitor.better(better, worse)
        assert not monitor.better(worse, better)
        assert not monitor.better(better, better)
