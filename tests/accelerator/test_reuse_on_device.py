"""A reused LM computes on the run's device; a Trainer moves it to the CPU at the end of each run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.reuse import keep_lms
from support.cases import TRAINED
from support.pretend_device import NAME
from support.runs import trainer


def test_a_reused_lm_returns_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix starts from keys and values that the LM computes before Lightning moves the method."""
    loaded: list[FrozenLM] = []
    load = FrozenLM.load
    monkeypatch.setattr(FrozenLM, "load", lambda *args, **kwargs: loaded.append(lm := load(*args, **kwargs)) or lm)

    def trained(folder: str) -> dict[str, Any]:
        L.seed_everything(0, verbose=False)
        method = TRAINED["prefix"].make()
        trainer(NAME, tmp_path / folder, max_steps=2).fit(method, datamodule=TRAINED["prefix"].data())
        assert method.lm.device.type == "cpu", "as Lightning leaves it"
        return {key: value.clone() for key, value in method.state_dict().items()}

    fresh = trained("fresh")
    with keep_lms():
        for folder in ("first", "again"):
            found = trained(folder)
            assert all(torch.equal(found[key], value) for key, value in fresh.items())
    assert len(loaded) == 2
