"""A reused LM stays on the run's device, where each run computes; without reuse a Trainer moves it to the CPU."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.reuse import keep_lms, load_or_reuse, make_room
from lightning_prompts.methods import LoraTuning
from support.cases import TRAINED
from support.models import SMALLEST
from support.pretend_device import NAME, to_host
from support.runs import trainer

DEVICE = torch.device(NAME, 0)
FIRST = LMConfig(SMALLEST)
OTHER = LMConfig(SMALLEST.replace("num_hidden_layers=1", "num_hidden_layers=2"))


def test_a_reused_lm_stays_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix starts from keys and values that the LM computes before Lightning moves the method."""
    loaded: list[FrozenLM] = []
    load = FrozenLM.load
    monkeypatch.setattr(FrozenLM, "load", lambda *args, **kwargs: loaded.append(lm := load(*args, **kwargs)) or lm)

    def trained(folder: str, left: str) -> tuple[dict[str, Any], torch.Tensor]:
        L.seed_everything(0, verbose=False)
        method = TRAINED["prefix"].make()
        trainer(NAME, tmp_path / folder, max_steps=2).fit(method, datamodule=TRAINED["prefix"].data())
        assert method.lm.device.type == left
        assert {value.device.type for value in method.state_dict().values()} == {"cpu"}
        return {
            key: value.clone() for key, value in method.state_dict().items()
        }, method.lm.model.get_input_embeddings().weight

    fresh, _ = trained("fresh", "cpu")
    with keep_lms():
        first, weight = trained("first", NAME)
        memory = to_host(weight).data_ptr()
        again, same = trained("again", NAME)
        assert same is weight
        assert to_host(same).data_ptr() == memory, "it was not moved in between"
    for found in (first, again):
        assert all(torch.equal(found[key], value) for key, value in fresh.items())
    assert len(loaded) == 2


def test_the_copy_of_the_embeddings_leaves_the_device_with_the_lm() -> None:
    lm = FrozenLM.load(FIRST, device=DEVICE)
    held = weakref.ref(lm.embedding_matrix())
    lm.stays = True
    lm.cpu()
    assert held() is lm.embedding_matrix()
    lm.stays = False
    lm.cpu()
    assert held() is None
    assert lm.embedding_matrix().device.type == "cpu"
    assert lm.to(torch.float64).embedding_matrix().dtype == torch.float64


def test_an_lm_that_a_run_does_not_need_leaves_the_device() -> None:
    """Before another one is loaded; it may be needed again later."""
    with keep_lms() as kept:
        with kept.one_run():
            first = load_or_reuse(FIRST, DEVICE)
        with kept.one_run():
            other = load_or_reuse(OTHER, DEVICE)
            assert first.device.type == "cpu"
            first = load_or_reuse(FIRST, DEVICE)
            assert {first.device, other.device} == {DEVICE}, "a run with two"
        with kept.one_run():
            load_or_reuse(FIRST, torch.device("cpu"))
            assert {first.device, other.device} == {DEVICE}, "there is room on the CPU"
            load_or_reuse(FIRST, DEVICE)
            make_room(DEVICE)
            assert other.device.type == "cpu"
        assert set(kept.lms) == {(FIRST, DEVICE), (FIRST, torch.device("cpu"))}
        with contextlib.suppress(ZeroDivisionError), kept.one_run():
            load_or_reuse(FIRST, DEVICE)
            raise ZeroDivisionError
        with kept.one_run():
            first = kept.lms[FIRST, DEVICE][0]
            LoraTuning(rank=1, lm=FIRST).load_lm(FIRST, DEVICE)
            assert first.device.type == "cpu", "a method that trains its LM loads its own"
