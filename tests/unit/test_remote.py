"""An LM behind a server: a real process on this machine, which serves the same models that are loaded here."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_prompts.callbacks import Budget
from lightning_prompts.cli import run
from lightning_prompts.dln.cached_lm import CachedLM, CheckpointedCache
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import GivenAnswer, Posterior, PriorTemplate
from lightning_prompts.dln.proposals import Crossover, InducedInstructions, Paraphrases, Reflection, RuleRewrites
from lightning_prompts.dln.sharpening import UniformWeights
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, RemoteLM, Sampling, Server, label_scores
from lightning_prompts.lm.remote import literal
from lightning_prompts.lm.server_cache import ServerCache
from lightning_prompts.methods import Ape, Capo, ChainOfThought, FewShot, FixedPrompt, Gepa, SoftPromptTuning
from lightning_prompts.objectives.rewards import TokenF1
from lightning_prompts.types import Example
from support.commands import code
from support.dln_toys import FORWARD, PROPOSALS, YES_NO, Toy, cached_of, examples, network, trainer
from support.models import TINY
from support.references import alike
from support.server import ServerProcess

LOCAL = LMConfig(f"{TINY},max_position_embeddings=2048")
SECRET = "sk-a-very-secret-key-0123456789"


def config(server: ServerProcess, name: str = "tiny", **settings: object) -> LMConfig:
    return LMConfig(name, server=Server(server.url, **{"timeout": 60.0, **settings}))  # type: ignore[arg-type]


def remote(server: ServerProcess, folder: Path, name: str = "tiny", **settings: object) -> RemoteLM:
    return RemoteLM(config(server, name, **settings), ServerCache(folder / "answers"))


def cached(lm: RemoteLM) -> CachedLM:
    return CachedLM(lm, lm.identity(lm.config), CheckpointedCache())


@pytest.fixture(scope="module")
def local() -> FrozenLM:
    """The model that the server calls ``tiny``."""
    return FrozenLM.load(LOCAL)


@pytest.fixture(scope="module")
def _locked() -> Iterator[ServerProcess]:
    process = ServerProcess(SECRET)
    yield process
    process.close()


@pytest.fixture
def locked(_locked: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    """A server that wants a key, which is in the environment."""
    monkeypatch.setenv("TESTS_API_KEY", SECRET)
    _locked.set(clear=True)
    return _locked


QUESTIONS = [
    Example("The capital of France is", "", None, stop=r"\n"),
    Example("One, two, three,", " four, five,", None, stop=r"\.|\n\s*\n"),
    Example("Name a colour.", "", None, stop=r"\n\n", chat=True),
    Example("Say", " hello.", None, stop=r"!", chat=True, system="You are brief."),
]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_model_s_own(real: FrozenLM, server: ServerProcess, tmp_path: Path) -> None:
    there = remote(server, tmp_path, real.name)
    expected = [real.generate([example], "", 6)[0] for example in QUESTIONS]
    assert there.generate(QUESTIONS, "", 6) == expected
    assert len(set(expected)) == len(QUESTIONS)
    assert "" not in expected
    assert {request["path"] for request in server.requests} == {"/v1/completions", "/v1/chat/completions"}
    slot = [replace(QUESTIONS[1], after=" five,")]
    assert there.generate(slot, " four,", 6) == [expected[1]]


def test_a_stop_within_leading_white_space_is_none(local: FrozenLM, server: ServerProcess, tmp_path: Path) -> None:
    """Where the text begins with its stop, a server that is told of it writes nothing."""
    example = Example("One, two,", "", None, stop="\n")

    def drawn(seeds: range) -> list[str]:
        rows = [local.encoder.row(example, 0)] * len(seeds)
        ids = local.generate_tokens(rows, torch.empty(0, local.width), 6, None, Sampling(1.0, seeds))
        return [local.text(row, special=False) for row in ids]

    texts = (
        (seed, text)
        for first in itertools.count(0, 250)
        for seed, text in enumerate(drawn(range(first, first + 250)), first)
    )
    seed = next(seed for seed, text in texts if text.startswith("\n") and text.strip())
    sampling = Sampling(1.0, [seed])
    (text,) = remote(server, tmp_path).generate([example], "", 6, sampling)
    assert text
    assert [text] == local.generate([example], "", 6, Sampling(1.0, [seed]))
    assert [request["body"].get("stop") for request in server.requests] == [["\n"], None]


def test_patterns_that_are_texts() -> None:
    assert [literal(stop) for stop in (r"\n", r"\n\n", "\n", "END")] == ["\n", "\n\n", "\n", "END"]
    assert {literal(stop) for stop in (r"\n\s*\n", r"[^\w'-]", r"a|b", "", r"\.", "x?")} == {None}


def test_draws_are_the_model_s_own_and_each_by_itself(local: FrozenLM, server: ServerProcess, tmp_path: Path) -> None:
    there, same = remote(server, tmp_path), [replace(QUESTIONS[0], stop=r"\n\s*\n")] * 6
    seeds = [3, 4, 5, 6, 7, 3]
    drawn = there.generate(same, "", 10, Sampling(1.3, seeds))
    assert drawn == local.generate(same, "", 10, Sampling(1.3, seeds))
    assert len(set(drawn)) == 5, "several draws of the same text stay several"
    assert len(server.requests) == 5
    assert remote(server, tmp_path).generate(same[:2], "", 10, Sampling(1.3, [4, 2**40 + 5])) == [drawn[1], drawn[2]]
    assert len(server.requests) == 5, "known from the disk; a seed's upper bits are left to our own models"
    others = [there.generate(same[:1], "", 10, Sampling(0.7, [3])), there.generate(same[:1], "", 9, Sampling(1.3, [3]))]
    assert len(server.requests) == 7, f"other settings are other questions: {others}"


def test_parameters_go_along_and_null_takes_one_out(server: ServerProcess, tmp_path: Path) -> None:
    there, asked = remote(server, tmp_path, parameters={"top_p": 0.9, "temperature": None}), QUESTIONS[1:2]
    there.generate(asked, "", 4)
    (request,) = server.requests
    assert request["body"] == {"model": "tiny", "prompt": "One, two, three, four, five,", "max_tokens": 4, "top_p": 0.9}
    remote(server, tmp_path, parameters={"top_p": 0.8, "temperature": None}).generate(asked, "", 4)
    assert len(server.requests) == 2, "the cache knows the difference"


@pytest.mark.parametrize("stop", [None, ["nowhere in it"]])
def test_a_stop_in_the_parameters_replaces_that_of_the_template(
    stop: list[str] | None, server: ServerProcess, tmp_path: Path
) -> None:
    """Reasoning models of OpenAI refuse any; the text ends at the template's all the same."""
    asked = [replace(QUESTIONS[0], stop="a")]
    expected = remote(server, tmp_path).generate(asked, "", 6)
    assert remote(server, tmp_path, parameters={"stop": stop}).generate(asked, "", 6) == expected
    assert [request["body"].get("stop") for request in server.requests][-1:] == [stop]
    assert server.requests[0]["body"]["stop"] == ["a"]


def test_draws_of_a_server_that_is_told_no_seed_stay_several(server: ServerProcess, tmp_path: Path) -> None:
    """Some servers know no seeds: what is asked in the same words is still asked for each draw, and kept for it."""
    same, sampling = [QUESTIONS[1]] * 3, Sampling(1.3, [3, 4, 5])
    texts = remote(server, tmp_path, parameters={"seed": None}).generate(same, "", 10, sampling)
    assert len(server.requests) == 3
    assert all("seed" not in request["body"] for request in server.requests)
    again = remote(server, tmp_path, parameters={"seed": None}).generate(same, "", 10, sampling)
    assert (again, len(server.requests)) == (texts, 3), "the same draws are known from the disk"
    remote(server, tmp_path, parameters={"seed": None}).generate(same[:1], "", 10, Sampling(1.3, [6]))
    assert len(server.requests) == 4, "another one is not"


def test_no_more_requests_at_once_than_allowed(server: ServerProcess, tmp_path: Path) -> None:
    server.set(slow=0.1)
    asked = [Example(f"{n} and", "", None) for n in range(9)]
    texts = remote(server, tmp_path, concurrency=3).generate(asked, "", 2)
    assert server.most_at_once == 3
    server.set(slow=0.0)
    assert remote(server, tmp_path / "new", concurrency=1).generate(asked, "", 2) == texts


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model_itself(local: FrozenLM, server: ServerProcess, tmp_path: Path) -> None:
    there = cached(remote(server, tmp_path, log_probs=True))
    here, prompts = cached_of(local), ["Say it.", "", "Answer!"]
    for calibrate in (False, True):
        there.calibrate = here.calibrate = calibrate
        expected = here.class_log_probs(examples(), prompts)
        assert torch.allclose(there.class_log_probs(examples(), prompts), expected, atol=1e-4)
    texts = [[" so", " because of it"], ["", " no"], [" x", " x"], [" it is", " é"]]
    expected = here.log_probs(examples(), prompts, texts)
    assert torch.allclose(there.log_probs(examples(), prompts, texts), expected, atol=1e-4)
    scores, wanted = (lm.label_scores(examples(), "Say it.") for lm in (there, here))
    assert torch.allclose(scores.log_probs, wanted.log_probs, atol=1e-4)
    assert scores.nll == pytest.approx(wanted.nll, abs=1e-4)
    count = len(server.requests)
    assert len({json.dumps(request["body"]) for request in server.requests}) == count == there.lm.usage.calls
    there.class_log_probs(examples(), prompts)
    assert len(server.requests) == count, "nothing is asked twice"


def test_labels_that_begin_alike_are_scored_with_their_ends(
    local: FrozenLM, server: ServerProcess, tmp_path: Path
) -> None:
    there, here = cached(remote(server, tmp_path, log_probs=True)), cached_of(local)
    for calibrate in (False, True):
        there.calibrate = here.calibrate = calibrate
        scores, wanted = (lm.label_scores(alike(), "Say it.") for lm in (there, here))
        assert torch.allclose(scores.log_probs, wanted.log_probs, atol=1e-4)
        assert scores.nll == pytest.approx(wanted.nll, abs=1e-4)
    asked = {request["body"]["prompt"].rpartition("Answer:")[2] for request in server.requests}
    assert {" 1\n", "10\n", " no way\n", " yes", "no"} <= asked
    assert not {" 1", "1", " yes\n"} & asked
    count = len(server.requests)
    with pytest.raises(
        UserError, match=r"^labels '1' and '10' begin alike, and nothing marks the end of a label; end the"
    ):
        there.label_scores(alike(""), "Say it.")
    assert len(server.requests) == count


def test_without_log_probabilities_it_says_so(server: ServerProcess, tmp_path: Path) -> None:
    silent = cached(remote(server, tmp_path))
    with pytest.raises(UserError, match="gives no log-probabilities of given texts, which class scores") as caught:
        silent.class_log_probs(examples(), ["Go."])
    assert "\n" not in str(caught.value)
    assert server.requests == []
    server.set(log_probs=False)
    liar = cached(remote(server, tmp_path, log_probs=True))
    with pytest.raises(UserError, match=r"answers without log-probabilities.*server\.log_probs: false"):
        liar.log_probs(examples(), ["Go."], [[" so"]] * 4)
    with pytest.raises(UserError, match=r"row 0: .*in a chat"):
        liar.log_probs([replace(example, chat=True) for example in examples()], ["Go."], [[" so"]] * 4)


def test_a_server_scores_texts_and_no_chats(tmp_path: Path) -> None:
    there, chat = Server("http://127.0.0.1:9/v1", log_probs=True), [replace(examples()[0], chat=True)]
    lm = RemoteLM(LMConfig("x", server=there), ServerCache(tmp_path))
    assert (lm.can_score(examples()), lm.can_score(chat)) == (True, False)
    assert lm.answer_nll(chat, "Say it.") == [None]
    silent = RemoteLM(LMConfig("x", server=replace(there, log_probs=False)), ServerCache(tmp_path))
    assert not silent.can_score(examples())


def test_what_is_no_log_probability_is_not_taken_for_one(server: ServerProcess, tmp_path: Path) -> None:
    lm = remote(server, tmp_path, log_probs=True)
    said: list[float] = []
    lm._echo = lambda text: (list(text), [-1.0] * (len(text) - len(said)) + said)  # type: ignore[method-assign]
    said[:] = [0.05, -0.5]  # a rounding error is none of a probability above 1
    asked: tuple[list[Example], list[str], list[list[str]]] = ([Example("context", "", None)], [""], [[" ab"]])
    assert lm.text_scores(*asked) == [[[(-1.5, 3)]]]
    said[:] = [0.11, -0.5]
    with pytest.raises(UserError, match=r"gives log-probabilities above 0 \(0\.11\), which cannot be; set server"):
        lm.text_scores(*asked)


def echoing(folder: Path, answer: Callable[[list[str]], dict[str, object]]) -> RemoteLM:
    """A model behind a server that answers the tokens of a request, which are words."""
    lm = RemoteLM(LMConfig("x", server=Server("http://127.0.0.1:9/v1", log_probs=True)), ServerCache(folder))
    lm._send = lambda path, body: answer(re.findall(" ?[^ ]+", body["prompt"]))  # type: ignore[method-assign]
    return lm


def echo(tokens: Sequence[str], values: Sequence[float | None], **more: object) -> dict[str, object]:
    return {"choices": [{"text": "", "logprobs": {"tokens": tokens, "token_logprobs": values}}], **more}


def log_probs_of(tokens: Sequence[str]) -> list[float | None]:
    return [None, *(-float(place) for place in range(1, len(tokens)))]


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("first", [[], ["<s>"]])
@pytest.mark.parametrize("writes", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("text", [" b c d", " a a"])
def test_the_token_that_a_server_writes_is_not_scored(
    text: str, writes: tuple[bool, bool], first: list[str], usage: bool, tmp_path: Path
) -> None:
    """With and without ``usage``, and whether a token comes after the text, after its context or not."""

    def answer(own: list[str]) -> dict[str, object]:
        tokens = [*first, *own, *([" a"] if writes[len(own) > 1] else [])]
        more = {"usage": {"prompt_tokens": len(first) + len(own)}} if usage else {}
        return echo(tokens, log_probs_of(tokens), **more)

    places = range(len(first) + 1, len(first) + 1 + len(text.split()))
    scores = echoing(tmp_path, answer).text_scores([Example("a", "", None)], [""], [[text]])
    assert scores == [[[(-sum(places), len(places))]]]


@pytest.mark.parametrize(
    "bad",
    [
        lambda tokens: {"choices": [{"text": "x"}]},
        lambda tokens: {"choices": [{"text": "x", "logprobs": {"tokens": tokens}}]},
        lambda tokens: echo(["x"], [-0.5], usage={"prompt_tokens": len(tokens)}),  # as if echo were false
        lambda tokens: echo(tokens, [None]),
        lambda tokens: echo(tokens, [None] * len(tokens)),
        lambda tokens: echo(tokens, [None, *[0.5] * (len(tokens) - 1)]),
    ],
)
def test_answers_without_log_probabilities_are_not_kept(
    bad: Callable[[list[str]], dict[str, object]], tmp_path: Path
) -> None:
    """Otherwise another server at the address, which the error advises, would never be asked."""
    asked: tuple[list[Example], list[str], list[list[str]]] = ([Example("a", "", None)], [""], [[" b c"]])
    lm = echoing(tmp_path, bad)
    with pytest.raises(UserError, match="log-probabilities"):
        lm.text_scores(*asked)
    assert lm.usage.calls_remote == 1, "it is paid for"
    assert list(tmp_path.rglob("*.json")) == []
    body = {"prompt": "a b c", "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}
    request = {"url": "http://127.0.0.1:9/v1/completions", "body": {"model": "x", **body}}
    choice = bad(["a", " b", " c"])["choices"][0]  # type: ignore[index]
    ServerCache(tmp_path).put(request, {"usage": {}, **choice})  # as earlier versions did
    good = echoing(tmp_path, lambda tokens: echo(tokens, log_probs_of(tokens)))
    assert good.text_scores(*asked) == [[[(-3.0, 2)]]]
    assert echoing(tmp_path, bad).text_scores(*asked) == [[[(-3.0, 2)]]], "a good one is kept"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_that_pass_cost_a_little_time(server: ServerProcess, tmp_path: Path) -> None:
    expected = remote(server, tmp_path / "calm").generate(QUESTIONS[:2], "", 5)
    server.set(clear=True, faults=["500", "429", "drop", "503", "garbage"])
    there = remote(server, tmp_path / "storm", concurrency=1)
    assert there.generate(QUESTIONS[:2], "", 5) == expected
    assert len(server.requests) == 7
    assert there.usage.calls_remote == 2
    answered = [request["usage"] for request in server.requests if "usage" in request]
    assert there.usage.tokens_remote == there.tokens_forwarded == sum(sum(usage.values()) for usage in answered)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", r"fails with 500 in 2 tries: .*this was ordered.*look at the server's own log"),
        ("429", r"too many requests \(429\) in 2 tries.*lower server\.concurrency \(8\)"),
        ("drop", r"cannot be reached in 2 tries \(.*start the server, or correct server\.base_url"),
        ("slow", r"did not answer within 1 s in 1 tries; raise server\.timeout"),
        ("garbage", r"answered 2 times with something that is no JSON: .*check server\.base_url"),
        ("html", r"no JSON: .*Bad gateway.*check server\.base_url"),
        ("empty", r"answered without a text: .*check server\.base_url"),
        ("400", r"refuses a request \(400\): .*this was ordered.*server\.parameters"),
    ],
)
def test_faults_that_stay_are_one_line(fault: str, message: str, server: ServerProcess, tmp_path: Path) -> None:
    slow = fault == "slow"
    server.set(always=fault, slow=1.3 if slow else 0.0)
    there = remote(server, tmp_path, retries=0 if slow else 1, timeout=1.0 if slow else 60.0)
    begun = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        there.generate(QUESTIONS, "", 4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.monotonic() - begun < 15
    assert list((tmp_path / "answers").rglob("*.json")) == [], "no fault is kept"
    time.sleep(0.5 if slow else 0.0)  # for what is under way
    server.set(clear=True)
    assert len(there.generate(QUESTIONS, "", 4)) == 4, "the same object goes on once all is well"


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ('{"message": {"content": "half \\ud83d of it"}}', "half ? of it"),  # which no file can hold
        ('{"message": {"content": null}, "finish_reason": "length"}', ""),
        ('{"message": {"role": "assistant"}}', ""),
        ('{"message": {"content": [{"type": "text", "text": "parts"}]}}', None),
        ('{"message": "text"}', None),
    ],
)
def test_what_is_said_is_a_text_or_nothing(
    choice: str, text: str | None, server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.set(said=f'{{"choices": [{choice}], "usage": {{"prompt_tokens": -3, "completion_tokens": 2}}}}')
    there = remote(server, tmp_path)
    if text is None:
        with pytest.raises(UserError, match="answered without a text"):
            there.generate([QUESTIONS[2]], "", 4)
        return
    assert there.generate([QUESTIONS[2]], "", 4) == there.generate([QUESTIONS[2]], "", 4) == [text]
    assert len(server.requests) == 1
    assert there.tokens_forwarded == 2
    assert caplog.text.count("used up its 4 tokens without a word") == ("length" in choice)
    assert there.generate([replace(QUESTIONS[2], before="half \ud83d of one")], "", 4) == [text]


def test_nobody_there(tmp_path: Path) -> None:
    there = RemoteLM(LMConfig("x", server=Server("http://127.0.0.1:9/v1", retries=0)), ServerCache(tmp_path))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/completions \(x\) cannot be reached in 1 tries"):
        there.generate(QUESTIONS[:1], "", 4)


def test_what_is_not_there_is_named(server: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model 'tinny'; did you mean tiny\?"):
        remote(server, tmp_path, "tinny").generate(QUESTIONS[:1], "", 4)
    server.set(chat_only=True)
    with pytest.raises(UserError, match=r"has chats only; set data\.chat: true"):
        remote(server, tmp_path).generate(QUESTIONS[:1], "", 4)
    wrong = RemoteLM(LMConfig("tiny", server=Server(server.url.removesuffix("/v1"))), ServerCache(tmp_path))
    with pytest.raises(UserError, match=r"check server\.base_url, which mostly ends in /v1"):
        wrong.generate(QUESTIONS[:1], "", 4)


def test_an_interrupted_wait_ends_at_once(server: ServerProcess, tmp_path: Path) -> None:
    """As a second Ctrl-C has it: what is under way is not waited for."""
    server.set(slow=30.0)
    there = remote(server, tmp_path, concurrency=2)
    main = threading.main_thread().ident

    def interrupt() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), 2)

    begun = time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        there.generate(QUESTIONS, "", 4)
    assert time.monotonic() - begun < 10
    left = [thread for thread in threading.enumerate() if thread.ident != main and not thread.daemon]
    assert left == [], "nothing holds up the end of the process"


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_line_end_behind_the_key_is_none_of_it(
    locked: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTS_API_KEY", f"{SECRET}\r\n")
    there = remote(locked, tmp_path, api_key_variable="TESTS_API_KEY")
    assert len(there.generate([QUESTIONS[2]], "", 2)) == 1
    for key in (f"{SECRET}\n{SECRET}", f"{SECRET}é"):
        monkeypatch.setenv("TESTS_API_KEY", key)
        with pytest.raises(UserError, match="TESTS_API_KEY is no key") as error:
            remote(locked, tmp_path, api_key_variable="TESTS_API_KEY").generate([QUESTIONS[0]], "", 2)
        assert SECRET not in str(error.value)


def test_the_key_is_nowhere(
    locked: ServerProcess,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    variable = ["--model.proposer.server.api_key_variable", "TESTS_API_KEY", "--seed_everything"]
    with caplog.at_level(logging.DEBUG):
        assert run(command(locked, tmp_path / "run", *variable, "0")) == 0
        assert len(locked.requests) > 0
        monkeypatch.setenv("TESTS_API_KEY", SECRET[::-1])
        assert run(command(locked, tmp_path / "wrong", *variable, "5")) == 1, (
            "the server repeats the key that it is sent"
        )
    told = capfd.readouterr()
    assert "refuses the key (401); check the key in the environment variable TESTS_API_KEY" in told.err
    monkeypatch.delenv("TESTS_API_KEY")
    assert run(command(locked, tmp_path / "none", *variable, "0")) == 1
    assert "the environment variable TESTS_API_KEY is not set" in capfd.readouterr().err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files)
    assert any(path.name == "last.ckpt" for path in files)
    assert any("remote" in path.parts for path in files)
    for key in (SECRET, SECRET[::-1]):
        assert key not in told.out + told.err + caplog.text
        for path in files:
            assert key.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("method", ["DeepLanguageNetwork", "Ape"])
def test_only_training_needs_the_proposer(
    method: str,
    locked: ServerProcess,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was found with a paid server is measured and taken home without its key, and without its client."""
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    folder = tmp_path / "run"
    words = command(locked, folder, "--model.proposer.server.api_key_variable", "TESTS_API_KEY", method=method)
    assert run(words) == 0
    asked, kept = len(locked.requests), (folder / "prompts.jsonl").read_bytes()
    assert asked > 0
    monkeypatch.delenv("TESTS_API_KEY")
    assert run([*words, "--overwrite", "true"]) == 1
    assert "the environment variable TESTS_API_KEY is not set" in capfd.readouterr().err
    assert (folder / "prompts.jsonl").read_bytes() == kept, "told before the run is replaced"
    monkeypatch.setitem(sys.modules, "openai", None)
    assert run(["test", "-c", str(folder / "config.yaml"), "--ckpt_path", "best"]) == 0
    assert run(["export", str(folder), "--format", "text", "--examples", "2"]) == 0
    assert len(locked.requests) == asked
    assert run([*words, "--overwrite", "true"]) == 1
    assert "a server needs the package openai" in capfd.readouterr().err


def test_a_server_without_a_variable_for_its_key(locked: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refuses the key \(401\); name the environment variable .*api_key_variable"):
        remote(locked, tmp_path).generate(QUESTIONS[:1], "", 4)
    there = remote(locked, tmp_path, api_key_variable="TESTS_API_KEY")
    assert there.generate(QUESTIONS[:1], "", 4)
    locked.set(always="400")
    there._key = "this was ordered"  # as if the server's words held it
    with pytest.raises(UserError, match=r"\[key\]") as caught:
        there.generate(QUESTIONS[1:2], "", 4)
    assert "this was ordered" not in str(caught.value)
    assert caught.value.__cause__ is None


# --- the cache --------------------------------------------------------------------------------------------------------


def test_half_a_file_is_asked_for_again(
    server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = remote(server, tmp_path).generate(QUESTIONS[:3], "", 4)
    one, two, three = sorted((tmp_path / "answers").rglob("*.json"))
    whole = one.read_text()
    one.write_text(whole[: len(whole) // 2])
    two.write_bytes(b"\xff\x00")
    three.write_text(whole)  # the answer to another question
    with caplog.at_level(logging.WARNING):
        assert remote(server, tmp_path).generate(QUESTIONS[:3], "", 4) == expected
    assert len(server.requests) == 6
    assert len(caplog.records) == 3
    assert all(str(tmp_path) in record.getMessage() and "\n" not in record.getMessage() for record in caplog.records)
    assert one.read_text() == whole
    assert remote(server, tmp_path).generate(QUESTIONS[:3], "", 4) == expected
    assert len(server.requests) == 6


def test_a_cache_that_cannot_be_written(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be kept in .*LIGHTNING_PROMPTS_CACHE.*server\.cache to false"):
        remote(server, tmp_path).generate(QUESTIONS[:1], "", 4)
    assert remote(server, tmp_path, cache=False).generate(QUESTIONS[:1], "", 4)


def keep_writing(folder: Path, name: str) -> None:
    cache = ServerCache(folder)
    for n in range(150):
        cache.put({"url": "u", "body": {"prompt": str(n % 7)}}, {"text": name * 5000})


def test_two_processes_share_a_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=keep_writing, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    cache, seen = ServerCache(tmp_path), set()
    while any(writer.is_alive() for writer in writers):
        for n in range(7):
            answer = cache.get({"url": "u", "body": {"prompt": str(n)}})
            if answer is not None:
                assert answer["text"] in ("a" * 5000, "b" * 5000)
                seen.add(answer["text"][0])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == {"a", "b"}
    assert caplog.records == []
    assert len(list(tmp_path.rglob("*"))) == 7 + len({path.parent for path in tmp_path.rglob("*.json")})


# --- runs -------------------------------------------------------------------------------------------------------------


def command(server: ServerProcess, folder: Path, *more: str, method: str = "DeepLanguageNetwork") -> list[str]:
    written = {"count": 4, "max_new_tokens": 8}
    own: dict[str, object] = {
        "DeepLanguageNetwork": {"proposals": [{"class_path": "LanguageModelProposals", "init_args": written}]},
        "Ape": {"induced": written, "paraphrases": written},
        "Gepa": {"reflection": {**written, "shown": 2}},
    }[method]
    proposer = {"name": "tiny", "server": {"base_url": server.url}}
    settings = {
        "model": {"class_path": method, "init_args": {"text": "Say.", "proposer": proposer, **own}},
        "data": {"class_path": "Hyperbaton", "init_args": {"train_size": 8, "val_size": 4, "test_size": 4}},
        "trainer": {
            "max_steps": 2,
            "max_epochs": -1,
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        },
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(json.dumps(settings))
    return [
        "fit",
        "-c",
        str(path),
        "--model.lm.name",
        LOCAL.name,
        "--data.batch_size",
        "4",
        "--trainer.default_root_dir",
        str(folder),
        *more,
    ]


@pytest.mark.parametrize("method", ["DeepLanguageNetwork", "Ape", "Gepa"])
def test_a_remote_proposer_from_the_command_line(
    method: str, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    results = []
    for name in ("first", "second"):
        assert run(command(server, tmp_path / name, method=method)) == 0
        rows = (tmp_path / name / "prompts.jsonl").read_text()
        results.append((rows, json.loads((tmp_path / name / "budget.json").read_text()), len(server.requests)))
    (rows, used, asked), (same, free, all_asked) = results
    assert rows == same, "drawn texts are the same ones"
    assert asked > 0
    assert all_asked == asked, "the cache makes the second run call nothing"
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    proposed = [
        row
        for line in rows.splitlines()
        if (row := json.loads(line))
        .get("kind", "")
        .endswith(("Proposals", "Instructions", "Paraphrases", "Reflection"))
    ]
    assert {row["step"] for row in proposed} == {1, 2}
    assert used["calls_remote"] == asked
    assert used["tokens_remote"] == sum(sum(request["usage"].values()) for request in server.requests)
    assert used["tokens"] == used["tokens_remote"] + used["tokens_without_gradient"]
    assert free["calls_remote"] == free["tokens_remote"] == 0
    assert free["tokens_without_gradient"] == used["tokens_without_gradient"] > 0


def test_a_resumed_run_asks_for_the_rest(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that dies in the second step ends the run in one line; it goes on where it was."""
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    assert run(command(server, tmp_path / "whole", "--model.proposer.server.cache", "false")) == 0
    per_step = len(server.requests) // 2
    server.set(clear=True)
    words = command(server, tmp_path / "run", "--model.proposer.server.retries", "0")
    server.set(faults=["ok"] * per_step, always="500")
    assert run(words) == 1
    assert "fails with 500 in 1 tries" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    server.set(clear=True)
    assert run([*words, "--ckpt_path", "last"]) == 0
    assert len(server.requests) == per_step
    results = [(tmp_path / name / "prompts.jsonl").read_text() for name in ("whole", "run")]
    assert results[0] == results[1]
    counts = [json.loads((tmp_path / name / "budget.json").read_text()) for name in ("whole", "run")]
    for name in ("tokens", "calls", "tokens_remote", "calls_remote", "steps"):
        assert counts[0][name] == counts[1][name]


def test_a_network_behind_a_server_learns_what_it_learns_here(server: ServerProcess, tmp_path: Path) -> None:
    """Hidden texts, class scores, likelihood rewards and posterior weights, all by a server, in one step."""
    found = []
    for name, lm in (("here", LOCAL), ("there", config(server, log_probs=True, cache=False))):
        posterior = Posterior(2, 0.0, [PriorTemplate(), GivenAnswer()])
        method = network(lm=lm, proposals=[RuleRewrites(2)], posterior=posterior, memory=0)
        trainer(tmp_path / name, 1).fit(method, Toy(size=2))
        trainer(tmp_path / name, 1).test(method, Toy(size=2), verbose=False)
        rows = [json.loads(line) for line in (tmp_path / name / "prompts.jsonl").read_text().splitlines()]
        predictions = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        found.append((rows, predictions))
        assert method.describe().splitlines()[1].startswith("tiny behind http://127" if name == "there" else "random:")
    (rows, predictions), (other, others) = found
    assert len(rows) == len(other) > 4
    for mine, its in zip(rows, other, strict=True):
        assert mine.pop("reward", 0) == pytest.approx(its.pop("reward", 0), abs=1e-4)
        assert mine == its
    for mine, its in zip(predictions, others, strict=True):
        assert mine.pop("nll") == pytest.approx(its.pop("nll"), abs=1e-4)
        assert mine == its


def test_ape_needs_no_log_probabilities(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in free text are compared; without log-probabilities there is no NLL, and nothing else is missing."""
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    found = []
    for name, lm in (
        ("here", LOCAL),
        ("silent", config(server, chat=False)),
        ("telling", config(server, chat=False, log_probs=True)),
    ):
        method = Ape("Say.", InducedInstructions(3, 1, 0.0, 8), Paraphrases(2, 0.0, 8), lm=lm, max_new_tokens=3)
        trainer(tmp_path / name, 2, 1).fit(method, Toy(labels=False, size=4))
        (metrics,) = trainer(tmp_path / name, 2).test(method, Toy(labels=False, size=4), verbose=False)
        rows = (tmp_path / name / "prompts.jsonl").read_text()
        found.append((rows, metrics["test/exact_match"], metrics.get("test/nll")))
    here, silent, telling = found
    assert here[:2] == silent[:2] == telling[:2]
    assert silent[2] is None
    assert telling[2] == pytest.approx(here[2], abs=1e-4)


@pytest.mark.parametrize("name", ["gepa", "capo"])
def test_evolution_of_free_text_needs_no_log_probabilities(
    name: str, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prompts.lm.server_cache.cache_root", lambda: tmp_path / "cache")
    rows = []
    for place, lm in (("here", LOCAL), ("there", config(server, chat=False))):
        method = {
            "gepa": Gepa(text="Say.", reflection=Reflection(2, 0.0, 8), reward=TokenF1(), lm=lm, max_new_tokens=3),
            "capo": Capo(
                "Say.",
                InducedInstructions(2, 1, 0.0, 8),
                Crossover(2, 0.0, 8),
                Paraphrases(2, 0.0, 8),
                2,
                2,
                0.0,
                lm=lm,
                max_new_tokens=3,
            ),
        }[name]
        trainer(tmp_path / place, 2, 1).fit(method, Toy(labels=False, size=4))
        lines = (tmp_path / place / "prompts.jsonl").read_text().splitlines()
        rows.append([{**json.loads(line), "tokens": None} for line in lines])  # a server's are estimated
    assert rows[0] == rows[1]
    assert len(rows[0]) > 4


def test_a_fixed_text_behind_a_server_is_ape_untrained(server: ServerProcess, tmp_path: Path) -> None:
    """The baseline of what is trained there."""
    found = []
    for method in (
        FixedPrompt("Say.", LOCAL, 3),
        Ape("Say.", lm=config(server, chat=False, cache=False), max_new_tokens=3),
    ):
        trainer(tmp_path, 2).test(method, Toy(labels=False, size=4), verbose=False)
        rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        found.append([(row["question"], row["generated"], row["correct"]) for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) == len(server.requests) == 4


UNTRAINED: dict[str, Callable[[LMConfig], FixedPrompt]] = {
    "fixed": lambda lm: FixedPrompt("Say.", lm, 3),
    "few": lambda lm: FewShot(2, "Say.", lm=lm, max_new_tokens=3),
    "chain": lambda lm: ChainOfThought(text="Say.", reasoning_tokens=5, lm=lm, max_new_tokens=3),
}


def measured(folder: Path, method: FixedPrompt, labels: bool) -> tuple[list[dict[str, object]], dict[str, float]]:
    """The rows and the metrics of a test."""
    (metrics,) = trainer(folder, 1).test(method, Toy(labels, size=4), verbose=False)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return rows, dict(metrics)


@pytest.mark.parametrize(
    ("name", "labels", "calibrate"),
    [*((name, labels, labels) for name in UNTRAINED for labels in (True, False)), ("fixed", True, False)],
)
def test_methods_without_training_do_the_same_behind_a_server(
    name: str, labels: bool, calibrate: bool, server: ServerProcess, tmp_path: Path
) -> None:
    found = [
        measured(tmp_path, UNTRAINED[name](replace(lm, calibrate_labels=calibrate)), labels)
        for lm in (LOCAL, config(server, log_probs=True, cache=False))
    ]
    (here, metrics), (there, others) = found
    assert len(here) == len(there) == 4
    assert all(("label" in row) == labels and ("hidden" in row) == (name == "chain") for row in there)
    for mine, its in zip(here, there, strict=True):
        assert mine.pop("nll") == pytest.approx(its.pop("nll"), abs=1e-4)
        assert mine == its
    assert others == pytest.approx(metrics, abs=1e-4)


@pytest.mark.parametrize("name", UNTRAINED)
@pytest.mark.parametrize("labels", [True, False])
def test_without_log_probabilities_classes_are_written(
    name: str, labels: bool, server: ServerProcess, tmp_path: Path
) -> None:
    method = UNTRAINED[name](config(server, cache=False))
    rows, metrics = measured(tmp_path, method, labels)
    assert not any(request["body"].get("logprobs") for request in server.requests)
    assert len(server.requests) == 4 * (2 if name == "chain" else 1)
    assert set(metrics) == {"test/exact_match", "test/examples"}
    expected = measured(tmp_path / "here", UNTRAINED[name](LOCAL), False)[0]
    for row, other in zip(rows, expected, strict=True):
        assert (row["generated"], row["nll"]) == (other["generated"], None)
        assert row["correct"] == (row["generated"] == row["answer"])


def test_calibration_without_log_probabilities_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    method = FixedPrompt("Say.", replace(config(server), calibrate_labels=True))
    with pytest.raises(UserError, match="gives no log-probabilities of given texts, which class scores"):
        measured(tmp_path, method, labels=True)
    assert server.requests == []


@pytest.mark.parametrize("log_probs", ["true", "false"])
def test_a_fixed_prompt_behind_a_server_from_the_command_line(
    log_probs: str, server: ServerProcess, tmp_path: Path
) -> None:
    words = [
        "test",
        "--model",
        "FixedPrompt",
        "--model.text",
        "Say.",
        "--model.max_new_tokens",
        "3",
        "--model.lm.name",
        "tiny",
        "--model.lm.server.base_url",
        server.url,
        "--model.lm.server.cache",
        "false",
        "--model.lm.server.log_probs",
        log_probs,
        "--data",
        "Hyperbaton",
        "--data.train_size",
        "4",
        "--data.val_size",
        "4",
        "--data.test_size",
        "6",
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    assert run(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/examples"] == 6
    assert ("test/nll" in metrics) == ("test/accuracy" in metrics) == (log_probs == "true")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())
    assert run(["export", str(tmp_path / "run"), "--format", "text"]) == 1


def test_work_that_processes_share_is_not_shared_again(server: ServerProcess, tmp_path: Path) -> None:
    """Each process would wait for results of texts that the others never ask for."""
    inside: list[bool] = []

    def alone(items: Sequence[object], work: Callable[[Sequence[object]], Sequence[object]]) -> list[object]:
        assert not inside
        inside.append(True)
        try:
            return list(work(items)) if items else []
        finally:
            inside.pop()

    for lm in (LOCAL, config(server, log_probs=True)):
        for labels in (True, False):
            method = Ape("Say.", lm=lm, max_new_tokens=3)
            method.map_across_ranks = alone  # type: ignore[method-assign]
            trainer(tmp_path, 2).test(method, Toy(labels, size=4), verbose=False)


def test_a_server_may_think_for_a_model_that_is_here(server: ServerProcess, tmp_path: Path) -> None:
    """Without log-probabilities: hidden texts that need not be weighed by their own likelihood, from a fixed prompt."""
    there = config(server, cache=False)
    layers = [LanguageLayer("Think.", max_new_tokens=5, learn=False, lm=there), LanguageLayer("Say.")]
    posterior = Posterior(2, templates=[PriorTemplate(), GivenAnswer()], sharpening=UniformWeights())
    settings = {"proposals": PROPOSALS[1:], "error_weight": 0.0}
    method = network(layers=layers, posterior=posterior, **settings)
    trainer(tmp_path, 1).fit(method, Toy())
    assert method.usage.calls_remote > 0
    assert method.usage.tokens_without_gradient > 0
    assert method.proposed()
    checkpoint = torch.load(tmp_path / "saved" / "step=1.ckpt", weights_only=True)
    assert checkpoint["lightning_prompts"]["hidden layers' model"] == "tiny"
    asked = len(server.requests)
    for changed in (
        {"layers": layers, "posterior": Posterior(2)},
        {"layers": [replace(layers[0], learn=True), layers[1]], "posterior": posterior},
        {"layers": [LanguageLayer("Think.", max_new_tokens=5), replace(layers[1], lm=there)], "posterior": posterior},
    ):
        with pytest.raises(UserError, match="gives no log-probabilities of given texts"):
            trainer(tmp_path / "refused", 1).fit(network(**changed, **settings), Toy())
    ape = Ape("Say.", lm=there)
    with pytest.raises(UserError, match="gives no log-probabilities of given texts, which class scores"):
        trainer(tmp_path / "refused", 1).fit(ape, Toy())
    assert len(server.requests) == asked, "before anything is paid for"


@pytest.mark.parametrize("layer", [0, 1])
def test_what_a_server_writes_is_not_exported(
    layer: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The top layer's LM or a hidden one's: told before weights are loaded."""
    there = {"name": "tiny", "server": {"base_url": "http://127.0.0.1:9/v1", "log_probs": True}}
    layers: list[dict[str, object]] = [{"prompt": "Think.", "learn": False}, {"prompt": "Say."}]
    layers[layer]["lm"] = there
    settings = {
        "model": {"class_path": "DeepLanguageNetwork", "init_args": {"layers": layers}},
        "data": {"class_path": "Hyperbaton", "init_args": {"train_size": 8, "val_size": 8, "test_size": 8}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "checkpoints" / "best.ckpt")
    monkeypatch.setattr(FrozenLM, "load", lambda config: pytest.fail(f"{config.name} was loaded"))
    for made in ("text", "peft"):
        assert run(["export", str(tmp_path), "--format", made]) == 1
        assert "error: tiny is behind a server, so its texts cannot be checked" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_a_budget_of_calls_ends_a_run_with_a_server(server: ServerProcess, tmp_path: Path) -> None:
    method = network(proposer=config(server, cache=False))
    fit = trainer(tmp_path, 50)
    budget = Budget(calls=150)
    fit.callbacks.append(budget)
    fit.fit(method, Toy())
    assert fit.global_step < 20
    assert 150 <= budget.used["calls"] < 150 + 2 * budget.used["calls"] / fit.global_step
    assert budget.used["calls_remote"] > 0


# --- what does not go together ----------------------------------------------------------------------------------------


def test_methods_with_gradients_refuse_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = LMConfig("x", server=Server("http://localhost:8000/v1"))
    with pytest.raises(
        UserError, match=r"works on the LM's vectors.*leave out model\.lm\.server, or take a method of texts"
    ):
        SoftPromptTuning(3, lm=there)
    for ask in (
        lambda prompt: RemoteLM(there).generate(QUESTIONS, prompt, 4),
        lambda prompt: RemoteLM(there).answer_nll(QUESTIONS, prompt),
        lambda prompt: label_scores(RemoteLM(there), examples(), prompt),
    ):
        with pytest.raises(
            UserError, match=r"^x is behind a server .*, which takes texts and no vectors or keys and va"
        ):
            ask(torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"is behind a server .*, which provides texts but no vectors"):
        FrozenLM.load(there)
    words = [
        "fit",
        "--model",
        "SoftPromptTuning",
        "--data",
        "Antonyms",
        "--model.lm.server.base_url",
        "http://localhost:8000/v1",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    assert code(*words) in (1, 2)
    told = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in told if line.startswith("error: ")]) == 1
    assert "SoftPromptTuning works on the LM's vectors" in told[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be a URL such as http"),
        ({"base_url": "http://[::1/v1"}, "base_url must be a URL such as http"),
        ({"base_url": "https://me:secret@host/v1"}, "must not contain secrets"),
        ({"base_url": "http://127.0.0.1:abc/v1"}, "must be a URL"),
        ({"base_url": "http://.../v1"}, "must be a URL"),
        ({"base_url": "https://host/v1?api-key=secret"}, "must not contain secrets"),
        ({"timeout": 0.0}, r"server\.timeout must be a finite number above 0"),
        ({"retries": -1}, r"server\.retries must be at least 0"),
        ({"concurrency": 0}, r"server\.concurrency must be at least 1"),
        ({"parameters": {"top_p": float("nan")}}, r"server\.parameters\.top_p must be finite"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Server(**{"base_url": "http://localhost:8000/v1", **settings})  # type: ignore[arg-type]
    assert "secret@" not in str(caught.value)
    assert "key=secret" not in str(caught.value)


def test_what_the_server_decides_is_not_set_here() -> None:
    server = Server("http://localhost:8000/v1")
    for settings in (
        {"dtype": "bfloat16"},
        {"quantization": "nf4"},
        {"revision": "a"},
        {"gradient_checkpointing": True},
    ):
        with pytest.raises(UserError, match=f"{next(iter(settings))} has no effect: x runs"):
            LMConfig("x", server=server, **settings)  # type: ignore[arg-type]
    with_parameters = replace(server, parameters={"top_p": 0.5})
    assert len({LMConfig("x", server=server): 1, LMConfig("x", server=with_parameters): 2}) == 2


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"needs the package openai; install it with: pip install "):
        RemoteLM(LMConfig("x", server=Server("http://localhost:8000/v1"))).connect()


def test_a_question_too_long_for_the_proposer(server: ServerProcess, tmp_path: Path) -> None:
    there = cached(remote(server, tmp_path, context=100))
    assert there.lm.count("abcdef é") == 3
    assert there.lm.length(FORWARD.render({"question": "Is it?", "answer": None}, labels=YES_NO)) == 6
