"""A checkpoint says what it was made with, and is loaded from Python without saying it again."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prompts.datamodules import Antonyms
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.temperature import Temperature
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import (
    FixedPrompt,
    PrefixTuning,
    PromptMethod,
    RelaxedPromptTuning,
    SoftPromptTuning,
)
from lightning_prompts.methods.settings import as_plain, from_plain
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.search.rounding import Rounding
from support.models import TINY
from support.training import trainer

LM = LMConfig(TINY)


def data(**settings: Any) -> Antonyms:
    return Antonyms(batch_size=4, max_train_examples=8, val_fraction=0.01, test_fraction=0.01, **settings)


def trained(method: PromptMethod, folder: Path) -> Path:
    run = trainer(folder, max_steps=1, limit_val_batches=0)
    run.fit(method, datamodule=data())
    run.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def soft() -> SoftPromptTuning:
    return SoftPromptTuning(
        2,
        FromText("a cat"),
        ResidualMLP(4),
        Likelihood("tokens"),
        lm=LM,
        max_new_tokens=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    )


def relaxed() -> RelaxedPromptTuning:
    return RelaxedPromptTuning(3, temperature=Temperature(0.5, 0.1), rounding=Rounding(top_k=3, examples=2), lm=LM)


@pytest.mark.parametrize("make", [soft, relaxed, lambda: PrefixTuning(2, lm=LM)])
def test_a_checkpoint_is_loaded_with_the_settings_of_its_run(make: Any, tmp_path: Path) -> None:
    method = make()
    path = trained(method, tmp_path)
    assert len(str(torch.load(path, weights_only=True)["hyper_parameters"])) < 3000
    for kind in (type(method), PromptMethod):
        loaded = kind.load_from_checkpoint(path)
        assert type(loaded) is type(method)
        for name in inspect.signature(type(method)).parameters:
            if name not in ("lm", "optimizer", "scheduler"):
                assert getattr(loaded, name) == getattr(method, name), name
        assert loaded.lm_config == LM
        examples = data().examples("test")[:4]
        expected = trainer(tmp_path).test(method, datamodule=data(), verbose=False)
        assert trainer(tmp_path).test(loaded, datamodule=data(), verbose=False) == expected
        assert [row["generated"] for row in loaded.evaluate_batch(examples)]
    assert make.__name__ != "soft" or SoftPromptTuning.load_from_checkpoint(path, max_new_tokens=1).max_new_tokens == 1
    with pytest.raises(UserError, match=f"no checkpoint of FixedPrompt, but one of {type(method).__name__}"):
        FixedPrompt.load_from_checkpoint(path)


def test_another_template_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = trained(SoftPromptTuning(2, lm=LM, max_new_tokens=1), tmp_path)
    method = SoftPromptTuning.load_from_checkpoint(path)
    assert method.template == data().template
    other = "{prompt} {question} is not {answer}\n"
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path).test(method, datamodule=data(), verbose=False)
        assert "template" not in caplog.text
        trainer(tmp_path).test(method, datamodule=data(template=other), verbose=False)
    assert f"the prompt was trained with data.template {data().template.text!r} (now {other!r})" in caplog.text
    caplog.clear()
    again = SoftPromptTuning(2, lm=LM, max_new_tokens=1)
    trainer(tmp_path).test(again, datamodule=data(stop="x"), ckpt_path=path, weights_only=True, verbose=False)
    assert "with data.stop" in caplog.text
    with pytest.raises(UserError, match=re.escape("set it back to continue the training")):
        trainer(tmp_path).fit(again, datamodule=data(template=other), ckpt_path=path, weights_only=True)


class Own(FromText):
    """An initialiser that does not keep what it was made from."""

    def __init__(self, word: str) -> None:
        super().__init__(word)


def test_what_a_checkpoint_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = trained(SoftPromptTuning(1, Own("cat"), lm=LM), tmp_path)
    with pytest.raises(UserError, match=r"does not record init; pass it: SoftPromptTuning\.load_from_checkpoint"):
        SoftPromptTuning.load_from_checkpoint(path)
    assert SoftPromptTuning.load_from_checkpoint(path, init=Own("cat")).length == 1


@pytest.mark.parametrize(
    ("class_path", "words"),
    [
        ("subprocess.Popen", "init of the checkpoint cannot be a subprocess.Popen"),
        ("antigravity.Thing", "which is not known here; import antigravity first"),
        ("lightning_prompts.lm.config.LMConfig", "init of the checkpoint cannot be a"),
    ],
)
def test_a_checkpoint_makes_nothing_else(class_path: str, words: str) -> None:
    plain = {"init": {"class_path": class_path, "init_args": {"args": "touch code_was_run"}}}
    with pytest.raises(UserError, match=re.escape(words)):
        from_plain(plain, SoftPromptTuning, {})


def test_every_method_says_its_default_settings() -> None:
    """And they are the same when they are read back."""
    for kind in _subclasses(PromptMethod):
        parameters = inspect.signature(kind).parameters.values()
        settings = {
            each.name: each.default
            for each in parameters
            if each.default is not each.empty and each.name not in ("optimizer", "scheduler")
        }
        plain = as_plain(settings)
        assert "not_said" not in plain, kind
        assert from_plain(plain, kind, {}) == settings, kind


def _subclasses(kind: type) -> list[type]:
    return [
        each
        for child in kind.__subclasses__()
        if child.__module__.startswith("lightning_prompts")
        for each in ([] if inspect.isabstract(child) else [child]) + _subclasses(child)
    ]
