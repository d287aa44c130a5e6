"""What `configure_model` builds under the default device of a run, as Lightning calls it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prompts.lm import FrozenLM
from lightning_prompts.methods import RefinerTuning
from lightning_prompts.objectives import bertscore, rewards
from lightning_prompts.objectives.rewards import BertScore
from support.cases import TRAINED
from support.pretend_device import NAME
from support.runs import ALL, trainer


class ConfiguredError(Exception):
    """Ends a run whose model is configured; Lightning has not moved it yet."""


@pytest.mark.parametrize("name", ALL)
def test_everything_is_built_on_the_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[FrozenLM] = []
    load = FrozenLM.load
    bertscore._load.cache_clear()
    monkeypatch.setattr(FrozenLM, "load", lambda *args, **kwargs: loaded.append(lm := load(*args, **kwargs)) or lm)
    method = ALL[name].make()
    configure = method.configure_model

    def configure_and_stop() -> None:
        assert torch.get_default_device().type == NAME, "as Lightning has it"
        states = torch.pretend.get_rng_state(), torch.get_rng_state()  # type: ignore[attr-defined]
        configure()
        assert torch.equal(torch.pretend.get_rng_state(), states[0])  # type: ignore[attr-defined]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert method.lm in loaded
        for module in (method, *loaded):
            for key, value in (*module.named_parameters(), *module.named_buffers()):
                assert value.device.type == NAME, key
        raise ConfiguredError

    method.configure_model = configure_and_stop  # type: ignore[method-assign]
    L.seed_everything(0, verbose=False)
    run = trainer(NAME, tmp_path)
    with pytest.raises(ConfiguredError):
        (run.fit if name in TRAINED else run.validate)(method, datamodule=ALL[name].data())


def test_the_model_of_a_reward_is_on_the_device() -> None:
    reward, found = BertScore(layer=2), []
    for device in ("cpu", NAME):
        method = TRAINED["reinforce, bertscore"].make()
        with torch.device(device):
            method.configure_model()
        scorer = rewards._bert_scorer(reward.model, reward.layer)
        assert {value.device.type for value in scorer._model.parameters()} == {device}
        found.append(reward(["a red apple", ""], ["the apple is red", "no"], []))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert 0 < found[0][0] < 1


def test_a_refiner_with_kept_states_can_be_deeply_copied() -> None:
    method, examples = TRAINED["refiner, transformer, soft"].make(), ALL["soft"].data().examples("train")
    with torch.device(NAME):
        method.configure_model()
    assert isinstance(method, RefinerTuning)
    method.store.prepare([example.question for example in examples], progress=False)
    torch.nn.init.ones_(method.refiner.head.linear.weight)
    copied: Any = copy.deepcopy(method)
    prompts = copied.prompt_for(examples)
    assert torch.equal(prompts, method.prompt_for(examples))
    assert {value.device.type for value in copied.parameters()} == {NAME}
    torch.nn.init.zeros_(method.refiner.head.linear.weight)
    assert torch.equal(copied.prompt_for(examples), prompts)
