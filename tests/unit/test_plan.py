"""The memory plan: against what autograd really keeps, and from the command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prompts.cli import commands
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.estimators.relaxations import GumbelSoftmax, Projected
from lightning_prompts.lm import LMConfig, LMShape, Server
from lightning_prompts.lm import layout as layout_module
from lightning_prompts.lm.loading import load_model
from lightning_prompts.memory_plan import MemoryPlan, Packed, Processes, kept_bytes, make_plan, optimizer_state
from lightning_prompts.methods import (
    DeepLanguageNetwork,
    FixedPrompt,
    HardPromptSearch,
    LoraTuning,
    PrefixTuning,
    PromptMethod,
    RefinerTuning,
    ReinforceRefiner,
    RelaxedPromptTuning,
    ScratchTransformer,
    SoftPromptTuning,
)
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.refiners.networks import TransformerRefiner
from lightning_prompts.template import Template
from lightning_prompts.types import Batch, Example
from support.models import SHAPES, TINY
from support.project import ROOT

# Large enough that what the plan leaves out, single numbers per token, does not count.
WIDE = (
    "hidden_size=64,intermediate_size=160,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2,"
    "max_position_embeddings=512"
)
SEVEN_BILLION = (
    "random:llama,hidden_size=4096,intermediate_size=11008,num_hidden_layers=32,num_attention_heads=32,"
    "num_key_value_heads=32,vocab_size=32000,max_position_embeddings=4096"
)


def batch(count: int = 12, even: bool = True, first: bool = False) -> list[Example]:
    template = Template("{prompt}{question}: {answer}" if first else "The opposite of{prompt} {question} is {answer}")
    words = ["hot", "large and heavy", "dark", "unquestionably good", "near", "at home in the evening"]
    return [
        template.render({"question": words[0 if even else n % len(words)], "answer": f"{n % 7} and more"}, f"row {n}")
        for n in range(count)
    ]


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, parameters left out."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, Any] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def kept_by(method: PromptMethod, examples: list[Example]) -> int:
    """What a training step of a method really keeps."""
    method.configure_model()
    kept = Kept([*method.parameters(), *method.buffers()])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = method.training_step(Batch(examples), 0)
    assert loss.requires_grad
    return kept.bytes


def planned(method: PromptMethod, examples: list[Example]) -> float:
    shape = LMShape.of(method.lm_config)
    memory_estimate = method.memory_estimate(shape, len(examples))
    shape = memory_estimate.shape or shape
    rows = [shape.encoder.row(example, memory_estimate.length, with_end=True) for example in examples]
    packed = Packed.of(rows, memory_estimate)
    # Beside what `kept_bytes` counts: log-probabilities, which the plan counts as temporary tensors.
    return kept_bytes(shape, packed, memory_estimate) + packed.logits * shape.vocabulary * 4


LM = LMConfig(f"random:llama,{WIDE}")
METHODS: dict[str, Callable[[], PromptMethod]] = {
    "soft": lambda: SoftPromptTuning(8, lm=LM),
    "soft, tied reparametrisation": lambda: SoftPromptTuning(8, reparametrization=ResidualMLP(8), lm=LM),
    "prefix": lambda: PrefixTuning(8, mlp=None, lm=LM),
    "lora": lambda: LoraTuning(4, text="is", lm=LM),
    "lora, some": lambda: LoraTuning(4, target_modules=["q_proj", "down_proj"], text="is", lm=LM),
    "refiner": lambda: RefinerTuning(6, lm=LM, cache_states=False),
    "scratch": lambda: ScratchTransformer(3, 64, 4),
}


@pytest.mark.parametrize("rows", ["even", "uneven", "prompt first"])
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_what_autograd_keeps(name: str, rows: str) -> None:
    examples = batch(even=rows == "even", first=rows == "prompt first")
    assert planned(METHODS[name](), examples) == pytest.approx(kept_by(METHODS[name](), examples), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (f"random:qwen3,{WIDE},head_dim=16", 0.25),  # norms of heads, which keep their inputs
        (f"random:qwen2,{WIDE}", 0.08),
        (f"random:mistral,{WIDE}", 0.08),
        ("random:gpt2,n_embd=64,n_layer=3,n_head=4,n_positions=512", 0.25),
    ],
)
def test_of_other_architectures_too(settings: str, tolerance: float) -> None:
    method, examples = SoftPromptTuning(8, lm=LMConfig(settings)), batch(even=False)
    assert planned(method, examples) == pytest.approx(kept_by(method, examples), rel=tolerance)


@pytest.mark.parametrize("length", [8, 60])  # shorter than rows, and longer: attention by copies, and by parts
def test_above_the_limit_of_explicit_scores(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout_module, __import__("lightning_prompts.memory_plan", fromlist=["x"])):
        monkeypatch.setattr(module, "EXPLICIT_LIMIT", 1000)
    method, examples = SoftPromptTuning(length, lm=LM), batch(even=False)
    assert planned(method, examples) == pytest.approx(kept_by(method, examples), rel=0.1)


def test_with_gradient_checkpointing() -> None:
    lm = replace(LM, gradient_checkpointing=True)
    plain, less = SoftPromptTuning(8, lm=LM), SoftPromptTuning(8, lm=lm)
    examples = batch(even=False)
    assert planned(less, examples) < 0.7 * planned(plain, examples)
    # One layer at a time is made again in the backward pass; until then, layers' inputs are all that is kept.
    shape = LMShape.of(lm)
    rows = [shape.encoder.row(example, 8, with_end=True) for example in examples]
    packed = Packed.of(rows, less.memory_estimate(shape, 12))
    inputs = packed.tokens * 4 * (shape.layers + 1) * shape.width
    assert kept_by(less, examples) == pytest.approx(inputs + packed.logits * shape.vocabulary * 4, rel=0.1)


# --- weights, prompts, optimisers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_model(name: str, dtype: str) -> None:
    config = LMConfig(SHAPES[name], dtype=dtype)  # type: ignore[arg-type]
    model, _ = load_model(config)
    assert LMShape.of(config).weight_bytes() == sum(value.nbytes for value in model.parameters())


def test_quantised_weights() -> None:
    config = LMConfig(TINY.replace("hidden_size=32", "hidden_size=64"), quantization="int8")
    model, _ = load_model(config)
    assert LMShape.of(config).weight_bytes() == pytest.approx(
        sum(value.nbytes for value in model.parameters()), rel=0.02
    )


TRAINED: dict[str, Callable[[], PromptMethod]] = {
    **METHODS,
    "relaxed": lambda: RelaxedPromptTuning(6, lm=LM),
    "prefix with a network": lambda: PrefixTuning(8, lm=LM),
    "projected": lambda: RelaxedPromptTuning(6, Projected(), lm=LM),
    "search": lambda: HardPromptSearch(None, FromText(" one two"), top_k=8, filter=False, lm=LM),
    "refiner of scores": lambda: RefinerTuning(6, TransformerRefiner(8, 1, 2), estimator=GumbelSoftmax(), lm=LM),
    "reinforce": lambda: ReinforceRefiner(support=TopK(20), lm=LM),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_is_counted(name: str) -> None:
    method = TRAINED[name]()
    memory_estimate = method.memory_estimate(LMShape.of(method.lm_config), 4)
    method.configure_model()
    assert memory_estimate.trained == sum(parameter.numel() for parameter in method.trainable_parameters())


def test_optimisers_differ() -> None:
    kinds = {torch.optim.AdamW: 2, torch.optim.SGD: 0, torch.optim.Adagrad: 1}
    for kind, numbers in kinds.items():
        assert optimizer_state(SoftPromptTuning(8, lm=LM, optimizer=lambda p, kind=kind: kind(p, lr=0.1))) == numbers
    assert optimizer_state(FixedPrompt("x", LM)) == 0


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1 << 28, 257 * 56])
@pytest.mark.parametrize("labels", [(("1",), ("10",), ("102",)), (("a b", "c"), ("d",))])
def test_the_plan_is_what_scoring_classes_packs(
    labels: tuple[tuple[str, ...], ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prompts.lm.labels.MOST_LOGITS", most)
    method = SoftPromptTuning(8, lm=LM)
    method.configure_model()
    examples = [
        replace(example, end=".", labels=labels, answer=None, reference=None) for example in batch(12, even=False)
    ]
    passes: list[tuple[int, int]] = []
    real = method.lm.logits

    def logits(embeddings: torch.Tensor, layout: Any, spots: torch.Tensor) -> torch.Tensor:
        passes.append((len(embeddings), len(spots)))
        return real(embeddings, layout, spots)

    monkeypatch.setattr(method.lm, "logits", logits)
    method.label_scores(examples, method.current_prompt())
    shape = LMShape.of(method.lm_config)
    packed = Packed.of_classes(shape, examples, method.memory_estimate(shape, len(examples)))
    assert (packed.tokens, packed.logits) == passes[0]
    assert len(passes) == (1 if most == 1 << 28 else 2)


def test_many_classes_are_in_the_plan() -> None:
    many = [replace(example, end=".", labels=tuple((str(n),) for n in range(40))) for example in batch(12)]
    free, classes = (make_plan(SoftPromptTuning(8, lm=LM), [batch(12)], [given]) for given in (batch(12), many))
    logits = 12 * (1 + 30 * (3 + 2) + 7 * (2 + 1))  # with a space and without; 1, 2 and 3 begin others
    assert classes.total("evaluation") > max(free.total("evaluation"), 2 * 4 * 257 * logits)
    assert classes.total("training") == free.total("training")


# --- the plan as a whole ----------------------------------------------------------------------------------------------


def test_seven_billion_without_weights() -> None:
    method = SoftPromptTuning(20, lm=LMConfig(SEVEN_BILLION, dtype="bfloat16"))
    plan = make_plan(method, [batch(32)], [batch(32)])
    assert plan.of("LM weights") == pytest.approx(13.48e9, rel=0.01)  # Llama 2 7B: 6.74 billion, two bytes each
    assert plan.of("trained parameters") == 20 * 4096 * 4
    assert plan.of("optimiser") == 2 * 20 * 4096 * 4
    assert plan.peak == max(plan.total("training"), plan.total("evaluation"))
    assert plan.total("training") > plan.of("LM weights") + plan.of("activations kept")
    for quantization, each in (("int8", 1.0), ("nf4", 0.5625)):
        config = LMConfig(SEVEN_BILLION, dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]
        small = make_plan(SoftPromptTuning(20, lm=config), [batch(32)], [batch(32)])
        linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert small.of("LM weights") == pytest.approx(13.48e9 - linear * (2 - each), rel=0.01)


def test_more_rows_and_processes() -> None:
    method = SoftPromptTuning(20, lm=LMConfig(SEVEN_BILLION, dtype="bfloat16"))
    small, large = (make_plan(method, [batch(count)], [batch(count)]) for count in (32, 128))
    assert large.of("activations kept") > 3 * small.of("activations kept")
    assert large.of("keys and values") > 3 * small.of("keys and values")
    eight = make_plan(method, [batch(128)], [batch(128)], Processes(8, 1, 1))
    assert eight.of("LM weights") == large.of("LM weights")
    assert eight.of("activations kept") < 0.3 * large.of("activations kept")
    heads = make_plan(method, [batch(128)], [batch(128)], Processes(1, 1, 8))
    assert heads.of("LM weights") < 0.2 * large.of("LM weights")
    assert heads.of("activations kept") < 0.5 * large.of("activations kept")
    pieces = make_plan(method, [batch(128)], [batch(128)], Processes(8, 8, 1))
    assert pieces.of("LM weights") == pytest.approx(heads.of("LM weights"), rel=1e-3)
    assert pieces.of("two gathered layers") > 0


def test_all_lms_of_a_network_count_once() -> None:
    small, large = (LMConfig(f"random:llama,{WIDE.replace('layers=3', f'layers={count}')}") for count in (2, 30))
    there = LMConfig("big", server=Server("http://localhost:8000/v1"))
    weights = {config: LMShape.of(config).weight_bytes() for config in (LM, small, large)}

    def plan(*layers: LMConfig | None, **settings: Any) -> MemoryPlan:
        method = DeepLanguageNetwork([LanguageLayer("Go.", lm=lm) for lm in layers], lm=LM, **settings)
        return make_plan(method, [batch()], [batch()])

    alone = plan(None)
    assert alone.of("LM weights") == plan(None, None, proposer=LM).of("LM weights") == weights[LM]
    several = plan(small, None, proposer=large)
    assert several.of("LM weights") == sum(weights.values())
    assert several.of("keys and values") == pytest.approx(10 * alone.of("keys and values"))
    assert plan(small, None, proposer=small).of("LM weights") == weights[LM] + weights[small]
    paid = plan(None, proposer=there)
    assert (paid.peak, paid.of("LM weights")) == (alone.peak, weights[LM])
    assert "big: behind http://localhost:8000/v1, takes no memory here" in [item.name for item in paid.items]
    assert plan(small, there).of("LM weights") == weights[LM] + weights[small], "the proposer is the default LM"
    nothing = plan(there, proposer=there)
    assert (nothing.peak, len(nothing.items)) == (0, 1)


def test_heads_that_cannot_be_shared_evenly() -> None:
    wide = LMConfig(f"random:llama,{WIDE.replace('key_value_heads=2', 'key_value_heads=1')}")
    methods = SoftPromptTuning(8, lm=wide), DeepLanguageNetwork(lm=LM, proposer=wide)
    for method in methods:
        with pytest.raises(
            UserError, match=r"has 1 key/value heads, which cannot be split evenly over 2 processes; set "
        ):
            make_plan(method, [batch()], [batch()], Processes(1, 1, 2))
    assert make_plan(SoftPromptTuning(8, lm=LM), [batch()], [batch()], Processes(1, 1, 2)).peak > 0


def test_nothing_to_plan_for() -> None:
    with pytest.raises(UserError, match="no examples to plan for"):
        make_plan(SoftPromptTuning(20, lm=LM), [], [])


CONFIG = f"""
model:
  class_path: SoftPromptTuning
  init_args: {{length: 4, lm: {{name: "{SEVEN_BILLION}", dtype: bfloat16}}}}
data: {{class_path: Antonyms}}
trainer:
  accelerator: gpu
  devices: 8
  num_nodes: 2
  strategy: {{class_path: LMParallel, init_args: {{data_parallel_size: 2, tensor_parallel_size: 8}}}}
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert commands.run(["plan", "-c", "config.yaml", "--model.length", "8"]) == 0
    shown = capsys.readouterr().out
    assert "SoftPromptTuning on random:llama" in " ".join(shown.split())
    assert re.search(r"LM weights \(bfloat16\)\s*│\s*1\.\d+ GB", shown)
    assert re.search(r"together\s*│\s*\d+\.\d+ GB", shown)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "nothing is written"


@pytest.mark.parametrize(
    ("devices", "nodes", "rows"),
    [
        ("2", "1", 16),
        ("[0, 1]", "1", 16),
        ("0,1,2,", "1", 11),
        ("-1", "1", 32),
        ("auto", "4", 8),
        ("0", "1", 0),
        ("2", "0", 0),
    ],
)
def test_the_rows_of_each_process(
    devices: str, nodes: str, rows: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = [
        "plan",
        "--model",
        "SoftPromptTuning",
        "--model.lm.name",
        TINY,
        "--data",
        "Antonyms",
        "--data.batch_size",
        "32",
        "--data.max_train_examples",
        "64",
        f"--trainer.devices={devices}",
        f"--trainer.num_nodes={nodes}",
    ]
    assert commands.run(words) == (0 if rows else 1)
    said = capsys.readouterr()
    assert f"{rows} rows" in said.out if rows else "must be at least 1, got 0" in said.err


def test_rows_beyond_the_context_window_are_refused_as_in_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.lm.name", TINY, "--data", "Antonyms"]
    for method in ("SoftPromptTuning", "PrefixTuning"):
        assert commands.run(["plan", "--model", method, "--model.length", "255", *words]) == 1
        assert "prompt (255), text and answer are" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", "hello", "# nothing"])
def test_a_file_without_settings_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert commands.run(["plan", "-c", str(tmp_path / "x.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'x.yaml'} holds no settings")


def test_planning_gives_no_warnings_about_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert commands.run(["plan", "--model", "SoftPromptTuning", "--model.lm.name", TINY, "--data", "Antonyms"]) == 0
    assert not [warning for warning in recwarn if "GPU" in str(warning.message)]


def test_a_wrong_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("random:llama", "random:lama"))
    assert commands.run(["plan", "-c", str(tmp_path / "config.yaml")]) == 1
    assert capsys.readouterr().err.startswith("error: model 'random:lama")
    assert commands.run(["plan", "-c", str(tmp_path / "config.yaml"), "--model.lenght", "3"]) == 2
    assert "length" in capsys.readouterr().err


def test_the_plan_is_what_the_real_model_takes() -> None:
    """Peak memory of the 135M model's training, in a process of its own, is within a fifth of the plan."""
    path = ROOT / "experiments" / "benchmarks" / "memory_plan.py"
    benchmark = runpy.run_path(str(path))
    done = subprocess.run(
        [sys.executable, str(path), "--one", "soft", "16"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **benchmark["ENVIRONMENT"]},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < found["planned"] / found["peak"] < 1.2


def test_errors_of_a_class_are_shown_without_the_parser_s_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", "DeepLanguageNetwork", "--model.lm.name", SEVEN_BILLION, "--data", "Antonyms"]
    assert commands.run([*words, "--model.layers=[]"]) == 1
    assert capsys.readouterr().err.startswith("error: layers is empty; give at least one layer")
    Path("config.yaml").write_text("model: &a {class_path: SoftPromptTuning, init_args: *a}\n")
    assert commands.run(["plan", "-c", "config.yaml"]) == 1
    assert capsys.readouterr().err.startswith("error: a config or data file is nested too deeply, or holds itself")
