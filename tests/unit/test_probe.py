"""Each architecture that is accepted is scored as it scores itself; others are refused in one line, before they run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, architectures, attention, layout, packed, probe
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.loading import _checkpoint_gradients, weightless_model

# A type, and settings of its config.
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", {}),
    "falcon, key/value heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "stablelm": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "nemotron": ("nemotron", {"num_key_value_heads": 8}),
    "phimoe": ("phimoe", {"sliding_window": 8}),
    "gpt_oss": ("gpt_oss", {}),
    "gemma3n": ("gemma3n_text", {}),
    "gemma4": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "gemma4, wrapped": ("gemma4", {}),
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gpt_neox": ("gpt_neox", {}),
    "xglm": ("xglm", {}),
    "opt": ("opt", {}),
    "phi3, long": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.5] * 48,
                "long_factor": [2.0] * 48,
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "llama, scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 5e5,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "gemma3, wrapped": ("gemma3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
TEXTS = [[5, 9, 30, 7, 21, 11, 40, 8, 33, 17, 25, 12], [5, 9, 30, 7, 21, 42, 6, 19]]


def load(name: str, folder: Path) -> FrozenLM:
    """A small one with sharp random weights, through the door that users take."""
    kind, settings = WORK[name]
    config = probe.twin_config(AutoConfig.for_model(kind, **settings))
    for part in (config, config.get_text_config()):
        for key in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(part, key):
                setattr(part, key, 300)
    config.save_pretrained(folder)
    lm = FrozenLM.load(LMConfig(f"random:{folder}"))
    generator = torch.Generator().manual_seed(1)
    for weight in lm.model.parameters():
        scale = weight.shape[-1] ** -0.5 * 1.5 if weight.dim() > 1 else 0.2
        noise = torch.randn(weight.shape, generator=generator) * scale
        weight.data = noise if weight.dim() > 1 else weight + noise
    lm.model.tie_weights()
    return lm


def own_model(lm: FrozenLM) -> PreTrainedModel:
    """As transformers has it, with its default attention."""
    own = AutoModelForCausalLM.from_config(copy.deepcopy(lm.model.config), attn_implementation=None).eval()
    own.load_state_dict(lm.model.state_dict())
    return own


@torch.no_grad()
def own_scores(own: PreTrainedModel, ids: list[int]) -> Tensor:
    return own(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", WORK)
def test_packed_is_what_the_model_itself_computes(name: str, tmp_path: Path) -> None:
    lm = load(name, tmp_path)
    own = own_model(lm)
    rows = [Row(ids[:7], ids[7:]) for ids in TEXTS]
    wanted = [-own_scores(own, ids)[torch.arange(6, len(ids) - 1), torch.tensor(ids[7:])].sum().item() for ids in TEXTS]
    assert abs(wanted[0] / 5 - wanted[1]) > 1e-3, "the weights are sharp enough to tell texts apart"
    scores = lm.score_rows(rows, lm.no_prompt())
    assert scores.nll.tolist() == pytest.approx([wanted[0] / 5, wanted[1]], abs=1e-4)
    as_text = [Row([-1, -2, -3, *ids[3:7]], ids[7:]) for ids in TEXTS]
    assert torch.allclose(lm.score_rows(as_text, lm.embed(torch.tensor(TEXTS[0][:3]))).nll, scores.nll, atol=1e-4)
    prefix = lm.key_values(lm.embed(torch.tensor(TEXTS[0][:3])))
    behind = lm.score_rows([Row(ids[3:7], ids[7:]) for ids in TEXTS], prefix)
    assert torch.allclose(behind.nll, scores.nll, atol=1e-4)
    for ids, new in zip(TEXTS, lm.generate_tokens([Row(ids, []) for ids in TEXTS], lm.no_prompt(), 3), strict=True):
        assert new == own_scores(own, ids + new)[len(ids) - 1 : -1].argmax(-1).tolist()[: len(new)]
        assert len(new) == 3 or (len(new) < 3 and own_scores(own, ids + new)[-1].argmax().item() in lm.end_tokens())


@pytest.mark.parametrize("name", ["bloom", "stablelm", "falcon, alibi", "gptj", "gpt_oss", "xglm", "opt"])
def test_gradients_are_those_of_the_model_itself(name: str, tmp_path: Path) -> None:
    """Checkpointed, too, where each layer runs again after another pass has had another layout."""
    lm = load(name, tmp_path)
    own = own_model(lm)
    vectors = torch.randn(2, lm.width, generator=torch.Generator().manual_seed(3)).requires_grad_()
    whole = []
    for ids in TEXTS:
        text = own.get_input_embeddings()(torch.tensor(ids))
        logits = own(inputs_embeds=torch.cat([vectors, text])[None]).logits[0].log_softmax(-1)
        whole.append(-logits[torch.arange(len(ids), len(ids) + 1), ids[-1:]].sum())
    (wanted,) = torch.autograd.grad(whole[0] + whole[1], vectors)
    assert wanted.abs().max() > 1e-3
    rows = [Row([-1, -2, *ids[:-1]], ids[-1:]) for ids in TEXTS]
    for checkpointed in (False, True):
        if checkpointed:
            _checkpoint_gradients(lm.model)
            lm.train(False)
        passes = [lm.score_rows(rows[:1], vectors), lm.score_rows(rows[1:], vectors)]
        (found,) = torch.autograd.grad(passes[0].nll.sum() + passes[1].nll.sum(), vectors)
        assert torch.allclose(found, wanted, atol=1e-4), checkpointed


def test_a_vector_is_the_token_whose_embedding_it_is(tmp_path: Path) -> None:
    lm = load("gemma3n", tmp_path)
    (inputs,) = [hook for hook in lm.model._forward_pre_hooks.values() if isinstance(hook, architectures.TokenInputs)]
    ids = torch.tensor([[7, 299, 0], [12, 5, 250]])
    vectors = lm.embed(ids)
    assert inputs.tokens(vectors).tolist() == ids.tolist()
    vectors[0, 1] += 1e-6
    vectors[1, 2] = 0
    assert inputs.tokens(vectors).tolist() == [[7, lm.model.config.pad_token_id, 0], [12, 5, 0]]


# Doge of older versions of transformers, up to 5.15 at least, is not causal.
DOGE = (
    "its packed log-probabilities differ" if Version(version("transformers")) >= Version("5.20") else "it is not causal"
)
REFUSED = {
    "bert": ({}, "it is not causal"),
    "roberta": ({}, "it is not causal"),
    "bart": ({}, "its packed log-probabilities differ"),
    "pegasus": ({}, "its packed log-probabilities differ"),
    "doge": ({}, DOGE),
    "diffllama": ({}, "keys and values before all tokens have another effect"),
    "hrm_text": ({}, "keys and values before all tokens have another effect"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 16}, "its packed log-probabilities differ"),
    "deepseek_v32": ({}, "its packed log-probabilities differ"),
    "rwkv": ({}, "a small model of its kind fails with RuntimeError"),
    "openai-gpt": ({}, "a small model of its kind fails with RuntimeError"),
    "prophetnet": ({}, "it is not causal"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_differs_is_refused_in_one_line(kind: str) -> None:
    settings, what = REFUSED[kind]
    with pytest.raises(UserError) as refused:
        probe.probe(AutoConfig.for_model(kind, **settings), "my/model")
    line = str(refused.value)
    assert line.startswith(f"model 'my/model' ({kind}) cannot be scored packed: {what}")
    assert "\n" not in line
    assert line.endswith("; use another model")


@pytest.mark.parametrize("look", [FrozenLM.load, weightless_model])
def test_every_door_asks_the_probe(look: Callable[[LMConfig], object]) -> None:
    name = "random:doge,hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4"
    with pytest.raises(UserError, match=rf"\(doge\) cannot be scored packed: {DOGE}"):
        look(LMConfig(name))


def wider(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs["window"] is not None:
            kwargs["window"] += 1
        return right(*args, **kwargs)

    return broken


def without(what: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def change(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: right(*args, **{**kwargs, what: None})

    return change


def one_memory(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: right(*args, **{**kwargs, "layer": 0})


def forgetful(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forgets what earlier steps of generation have written."""

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        layout = args[3]
        if layout.above and layout.cache is not None and kwargs["layer"] in layout.cache.rows:
            for part in layout.cache.rows[kwargs["layer"]]:
                part.mul_(0.5)
        return right(*args, **kwargs)

    return broken


BROKEN: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a window": ("mistral", wider, "its packed log-probabilities differ"),
    "a window in the mask": ("phimoe", without("window"), "its packed log-probabilities differ"),
    "sinks": ("gpt_oss", without("sinks"), "its packed log-probabilities differ"),
    "ALiBi": ("bloom", without("bias"), "its packed log-probabilities differ"),
    "a cap": ("gemma2", without("softcap"), "its packed log-probabilities differ"),
    "layers": ("llama", one_memory, "keys and values before all tokens have another effect"),
    "memory": ("llama", forgetful, "generation with cached keys and values differs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_attention_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, change, what = BROKEN[name]
    twin = probe.twin_config(AutoConfig.for_model(kind, **{"sliding_window": 9} if kind == "phimoe" else {}))
    assert probe.difference(twin) == ""
    monkeypatch.setattr(attention, "packed_attention", change(attention.packed_attention))
    assert probe.difference(twin).startswith(what)


def test_what_is_right_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cache_root", lambda: tmp_path)
    probed: list[str] = []

    def difference(twin: PretrainedConfig) -> str:
        probed.append(twin.model_type)
        return "it is wrong" if twin.model_type == "bert" else ""

    monkeypatch.setattr(probe, "difference", difference)
    for settings in ({}, {}, {"num_hidden_layers": 40, "vocab_size": 99_999, "hidden_size": 8192}):
        probe.probe(AutoConfig.for_model("llama", **settings), "a")
    assert probed == ["llama"], "once for all sizes"
    probe.probe(AutoConfig.for_model("llama", hidden_act="relu"), "a")
    probe.probe(AutoConfig.for_model("qwen2"), "a")
    assert probed == ["llama", "llama", "qwen2"], "for each type and its features"
    for _ in range(2):
        with pytest.raises(UserError, match="it is wrong; use another"):
            probe.probe(AutoConfig.for_model("bert"), "a")
    assert probed[3:] == ["bert", "bert"], "what is wrong may be right tomorrow"
    monkeypatch.setattr(probe.transformers, "__version__", "0")
    probe.probe(AutoConfig.for_model("llama"), "a")
    assert probed[5:] == ["llama"], "for each version"


def test_what_a_pass_runs_is_part_of_the_key() -> None:
    """A stored success is of the code of this version: what the packed pass imports from its own package."""
    needless = {"failures", "fusion", "graphs", "sharding", "config", "language_model", "sampling"}
    imported = {
        name.rpartition(".")[2]
        for module in (packed, layout, attention)
        for name in re.findall(r"from (lightning_prompts\.lm\.\w+) import", Path(module.__file__).read_text())
    }
    assert imported - needless <= set(probe.SOURCES)


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(probe, "cache_root", lambda: tmp_path / "file")
    state = torch.random.get_rng_state()
    probe.probe(AutoConfig.for_model("llama"), "a")
    assert torch.equal(torch.random.get_rng_state(), state), "the probe draws nothing from the run's numbers"


def test_the_twin_is_small_and_has_a_layer_of_each_kind() -> None:
    large = AutoConfig.for_model("gemma3_text", num_hidden_layers=26)
    twin = probe.twin_config(large)
    assert twin.layer_types == ["sliding_attention", "full_attention"] * 2
    assert (twin.num_hidden_layers, twin.sliding_window, twin.vocab_size) == (4, probe.WINDOW, probe.VOCABULARY)
    assert large.num_hidden_layers == 26
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(twin)
    assert model.num_parameters() < 300_000


def test_an_architecture_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    AutoConfig.for_model("doge").save_pretrained(tmp_path)  # and no weights
    with pytest.raises(UserError, match=r"\(doge\) cannot be scored packed"):
        FrozenLM.load(LMConfig(str(tmp_path)))
