"""Deep Language Networks against plain loops over single texts, without cache, batching or sharing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import pytest
import torch
from conftest import TINY
from lightning.pytorch.callbacks import ModelCheckpoint
from test_label_scores import plain_classes, plain_sum

from callbacks import PromptTable, ResultFiles, ValidateAtEnd
from datamodules.base import SourceRow, TextDataModule
from lightning_prompts.dln.cache import TextCache
from lightning_prompts.dln.information import mutual_information
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import (
    MESSAGES,
    Arms,
    CycledMessages,
    NoMessage,
    ThompsonSampling,
    UniformMessages,
    UpperConfidence,
)
from lightning_prompts.dln.network import LanguageNetwork
from lightning_prompts.dln.posterior import EditThought, GivenAnswer, Posterior, PriorTemplate
from lightning_prompts.dln.proposals import (
    Case,
    InducedInstructions,
    LanguageModelProposals,
    MinedExamples,
    Paraphrases,
    Proposal,
    Proposals,
    Request,
    RuleRewrites,
    distinct,
)
from lightning_prompts.dln.reader import Reader, identity
from lightning_prompts.dln.rewards import best
from lightning_prompts.dln.sharpening import ArgMaxWeights, Sharpening, SoftmaxSharpening, UniformWeights
from lightning_prompts.dln.step import Stepper, StepSettings
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, label_scores
from lightning_prompts.methods import Ape, ChainOfThought, DeepLanguageNetwork, FewShot, FixedPrompt
from lightning_prompts.template import Template
from lightning_prompts.types import Example

YES_NO = (("yes", "correct"), ("no",))
FORWARD = Template("{prompt}\n\n{question}\n\nAnswer: {answer}\n")
ROWS = [("Is it?", "yes"), ("Was it so?", "no"), ("Who?", "no"), ("And is it true?", "yes")]


def examples(labels: bool = True) -> list[Example]:
    return [
        FORWARD.render({"question": question, "answer": answer}, f"row {n}", labels=YES_NO if labels else ())
        for n, (question, answer) in enumerate(ROWS)
    ]


@dataclass(frozen=True)
class Given(Proposals):
    """The same texts every time."""

    texts: tuple[str, ...]

    def propose(self, request: Request) -> list[Proposal]:
        return [Proposal(text, request.parents[0], "Given") for text in self.texts]


def reader_of(lm: FrozenLM, cache: TextCache | None = None, **settings: bool) -> Reader:
    return Reader(lm, lm.name, cache or TextCache(), 256.0, **settings)


def stepper_of(
    lm: FrozenLM, layers: Sequence[LanguageLayer], texts: Sequence[str] = ("Go.", "Say yes."), trust: float = 0.0,
    posterior: Posterior = Posterior(samples=3),  # noqa: B008
) -> Stepper:  # fmt: skip
    reader = reader_of(lm)
    placed = [PlacedLayer(layer, index, len(layers)) for index, layer in enumerate(layers)]
    settings = StepSettings([Given(tuple(texts))], posterior, trust=trust)
    return Stepper(LanguageNetwork(placed, [reader] * len(layers), 4), reader, settings)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- plain references -------------------------------------------------------------------------------------------------


def slot(lm: FrozenLM, example: Example, prompt: str) -> tuple[list[int], torch.Tensor]:
    """One example's context around a prompt, and the prompt's vectors."""
    ids = lm.encoder.tokens(prompt)
    row = lm.encoder.row(replace(example, answer=None), len(ids))
    return row.context, lm.embed(torch.tensor(ids, dtype=torch.long))


def plain_mean(lm: FrozenLM, example: Example, prompt: str, text: str) -> float:
    """Mean token log-probability of a text after a placed example."""
    tokens = lm.encoder.tokens(text)
    context, vectors = slot(lm, example, prompt)
    return plain_sum(lm, context, tokens, vectors) / len(tokens) if tokens else 0.0


def plain_answer(lm: FrozenLM, example: Example, prompt: str) -> float:
    """Log-probability of the reference: of its class, or per token."""
    if example.labels:
        return float(plain_classes(lm, example, slot(lm, example, prompt)[1])[example.label])
    return plain_mean(lm, example, prompt, str(example.answer))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_reader_s_scores_equal_one_text_at_a_time(tiny: FrozenLM) -> None:
    prompts = ["Say it.", "", "Answer!"]
    reader = reader_of(tiny)
    classes = reader.class_log_probs(examples(), prompts)
    texts = [[" so", " because of it"], ["", " no"], [" x", " x"], [" it is", " y"]]
    means = reader.log_probs(examples(), prompts, texts)
    for c, prompt in enumerate(prompts):
        for n, example in enumerate(examples()):
            expected = plain_classes(tiny, example, slot(tiny, example, prompt)[1])
            assert torch.allclose(classes[c, n].float(), expected, atol=1e-4)
            for k, text in enumerate(texts[n]):
                assert means[c, n, k].item() == pytest.approx(plain_mean(tiny, example, prompt, text), abs=1e-4)


def test_what_is_known_is_not_asked_again(tiny: FrozenLM) -> None:
    reader = reader_of(tiny)
    doubled = [*examples(), *examples()[:2]]
    before = tiny.tokens_forwarded
    first = reader.class_log_probs(doubled, ["Go.", "Say it.", "Go."])
    once = tiny.tokens_forwarded - before
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[:, :2], first[:, 4:])
    again = reader.class_log_probs(examples(), ["Say it."])
    assert tiny.tokens_forwarded - before == once, "no token more"
    assert torch.equal(again[0], first[1, :4])
    alone = reader_of(tiny)
    before = tiny.tokens_forwarded
    alone.class_log_probs(examples(), ["Go.", "Say it."])
    assert tiny.tokens_forwarded - before == once, "duplicates cost nothing"
    assert reader.calls == alone.calls == 2 * 4 * len(tiny.encoder.label_tokens(YES_NO).tokens)
    partly = reader.class_log_probs([*examples(), replace(examples()[0], before="New. ")], ["Go.", "Other."])
    assert torch.allclose(partly[0, :4], first[0, :4])


def test_a_cache_goes_through_a_checkpoint(tiny: FrozenLM, tmp_path: Path) -> None:
    cache = TextCache()
    reader = reader_of(tiny, cache)
    scores = reader.class_log_probs(examples(), ["Go."])
    texts = reader.write(examples(), "Go.", 5)
    torch.save(cache.state(), tmp_path / "cache.ckpt")
    restored = TextCache()
    restored.load(torch.load(tmp_path / "cache.ckpt", weights_only=True))
    other, before = reader_of(tiny, restored), tiny.tokens_forwarded
    assert torch.equal(other.class_log_probs(examples(), ["Go."]), scores)
    assert other.write(examples(), "Go.", 5) == texts
    assert tiny.tokens_forwarded == before
    assert other.write(examples(), "Go.", 3) != texts, "another length is another question"


def test_a_cache_is_of_its_model(tiny: FrozenLM) -> None:
    cache = TextCache()
    other = FrozenLM.load(LMConfig(f"{TINY},num_hidden_layers=1"))
    for lm in (tiny, other):
        expected = reader_of(lm).class_log_probs(examples(), ["Go."])
        assert torch.equal(reader_of(lm, cache).class_log_probs(examples(), ["Go."]), expected)
    half = FrozenLM.load(LMConfig(TINY, dtype="bfloat16"))
    config = LMConfig(TINY)
    same = {
        identity(tiny, config),
        identity(tiny, replace(config, dtype="auto")),
        identity(tiny, replace(config, quantization="none", calibrate_labels=True)),
    }
    assert len(same) == 1
    assert len({*same, identity(half, replace(config, dtype="auto")), identity(tiny, replace(config, revision="a")),
                identity(tiny, replace(config, quantization="nf4"))}) == 4  # fmt: skip


def test_scores_of_another_precision_are_not_looked_up() -> None:
    def build(**settings: object) -> DeepLanguageNetwork:
        method = network(lm=LMConfig(f"{TINY},max_position_embeddings=700", **settings))  # type: ignore[arg-type]
        method.configure_model()
        return method

    checkpoint: dict[str, object] = {}
    first, half, again = build(), build(dtype="bfloat16"), build()
    scores = first.network.readers[-1].class_log_probs(examples(), ["Go."])
    first.on_save_checkpoint(checkpoint)
    expected = half.network.readers[-1].class_log_probs(examples(), ["Go."])
    assert not torch.equal(expected, scores)
    half.cache.scores.clear()
    for method, wanted in ((half, expected), (again, scores)):
        method.on_load_checkpoint(checkpoint)
        assert torch.equal(method.network.readers[-1].class_log_probs(examples(), ["Go."]), wanted)
    assert again.calls == 0, "the same model's are"


def test_a_checkpoint_is_of_its_hidden_layers_models() -> None:
    def build(hidden: LMConfig | None) -> DeepLanguageNetwork:
        method = network(layers=[LanguageLayer("Think.", lm=hidden), LanguageLayer("Say.")])
        method.configure_model()
        return method

    checkpoint: dict[str, object] = {}
    build(LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")).on_save_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"for another hidden layers' model .*num_hidden_layers=1"):
        build(None).on_load_checkpoint(checkpoint)
    build(LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")).on_load_checkpoint(checkpoint)


def test_a_full_cache_forgets_the_oldest(tiny: FrozenLM) -> None:
    cache = TextCache(entries=6)
    reader = reader_of(tiny, cache)
    first = reader.class_log_probs(examples(), ["Go.", "Say it."])
    assert len(cache.scores) == 6
    before = tiny.tokens_forwarded
    assert torch.allclose(reader.class_log_probs(examples(), ["Say it."])[0], first[1])
    assert tiny.tokens_forwarded == before
    assert torch.allclose(reader.class_log_probs(examples(), ["Go."])[0], first[0], atol=1e-5)
    assert tiny.tokens_forwarded > before


def test_a_reader_calibrates_as_evaluation_does(tiny: FrozenLM) -> None:
    scores = reader_of(tiny, calibrate=True).class_log_probs(examples(), ["Say it."])[0]
    vectors = tiny.embed(torch.tensor(tiny.encoder.tokens("Say it.")))
    assert torch.allclose(scores.float(), label_scores(tiny, examples(), vectors, calibrate=True).log_probs, atol=1e-4)
    assert not torch.allclose(scores.float(), label_scores(tiny, examples(), vectors).log_probs, atol=1e-3)


def test_calibration_knows_no_thoughts(tiny: FrozenLM) -> None:
    layer = PlacedLayer(LanguageLayer(), 1, 2)
    placed = [layer.place(example, "It must be so.") for example in examples()]
    bare = [layer.place(replace(example, fields={**example.fields, "question": ""}), "") for example in examples()]
    reader = reader_of(tiny, calibrate=True)
    own = reader_of(tiny).class_log_probs(placed, ["Go."])[0].exp()
    texts = ("N/A", "[MASK]", "")
    empty = [layer.place(replace(bare[0], fields={"question": text, "answer": "yes"}), text) for text in texts]
    bias = reader_of(tiny).class_log_probs(empty, ["Go."])[0].exp().mean(0)
    odds = own / bias
    expected = (odds / odds.sum(-1, keepdim=True)).log()
    assert torch.allclose(reader.class_log_probs(placed, ["Go."])[0], expected, atol=1e-4)


def test_a_text_beyond_the_window(tiny: FrozenLM) -> None:
    long = FORWARD.render({"question": "x" * 300, "answer": "yes"}, "train.jsonl row 7", labels=YES_NO)
    with pytest.raises(UserError, match=r"train\.jsonl row 7: .*more than the context window"):
        reader_of(tiny).class_log_probs([long], ["Go."])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sharpening",
    [SoftmaxSharpening(), SoftmaxSharpening(2.5), SoftmaxSharpening(prior=False), UniformWeights(), ArgMaxWeights(),
     ArgMaxWeights(prior=False)],
)  # fmt: skip
def test_weights_by_the_definition(sharpening: Sharpening) -> None:
    answer = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.0, -1.0, -4.0, -2.0], [-1.0] * 4], dtype=torch.double)
    prior = torch.tensor([[-2.0, -0.1, -5.0, -1.0], [-3.0, -3.0, -0.5, -9.0], [-1.0] * 4], dtype=torch.double)
    there = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    weights = sharpening(answer, prior, there)
    for b in range(3):
        raw = []
        for k in range(4):
            total = float(answer[b, k]) + (float(prior[b, k]) if getattr(sharpening, "prior", False) else 0.0)
            if isinstance(sharpening, SoftmaxSharpening):
                total *= sharpening.alpha
            raw.append(0.0 if isinstance(sharpening, UniformWeights) else total)
        alive = [k for k in range(4) if there[b, k]]
        if isinstance(sharpening, ArgMaxWeights):
            best = max(alive, key=lambda k: raw[k], default=-1)
            expected = [float(k == best) for k in range(4)]
        else:
            mass = sum(math.exp(raw[k]) for k in alive)
            expected = [math.exp(raw[k]) / mass if k in alive else 0.0 for k in range(4)]
        assert weights[b].tolist() == pytest.approx(expected, abs=1e-9)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
def test_a_step_of_one_layer(labels: bool, tiny: FrozenLM) -> None:
    batch = examples(labels)
    texts = ("Go.", "Say yes.", "Say no.", "It is the other one.", "", "Go.", "Start.")
    result = stepper_of(tiny, [LanguageLayer(prompt="Start.")], texts).step(
        batch, ["Start."], PromptMemory(2, 2), [Arms()], 0.0, generator()
    )
    wanted = ["Start.", "Go.", "Say yes.", "Say no.", "It is the other one."]
    assert [candidate.proposal.text for candidate in result.candidates[0]] == wanted
    for candidate in result.candidates[0]:
        mean = sum(plain_answer(tiny, example, candidate.proposal.text) for example in batch) / len(batch)
        assert candidate.reward == pytest.approx(mean, abs=1e-4)
    best = max(result.candidates[0], key=lambda candidate: candidate.reward)
    assert result.prompts == [best.proposal.text]
    assert [candidate.chosen for candidate in result.candidates[0]].count(True) == 1
    assert result.rewards[0] == (result.candidates[0][0].reward, best.reward)
    if labels:
        right = [int(plain_classes(tiny, e, slot(tiny, e, "Start.")[1]).argmax()) == e.label for e in batch]
        assert [answer.right for answer in result.answers] == right


@pytest.mark.parametrize("count", [1, 2])
def test_labelled_and_free_text_examples_in_one_batch(count: int, tiny: FrozenLM) -> None:
    labelled, free = examples(), examples(labels=False)
    batch = [labelled[0], free[1], free[2], labelled[3]]
    layers = [LanguageLayer(max_new_tokens=4), LanguageLayer()][-count:]
    stepper = stepper_of(tiny, layers)
    prompts = ["Think.", "Start."][-count:]
    answers = stepper.forward(batch, prompts).answers
    of_labelled, of_free = (stepper.forward(part, prompts).answers for part in (labelled, free))
    assert answers == [of_labelled[0], of_free[1], of_free[2], of_labelled[3]]
    # Two hidden texts for each example, as a step has them.
    top = stepper.network.top
    hidden = ["So.", "It is."] if count == 2 else ["", ""]
    placed = [top.place(example, text) for example in batch for text in hidden]
    log_probs, classes = stepper.network.answer_log_probs(placed, ["Go.", "Say it."], 2)
    assert classes is None
    for c, prompt in enumerate(("Go.", "Say it.")):
        for n, example in enumerate(placed):
            assert log_probs[c, n].item() == pytest.approx(plain_answer(tiny, example, prompt), abs=1e-4)


def test_memory_is_among_the_candidates(tiny: FrozenLM) -> None:
    memory = PromptMemory(2, 2)
    memory.update(["Old one."], 0.4)
    memory.update(["Start."], 0.5)
    stepper = stepper_of(tiny, [LanguageLayer()], ("Go.", "Old one."))
    result = stepper.step(examples(), ["Start."], memory, [Arms()], 0.0, generator())
    assert [(c.proposal.text, c.proposal.kind) for c in result.candidates[0]] == [
        ("Start.", "current"), ("Old one.", "memory"), ("Go.", "Given"),
    ]  # fmt: skip


def test_a_tie_keeps_the_current_prompt(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of(tiny, [LanguageLayer()], ("Go.", "Say it."))
    for rewards, chosen in (([-1.0, -1.0, -2.0], "Start."), ([-1.0, -0.9, -0.9], "Go.")):
        monkeypatch.setattr(stepper, "rewards", lambda *_, values=rewards: torch.tensor(values))
        result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [Arms()], 0.0, generator())
        assert result.prompts == [chosen]


def test_what_is_not_a_number_does_not_win() -> None:
    nan = float("nan")
    assert best(torch.tensor([-1.0, nan, -2.0])) == 0
    assert best(torch.tensor([nan, -3.0, -2.0, nan])) == 2
    assert best(torch.tensor([nan, nan])) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_several_layers_change_nothing_where_all_is_right(count: int, tiny: FrozenLM) -> None:
    stepper = stepper_of(tiny, [LanguageLayer(max_new_tokens=4), LanguageLayer()][-count:])
    prompts = ["Think.", "Start."][-count:]
    answers = stepper.forward(examples(), prompts).answers
    batch = [example for example, answer in zip(examples(), answers, strict=True) if answer.right]
    assert batch, "this model is right at least once"
    before = tiny.tokens_forwarded
    result = stepper.step(batch, prompts, PromptMemory(2, 2), [Arms()] * count, 0.0, generator())
    assert result.accuracy == 1.0
    if count == 2:
        assert result.prompts == prompts
        assert not result.candidates
        assert tiny.tokens_forwarded == before, "and nothing is proposed or scored"
        return
    assert [candidate.proposal.text for candidate in result.candidates[0]] == ["Start.", "Go.", "Say yes."]
    for candidate in result.candidates[0]:
        mean = sum(plain_answer(tiny, example, candidate.proposal.text) for example in batch) / len(batch)
        assert candidate.reward == pytest.approx(mean, abs=1e-4)
    assert result.prompts == [max(result.candidates[0], key=lambda candidate: candidate.reward).proposal.text]


def test_the_proposer_sees_what_the_layer_reads(tiny: FrozenLM) -> None:
    for residual in (True, False):
        layers = [LanguageLayer(max_new_tokens=4), LanguageLayer(residual=residual, max_new_tokens=4),
                  LanguageLayer(residual=residual)]  # fmt: skip
        stepper = stepper_of(tiny, layers)
        batch, prompts = examples(), ["List.", "Think.", "Say."]
        seen = stepper.forward(batch, prompts)
        draws = stepper.posterior(seen, generator())
        for index in range(3):
            cases = stepper.cases(index, seen, draws)
            for b, (case, example) in enumerate(zip(cases, batch, strict=True)):
                placed = stepper.network.layers[index].place(example, seen.below(index)[b])
                read = placed.before + placed.after
                assert (example.question in case.input) == (example.question in read) == (index == 0 or residual)
                assert index == 0 or case.input.endswith(f"Thoughts: {seen.below(index)[b]}")


def test_no_proposal_left_keeps_the_prompt(tiny: FrozenLM) -> None:
    stepper = stepper_of(tiny, [LanguageLayer()], ("", "Start.", " Start. ", "long " * 300))
    result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [Arms()], 0.0, generator())
    assert result.prompts == ["Start."]
    assert result.empty == [0]


TWO_LAYERS = [LanguageLayer(prompt="Think.", max_new_tokens=6), LanguageLayer(prompt="Answer.")]
TEMPLATES = [PriorTemplate(), GivenAnswer(" So {target}."), EditThought("Refine.", "Fix.")]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("sharpening", [SoftmaxSharpening(1.5), UniformWeights()])
def test_a_step_of_two_layers(sharpening: Sharpening, labels: bool) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=600"))
    batch, trust, error_weight = examples(labels), 0.7 if labels else 0.0, 0.5
    texts = ("Go.", "Say yes.", "Say what it is.")
    posterior = Posterior(samples=4, templates=TEMPLATES, sharpening=sharpening)
    stepper = stepper_of(lm, TWO_LAYERS, texts, trust, posterior)
    prompts = ["Think.", "Answer."]
    result = stepper.step(batch, prompts, PromptMemory(2, 2), [Arms(), Arms()], error_weight, generator(3))
    # The forward pass, one example at a time.
    first, top = (PlacedLayer(layer, index, 2) for index, layer in enumerate(TWO_LAYERS))
    thoughts = []
    for example in batch:
        vectors = slot(lm, example, "Think.")[1]
        thoughts.append(lm.generate([first.place(example)], vectors, 6)[0])
    wrong = [b for b, answer in enumerate(result.answers) if not answer.right]
    assert wrong
    if labels:
        for example, thought, answer in zip(batch, thoughts, result.answers, strict=True):
            seen = top.place(example, thought)
            classes = plain_classes(lm, seen, slot(lm, seen, "Answer.")[1])
            assert answer.text == example.labels[int(classes.argmax())][0]
    # The draws are what they are; their weights, and all that follows, by the definition.
    again = stepper_of(lm, TWO_LAYERS, texts, trust, posterior)
    draws = again.posterior(again.forward(batch, prompts), generator(3))[0]
    assert len({text for several in draws.texts for text in several}) > 4
    for b, example in enumerate(batch):
        raw = []
        for text in draws.texts[b]:
            answer = plain_answer(lm, top.place(example, text), "Answer.")
            prior = plain_mean(lm, first.place(example), "Think.", f" {text}" if text else "")
            raw.append(float(sharpening.score(torch.tensor(answer), torch.tensor(prior))))
        alive = [bool(text) for text in draws.texts[b]]
        mass = sum(math.exp(value) for value, there in zip(raw, alive, strict=True) if there)
        expected = [math.exp(value) / mass if there else 0.0 for value, there in zip(raw, alive, strict=True)]
        assert draws.weights[b].tolist() == pytest.approx(expected, abs=1e-4)
    for candidate in result.candidates[1]:
        text, reward = candidate.proposal.text, 0.0
        for b, example in enumerate(batch):
            for k, thought in enumerate(draws.texts[b]):
                seen, weight = top.place(example, thought), float(draws.weights[b, k])
                reward += weight * plain_answer(lm, seen, text) / len(batch)
                if trust:
                    current = plain_classes(lm, seen, slot(lm, seen, "Answer.")[1])
                    other = plain_classes(lm, seen, slot(lm, seen, text)[1])
                    reward -= trust * weight * float((current.exp() * (current - other)).sum()) / len(batch)
        assert candidate.reward == pytest.approx(reward, abs=1e-4)
    for candidate in result.candidates[0]:
        text, reward = candidate.proposal.text, 0.0
        for b, example in enumerate(batch):
            for k, thought in enumerate(draws.texts[b]):
                score = plain_mean(lm, first.place(example), text, f" {thought}" if thought else "")
                reward += float(draws.weights[b, k]) * score / len(batch)
            if b in wrong:
                draft = f" {thoughts[b]}" if thoughts[b] else ""
                reward -= error_weight * plain_mean(lm, first.place(example), text, draft) / len(wrong)
        assert candidate.reward == pytest.approx(reward, abs=1e-4)
    for layer in (0, 1):
        winner = max(result.candidates[layer], key=lambda candidate: candidate.reward)
        assert result.prompts[layer] == winner.proposal.text, "both replaced, each by its best"


def test_a_step_of_three_layers(tiny: FrozenLM) -> None:
    layers = [LanguageLayer(max_new_tokens=4), LanguageLayer(residual=False, max_new_tokens=4), LanguageLayer()]
    stepper = stepper_of(tiny, layers, ("Go.",), posterior=Posterior(samples=2))
    prompts, batch = ["List.", "Think.", "Say."], examples()[:2]
    seen = stepper.forward(batch, prompts)
    lower, upper = stepper.posterior(seen, generator(1))
    placed = [PlacedLayer(layer, index, 3) for index, layer in enumerate(layers)]
    # The target of the first layer's draws is the best draw of the second.
    for b, example in enumerate(batch):
        raw = []
        for text in lower.texts[b]:
            target = upper.texts[b][int(upper.weights[b].argmax())]
            answer = plain_mean(tiny, placed[1].place(example, text), "Think.", f" {target}" if target else "")
            raw.append(answer + plain_mean(tiny, placed[0].place(example), "List.", f" {text}" if text else ""))
        mass = sum(math.exp(value) for value, text in zip(raw, lower.texts[b], strict=True) if text)
        expected = [math.exp(v) / mass if text else 0.0 for v, text in zip(raw, lower.texts[b], strict=True)]
        assert lower.weights[b].tolist() == pytest.approx(expected, abs=1e-4)
    rewards = stepper.rewards(1, ["Think.", "Go."], seen, [lower, upper], 0.0)
    for c, prompt in enumerate(("Think.", "Go.")):
        total = 0.0
        for b, example in enumerate(batch):
            for j, below in enumerate(lower.texts[b]):
                for k, text in enumerate(upper.texts[b]):
                    weight = float(lower.weights[b, j] * upper.weights[b, k])
                    score = plain_mean(tiny, placed[1].place(example, below), prompt, f" {text}" if text else "")
                    total += weight * score / len(batch)
        assert rewards[c].item() == pytest.approx(total, abs=1e-4)
    result = stepper.step(batch, prompts, PromptMemory(0, -1), [Arms(), Arms(), Arms()], 0.0, generator(1))
    assert set(result.candidates) == {0, 1, 2}


def test_a_layer_that_does_not_learn_stays(tiny: FrozenLM) -> None:
    layers = [TWO_LAYERS[0], replace(TWO_LAYERS[1], learn=False)]
    result = stepper_of(tiny, layers).step(
        examples(), ["Think.", "Answer."], PromptMemory(0, -1), [Arms(), Arms()], 0.0, generator()
    )
    assert set(result.candidates) == {0}
    assert result.prompts[1] == "Answer."


def test_a_step_follows_from_its_generator() -> None:
    results = []
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1024"))
    for seed in (5, 5, 6):
        stepper = stepper_of(lm, TWO_LAYERS)
        stepper.settings = replace(stepper.settings, proposals=[LanguageModelProposals(3, max_new_tokens=8, shown=1)])
        memory, arms = PromptMemory(0, -1), [Arms(), Arms()]
        result = stepper.step(examples(), ["Think.", "Answer."], memory, arms, 0.5, generator(seed))
        results.append(result.rows())
    assert results[0] == results[1] != results[2]


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_single_layer_reads_the_task_s_own_template() -> None:
    example = examples()[0]
    assert PlacedLayer(LanguageLayer(), 0, 1).place(example) is example


def test_what_layers_read() -> None:
    example = Template("{prompt} {question}: {answer}", chat=True, system="S").render(
        {"question": "Which? Options: a b", "stripped": "Which?", "answer": "a"}, labels=(("a",), ("b",))
    )
    hidden, top = PlacedLayer(LanguageLayer(), 0, 2), PlacedLayer(LanguageLayer(), 1, 2)
    asked = hidden.place(example, hint=" So a.")
    assert (asked.before, asked.after) == ("Which? So a.\n\n", "\nLet's think step by step.")
    assert asked.answer is None
    answered = top.place(example, "It is a.")
    assert (answered.before, answered.answer) == ("", "a")
    assert answered.after == "\n\nWhich? Options: a b\n\nYour thoughts were:\nIt is a.\n\nAnswer:"
    assert (answered.chat, answered.system, answered.labels, answered.label) == (True, "S", example.labels, 0)
    bare = PlacedLayer(LanguageLayer(residual=False), 1, 2).place(example, "It is a.")
    assert bare.after == "\n\nIt is a.\n\nAnswer:"
    whole = PlacedLayer(LanguageLayer(strip_options=False), 0, 2).place(example)
    assert whole.before == "Which? Options: a b\n\n"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PlacedLayer(LanguageLayer(template="{prompt}{hidden}{answer}"), 0, 2), "has {hidden}"),
        (lambda: PlacedLayer(LanguageLayer(template="{prompt}{question}{answer}"), 1, 2), "lacks {hidden}"),
        (lambda: LanguageLayer(template="{prompt}{question}{hidden}{answer}", residual=False), "residual is false"),
        (lambda: LanguageLayer(template="{question} {answer}"), "no {prompt}"),
        (lambda: LanguageLayer(max_new_tokens=0), "max_new_tokens"),
        (lambda: GivenAnswer("So it is."), "{target}"),
        (lambda: Posterior(samples=0), "samples"),
        (lambda: Posterior(templates=[]), "templates is empty"),
        (lambda: SoftmaxSharpening(float("nan")), "alpha"),
        (lambda: LanguageModelProposals(0), "LanguageModelProposals.count"),
        (lambda: LanguageModelProposals(stop="("), "LanguageModelProposals.stop '(' is not a regular expression"),
        (lambda: LanguageModelProposals(stop=""), "LanguageModelProposals.stop is empty"),
        (lambda: Paraphrases(0), "Paraphrases.count"),
        (lambda: Paraphrases(temperature=float("nan")), "Paraphrases.temperature"),
        (lambda: Paraphrases(max_new_tokens=0), "Paraphrases.max_new_tokens"),
        (lambda: InducedInstructions(0), "InducedInstructions.count"),
        (lambda: InducedInstructions(shown=-1), "InducedInstructions.shown"),
        (lambda: InducedInstructions(max_new_tokens=0), "InducedInstructions.max_new_tokens"),
        (lambda: InducedInstructions(temperature=-0.1), "InducedInstructions.temperature"),
        (lambda: DeepLanguageNetwork(memory_mb=float("inf")), "memory_mb"),
        (lambda: Ape(memory_mb=float("nan")), "memory_mb"),
        (lambda: MinedExamples(shots=0), "shots"),
        (lambda: DeepLanguageNetwork(posterior=Posterior()), "one layer has none"),
        (lambda: DeepLanguageNetwork(error_weight=0.5), "one layer has none"),
        (lambda: DeepLanguageNetwork([LanguageLayer(learn=False)]), "no layer learns"),
        (lambda: DeepLanguageNetwork([]), "layers is empty"),
        (lambda: DeepLanguageNetwork(proposals=[]), "proposals is empty"),
        (lambda: DeepLanguageNetwork(tolerance=-2), "tolerance"),
        (lambda: DeepLanguageNetwork(memory=-1), "memory"),
        (lambda: DeepLanguageNetwork(trust=float("inf")), "trust"),
        (lambda: Ape(survivors=0), "survivors"),
        (lambda: FORWARD.render({"question": "?", "answer": "maybe"}, "row 4", labels=YES_NO), "row 4: label 'maybe'"),
    ],
)
def test_bad_settings_are_told_in_one_line(build: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build()  # type: ignore[operator]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_holds_the_best_by_accuracy() -> None:
    memory = PromptMemory(2, -1)
    for text, accuracy in (("a", 0.5), ("b", 0.5), ("c", 0.6), ("d", 0.55), ("e", 0.7)):
        assert memory.update([text], accuracy) == [text], "never back with a tolerance of -1"
    assert memory.entries == [(0.7, ["e"]), (0.6, ["c"])], "what was as good as the best or worse is not remembered"
    assert memory.of_layer(0) == ["e", "c"]
    assert (memory.best, memory.best_accuracy) == (["e"], 0.7)


@pytest.mark.parametrize(("tolerance", "back"), [(0, [1, 2, 3]), (1, [1, 2, 3]), (2, [2, 4]), (3, [3]), (-1, [])])
def test_tolerance_leads_back_to_the_best(tolerance: int, back: list[int]) -> None:
    memory = PromptMemory(0, tolerance)
    memory.update(["best"], 0.5)
    gone = [n for n in range(1, 5) if memory.update([f"p{n}"], 0.5 - 0.1 * (n % 2)) == ["best"]]
    assert gone[: len(back)] == back
    assert memory.entries == []


def test_a_better_prompt_renews_the_patience() -> None:
    memory = PromptMemory(1, 2)
    memory.update(["a"], 0.5)
    assert memory.update(["b"], 0.4) == ["b"]
    assert memory.update(["c"], 0.6) == ["c"]
    assert memory.update(["d"], 0.6) == ["d"]
    assert memory.update(["e"], 0.1) == ["c"]


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_without_learning() -> None:
    arms = Arms()
    assert [CycledMessages().choose(arms, j, generator()) for j in range(6)] == [0, 1, 2, 3, 0, 1]
    assert NoMessage().choose(arms, 0, generator()) is None
    draw = generator()
    assert {UniformMessages().choose(arms, j, draw) for j in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("choice", [ThompsonSampling(), UpperConfidence()])
def test_a_bandit_finds_the_message_that_gains(choice: ThompsonSampling | UpperConfidence) -> None:
    arms, draw, noise = Arms(), generator(), generator(9)
    chosen = []
    for _ in range(60):
        for j in range(3):
            message = choice.choose(arms, j, draw)
            assert message is not None
            chosen.append(message)
            arms.update(message, (0.5 if message == 2 else 0.0) + 0.2 * float(torch.randn(1, generator=noise)))
    assert set(chosen[:20]) == set(range(len(MESSAGES))), "each is tried"
    assert chosen[-60:].count(2) > 45
    assert arms.mean(2) == pytest.approx(0.5, abs=0.1)
    assert arms.deviation() == pytest.approx(0.2, abs=0.05)


def test_gains_are_measured_against_the_parent() -> None:
    stepper = stepper_of(FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1024")), [LanguageLayer()])
    stepper.settings = replace(stepper.settings, proposals=[LanguageModelProposals(6, max_new_tokens=6, shown=0)])
    memory, arms = PromptMemory(1, -1), Arms()
    memory.update(["Old."], 0.5)
    rows = stepper.step(examples(), ["Start."], memory, [arms], 0.0, generator()).candidates[0]
    value = {row.proposal.text: row.reward for row in rows}
    for message in range(4):
        gains = [row.reward - value[row.proposal.parent] for row in rows if row.proposal.message == message]
        assert arms.counts[message] == len(gains)
        assert arms.sums[message] == pytest.approx(sum(gains))
    assert {row.proposal.parent for row in rows[2:]} == {"Start.", "Old."}, "the memory is rewritten too"


def test_gains_that_are_no_numbers_are_left_out(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [-2.0, -1.0, float("nan"), float("-inf")]

    @dataclass(frozen=True)
    class Told(Proposals):
        def propose(self, request: Request) -> list[Proposal]:
            return [Proposal(f"Text {m}.", request.parents[0], "Told", m) for m in range(3)]

    stepper, arms = stepper_of(tiny, [LanguageLayer()]), Arms()
    stepper.settings = replace(stepper.settings, proposals=[Told()])
    monkeypatch.setattr(stepper, "rewards", lambda *_: torch.tensor(values))
    result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [arms], 0.0, generator())
    assert result.prompts == ["Text 0."]
    assert arms.counts == [1, 0, 0, 0]
    assert arms.sums == [1.0, 0.0, 0.0, 0.0]


# --- proposals --------------------------------------------------------------------------------------------------------

CASES = [Case(f"question {n}", f"out {n}", f"target {n}", n % 2 == 0) for n in range(6)]


def request(lm: FrozenLM, parents: Sequence[str] = ("Start.", "Old."), cases: Sequence[Case] = CASES) -> Request:
    return Request(list(parents), cases, ["yes", "no"], Arms(), generator(), reader_of(lm))


def shown(reader: Reader, source: Proposals, given: Request, monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    asked: list[Example] = []

    def draw(examples: Sequence[Example], *rest: object, **more: object) -> list[str]:
        asked.extend(examples)
        return [f"Answer {n}" for n in range(len(examples))]

    monkeypatch.setattr(reader, "draw", draw)
    source.propose(given)
    return asked


def test_what_the_teacher_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=4096"))
    given = request(lm)
    asked = shown(given.proposer, LanguageModelProposals(5, held_out=True), given, monkeypatch)
    orders = []
    for j, example in enumerate(asked):
        text = example.before
        assert ("Start." if j % 2 == 0 else "Old.") in text
        assert MESSAGES[j % 4] in text
        seen = [case for case in CASES if f"{case.input}\n" in text]
        assert len(seen) == 3, "a random half"
        orders.append(tuple(case.input for case in seen))
        for case in seen:
            assert (f"Output of the student: {case.output}" in text) != case.right
            assert case.target in text
    assert len(set(orders)) > 1
    given = request(lm)
    asked = shown(given.proposer, LanguageModelProposals(1, held_out=False), given, monkeypatch)
    assert all(case.input in asked[0].before for case in CASES)


def test_examples_beyond_the_teacher_s_window_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=800"))
    long = Case("w" * 2000, "out", "target", False)
    for cases, left in (([*CASES, long], None), ([long], 0)):
        given = request(lm, cases=cases)
        asked = shown(given.proposer, LanguageModelProposals(4, held_out=False), given, monkeypatch)
        for example in asked:
            assert len(lm.encoder.row(example, 0).context) + 64 <= 800
            assert "w" * 2000 not in example.before
            assert left is None or "Input:" not in example.before
    roomy = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1600"))
    given = request(roomy, cases=[*CASES, long])
    for example in shown(given.proposer, LanguageModelProposals(4, held_out=False), given, monkeypatch):
        assert example.before.count("Input:") == len(CASES), "one long example, wherever it stands, costs no other"
    given = request(lm, cases=[long])
    assert len(InducedInstructions(2).propose(given)) == 2
    with pytest.raises(UserError, match="too small for a question to the proposer"):
        LanguageModelProposals(1).propose(request(FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=200"))))


def test_duplicates_and_empty_proposals_are_sorted_out() -> None:
    made = [Proposal(text, "p", "k") for text in ("a", "", "  ", "b  c", "a", "b c", "known", "d")]
    assert [proposal.text for proposal in distinct(made, ["known"])] == ["a", "b  c", "d"]


def test_mined_examples_replace_earlier_ones(tiny: FrozenLM) -> None:
    first = MinedExamples(4, shots=2).propose(request(tiny))
    again = MinedExamples(4, shots=2).propose(request(tiny, [proposal.text for proposal in first]))
    for proposal in (*first, *again):
        assert proposal.text.count("For example:") == 1
        assert proposal.text.startswith(("Start.", "Old."))
        assert 1 <= proposal.text.count("Answer: target") <= 2
    errors = MinedExamples(6, shots=1, errors_first=True).propose(request(tiny))
    assert all(f"target {n}" not in proposal.text for proposal in errors for n in (0, 2, 4))


def test_rules(tiny: FrozenLM) -> None:
    rewrites = RuleRewrites().rewrites("Say it. Now.\n\nFor example:\nx", ["yes", "no"])
    for wanted in (
        "Say it. Now. Answer with yes or no.\n\nFor example:\nx", "Now. Say it.\n\nFor example:\nx", "Say it. Now.",
        "Now.\n\nFor example:\nx", "Task: Say it. Now.\n\nFor example:\nx",
    ):  # fmt: skip
        assert wanted in rewrites
    assert len(set(rewrites)) == len(rewrites)
    drawn = RuleRewrites(5).propose(request(tiny))
    assert len({proposal.text for proposal in drawn}) == 5
    assert {proposal.parent for proposal in drawn} <= {"Start.", "Old."}
    assert RuleRewrites().rewrites("", []), "an empty prompt gets sentences"


def test_variations_and_marks(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = request(tiny)
    monkeypatch.setattr(given.proposer, "draw", lambda asked, *rest, **more: ['> The new instruction: "Do it."'] * 2)
    assert [proposal.text for proposal in Paraphrases(2).propose(given)] == ["Do it."] * 2


# --- the method -------------------------------------------------------------------------------------------------------


class Toy(TextDataModule):
    """A few labelled questions."""

    def __init__(self, labels: bool = True, template: str = FORWARD.text, size: int = 12) -> None:
        super().__init__(template, r"\n", False, None, 4, 8, None, 0)
        self.labels, self.size = labels, size

    def load_rows(self) -> dict[str, list[SourceRow]]:
        rows = [
            SourceRow({"question": f"Is {n} {'odd' if n % 3 else 'even'}?", "answer": ("yes", "no")[n % 2]}, f"row {n}",
                      labels=YES_NO if self.labels else ())
            for n in range(3 * self.size)
        ]  # fmt: skip
        return {split: rows[k::3] for k, split in enumerate(("train", "val", "test"))}


PROPOSALS: list[Proposals] = [
    LanguageModelProposals(3, max_new_tokens=8, shown=1, messages=ThompsonSampling()), RuleRewrites(3),
]  # fmt: skip


def network(**settings: object) -> DeepLanguageNetwork:
    values: dict[str, object] = {
        "layers": [LanguageLayer(prompt="Think.", max_new_tokens=5), LanguageLayer(prompt="Say.")],
        "proposals": PROPOSALS, "posterior": Posterior(samples=2), "error_weight": 0.5, "max_prompt_tokens": 60,
        "lm": LMConfig(f"{TINY},max_position_embeddings=700"), **settings,
    }  # fmt: skip
    return DeepLanguageNetwork(**values)  # type: ignore[arg-type]


def trainer(folder: Path, steps: int, validate: int = 2) -> L.Trainer:
    saved = ModelCheckpoint(folder / "saved", "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    return L.Trainer(
        max_epochs=-1, max_steps=steps, val_check_interval=validate, check_val_every_n_epoch=None, logger=False,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[saved, PromptTable(), ResultFiles(), ValidateAtEnd()], accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)  # type: ignore[attr-defined,index]
    return one == other


@pytest.mark.parametrize("kind", ["network", "ape"])
def test_a_resumed_run_goes_on_bit_by_bit(kind: str, tmp_path: Path) -> None:
    def build() -> DeepLanguageNetwork | Ape:
        if kind == "network":
            return network()
        return Ape(text="Say.", induced=InducedInstructions(3, max_new_tokens=8), paraphrases=Paraphrases(2, 0.7, 8),
                   max_prompt_tokens=60, lm=LMConfig(f"{TINY},max_position_embeddings=700"))  # fmt: skip

    L.seed_everything(3)
    trainer(tmp_path / "whole", 4).fit(build(), Toy())
    L.seed_everything(3)
    saved = tmp_path / "whole" / "saved" / "step=2.ckpt"
    trainer(tmp_path / "parts", 4).fit(build(), Toy(), ckpt_path=saved, weights_only=True)
    one, other = (
        torch.load(tmp_path / name / "saved" / "step=4.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert same(one["text_prompts"], other["text_prompts"])
    assert one["global_step"] == other["global_step"] == 4
    assert (tmp_path / "whole" / "prompts.jsonl").read_text() == (tmp_path / "parts" / "prompts.jsonl").read_text()
    if kind == "ape":
        assert one["survivors"] == other["survivors"]
    assert len(one["text_prompts"]["cache"]["score_keys"]) > 20


def test_training_keeps_what_is_strictly_best_on_validation(tmp_path: Path) -> None:
    L.seed_everything(1)
    method, data = network(layers=[LanguageLayer(prompt="Say.")], posterior=None, error_weight=0.0), Toy()
    fitting = trainer(tmp_path, 6)
    fitting.fit(method, data)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in tested] == [2, 4, 6]
    assert {"current", "RuleRewrites"} <= {row["kind"] for row in rows}

    def accuracy(prompt: str) -> float:
        right = 0
        for example in data.examples("val"):
            vectors = slot(method.lm, example, prompt)[1]
            right += int(plain_classes(method.lm, example, vectors).argmax()) == example.label
        return right / len(data.examples("val"))

    best, prompt = accuracy("Say."), "Say."
    for row in tested:
        assert row["accuracy"] == pytest.approx(accuracy(row["prompts"][0]), abs=1e-5)
        if row["accuracy"] > best + 1e-9:
            best, prompt = row["accuracy"], row["prompts"][0]
        assert row["best_accuracy"] == pytest.approx(best, abs=1e-5)
    assert method.prompt_text() == prompt
    # A step starts from what the step before has chosen, or from the best where validation has led back to it.
    now = "Say."
    for row in rows:
        if row["kind"] == "current":
            assert row["prompt"] == now
        if row.get("chosen"):
            now = row["prompt"]
        if row.get("back_to_best"):
            now = max((r for r in tested if r["step"] <= row["step"]), key=lambda r: r["accuracy"])["prompts"][0]
            now = prompt if row["best_accuracy"] == accuracy("Say.") else now
    fitting.test(method, data, verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    counts = {name: value for name, value in metrics.items() if "/predicted/" in name}
    assert sum(counts.values()) == metrics["test/examples"] == 12
    assert metrics["test/accuracy"] == metrics["test/exact_match"]
    fixed = FixedPrompt(text=prompt, lm=LMConfig(f"{TINY},max_position_embeddings=700"))
    alone = trainer(tmp_path / "fixed", 1)
    alone.test(fixed, Toy(), verbose=False)
    theirs = json.loads((tmp_path / "fixed" / "metrics.json").read_text())
    for name, value in metrics.items():
        assert value == pytest.approx(theirs[name], abs=1e-4), "the prompt does as text what it did here"


def test_a_network_with_fixed_prompts_is_chain_of_thought(tmp_path: Path) -> None:
    """The prior alone, no sharpening, nothing learned yet: `ChainOfThought`'s rows to the letter."""
    lm = LMConfig(f"{TINY},max_position_embeddings=700")
    thinks = "{prompt}\n\n{question}\n\nAnswer:\nLet's think step by step. {answer}"
    asks = "{prompt}\n\n{question}\n\nAnswer:\nLet's think step by step. {hidden}\nTherefore, the answer is {answer}"
    layers = [LanguageLayer("Say.", thinks, max_new_tokens=7), LanguageLayer("Say.", asks)]
    posterior = Posterior(1, 0.0, [PriorTemplate()], UniformWeights())
    found = []
    for labels in (True, False):
        for method in (
            ChainOfThought(text="Say.", reasoning_tokens=7, lm=lm, max_new_tokens=4),
            network(layers=layers, posterior=posterior, max_new_tokens=4, lm=lm),
        ):
            folder = tmp_path / f"{type(method).__name__}-{labels}"
            trainer(folder, 1).test(method, Toy(labels), verbose=False)
            found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
        for mine, theirs in zip(*found[-2:], strict=True):
            assert mine.keys() == theirs.keys()
            assert mine.pop("nll") == pytest.approx(theirs.pop("nll"), abs=1e-4)
            assert mine == theirs
            assert isinstance(mine["hidden"], str)
    # And the reward of its top prompt is what chain of thought gives the answers.
    stepper = Stepper(method.network, method.proposer, method.settings)  # type: ignore[union-attr]
    batch = Toy().examples("train")[:3]
    seen = stepper.forward(batch, ["Say.", "Say."])
    draws = stepper.posterior(seen, generator())
    assert draws[0].texts == [[text] for text in seen.hidden[0]]
    reward = stepper.rewards(1, ["Say."], seen, draws, 0.0)[0].item()
    cot = ChainOfThought(text="Say.", reasoning_tokens=7, lm=lm)
    cot.configure_model()
    vectors = cot.current_prompt()
    plain = [plain_classes(cot.lm, example, vectors)[example.label] for example in cot.prepare(batch)]
    kept = [value for value, text in zip(plain, seen.hidden[0], strict=True) if text]
    assert reward == pytest.approx(float(sum(kept)) / 3, abs=1e-4)


def test_few_shot_on_labels(tmp_path: Path) -> None:
    method = FewShot(shots=2, text="Say.", lm=LMConfig(f"{TINY},max_position_embeddings=700"))
    trainer(tmp_path, 1).test(method, Toy(), verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} <= {"yes", "no"}
    prepared = method.prepare(Toy().examples("test"))
    for row, example in zip(rows, prepared, strict=True):
        classes = plain_classes(method.lm, example, method.current_prompt())
        assert row["label"] == YES_NO[int(classes.argmax())][0]
        assert row["correct"] == (row["label"] == row["answer"])


def test_every_method_can_calibrate(tmp_path: Path) -> None:
    lm = LMConfig(f"{TINY},max_position_embeddings=700", calibrate_labels=True)
    found = []
    for method in (FixedPrompt(text="Say.", lm=lm), network(layers=[LanguageLayer("Say.")], posterior=None,
                                                            error_weight=0.0, lm=lm)):  # fmt: skip
        folder = tmp_path / type(method).__name__
        trainer(folder, 1).test(method, Toy(), verbose=False)
        found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
    vectors = method.current_prompt()
    scores = label_scores(method.lm, Toy().examples("test"), vectors, calibrate=True).log_probs
    names = [YES_NO[label][0] for label in scores.argmax(-1).tolist()]
    assert [row["label"] for row in found[0]] == [row["label"] for row in found[1]] == names
    plain = label_scores(method.lm, Toy().examples("test"), vectors).log_probs
    assert names != [YES_NO[label][0] for label in plain.argmax(-1).tolist()], "it makes a difference here"


def test_prompts_start_at_the_task_s_own_instruction(tmp_path: Path) -> None:
    lm = LMConfig(f"{TINY},max_position_embeddings=700")
    data = Toy()
    data.instruction = "Odd?"
    found = []
    for text in (None, "Odd?", ""):
        method = FixedPrompt(text=text, lm=lm)
        folder = tmp_path / str(text)
        trainer(folder, 1).test(method, data, verbose=False)
        found.append((folder / "predictions.jsonl").read_text())
    assert found[0] == found[1] != found[2]
    method = network(layers=[LanguageLayer("Think.", max_new_tokens=4), LanguageLayer(None)])
    trainer(tmp_path / "two", 1, 1).fit(method, data)
    assert method.initial_prompts == ["Think.", "Odd?"]
    ape = Ape(text=None, induced=InducedInstructions(2, max_new_tokens=4), max_prompt_tokens=60, lm=lm)
    trainer(tmp_path / "ape", 1, 1).fit(ape, data)
    assert ape.initial_prompts == ["Odd?"]


def test_layers_share_an_lm_where_they_name_the_same(tmp_path: Path) -> None:
    other = LMConfig(f"{TINY},num_hidden_layers=1,max_position_embeddings=700")
    layers = [LanguageLayer("Think.", max_new_tokens=4, lm=other), LanguageLayer("Say.")]
    method = network(layers=layers, proposer=LMConfig(other.name))
    trainer(tmp_path, 2).fit(method, Toy())
    first, top = method.network.readers
    assert first is method.proposer
    assert top.lm is method.lm is not first.lm
    assert method.tokens_forwarded == first.lm.tokens_forwarded + method.lm.tokens_forwarded
    assert min(first.lm.tokens_forwarded, method.lm.tokens_forwarded) > 0
    saved = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"handle"}


def test_ape_keeps_the_best_on_validation(tmp_path: Path) -> None:
    L.seed_everything(2)
    method = Ape(text="Say.", induced=InducedInstructions(6, max_new_tokens=8), paraphrases=Paraphrases(3, 0.7, 8),
                 max_prompt_tokens=60, lm=LMConfig(f"{TINY},max_position_embeddings=700"))  # fmt: skip
    data = Toy()
    trainer(tmp_path, 2, 1).fit(method, data)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    for step, kind in ((1, "InducedInstructions"), (2, "Paraphrases")):
        mine = [row for row in rows if row["step"] == step and "reward" in row]
        assert kind in {row["kind"] for row in mine}
        for row in mine:
            right = [
                int(plain_classes(method.lm, e, slot(method.lm, e, row["prompt"])[1]).argmax()) == e.label
                for e in data.examples("val")
            ]
            assert row["reward"] == pytest.approx(sum(right) / len(right), abs=1e-5)
        best = max(row["reward"] for row in mine)
        assert next(row for row in mine if row["reward"] == best)["chosen"], "the first of equals, so the current one"


def test_trust_needs_classes(tiny: FrozenLM) -> None:
    with pytest.raises(UserError, match="trust compares class probabilities"):
        stepper_of(tiny, [LanguageLayer()], trust=0.5).step(
            examples(labels=False), ["Start."], PromptMemory(0, -1), [Arms()], 0.0, generator()
        )


def test_trust_with_free_text_and_ape_without_validation_do_not_start(tmp_path: Path) -> None:
    one: dict[str, object] = {"layers": [LanguageLayer("Say.")], "posterior": None, "error_weight": 0.0}

    class Mixed(Toy):
        """The last example to learn from is of free text."""

        def load_rows(self) -> dict[str, list[SourceRow]]:
            rows = super().load_rows()
            rows["train"][-1] = replace(rows["train"][-1], labels=())
            return rows

    for data in (Toy(labels=False), Mixed()):
        method = network(trust=0.5, **one)
        with pytest.raises(UserError, match=r"row .*: trust compares class probabilities") as caught:
            trainer(tmp_path / "trust", 1).fit(method, data)
        assert "\n" not in str(caught.value)
        assert method.calls == 0, "before any work"
    trainer(tmp_path / "mixed", 1).fit(network(**one), Mixed())
    ape = Ape(text="Say.", lm=LMConfig(f"{TINY},max_position_embeddings=700"), max_prompt_tokens=60)
    fitting = trainer(tmp_path / "ape", 1)
    fitting.limit_val_batches = 0
    with pytest.raises(UserError, match="give data a validation split"):
        fitting.fit(ape, Toy())
    assert ape.calls == 0


def test_gradients_that_are_not_there_are_not_accumulated(tmp_path: Path) -> None:
    method, fitting = network(), trainer(tmp_path, 2)
    fitting.accumulate_grad_batches = 2
    with pytest.raises(UserError, match="no gradients to accumulate"):
        fitting.fit(method, Toy())
    assert method.calls == 0


def test_all_filtered_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = network(layers=[LanguageLayer(prompt="Say.")], posterior=None, error_weight=0.0,
                     proposals=[Given(("", "Say."))])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, 1).fit(method, Toy())
    assert "no proposal for layer 0 was new" in caplog.text
    assert method.prompts == ["Say."]


def test_an_example_beyond_the_window_is_found_before_the_first_step(tmp_path: Path) -> None:
    method = network(lm=LMConfig(f"{TINY},max_position_embeddings=100"))
    with pytest.raises(UserError, match="context window"):
        trainer(tmp_path, 1).fit(method, Toy())


# --- analysis ---------------------------------------------------------------------------------------------------------


def test_mutual_information_of_known_cases() -> None:
    same = torch.tensor([[0.3, 0.7]] * 4).log()
    assert mutual_information(same).item() == pytest.approx(0.0, abs=1e-6)
    decided = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert mutual_information(decided).item() == pytest.approx(math.log(2))
    table = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.5, 0.5, 0.0]])
    joint = table / 3
    mean = joint.sum(0)
    expected = sum(
        float(joint[k, y]) * math.log(float(table[k, y] / mean[y])) for k in range(3) for y in range(2)
    )  # sum over p(k, y) log p(y | k) / p(y)
    assert mutual_information(table.log()).item() == pytest.approx(expected, abs=1e-6)
