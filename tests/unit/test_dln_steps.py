"""Steps of Deep Language Networks against plain references; what layers read, and what they remember."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.posterior import EditThought, GivenAnswer, Posterior, PriorTemplate
from lightning_prompts.dln.proposals import InducedInstructions, LanguageModelProposals, MinedExamples, Paraphrases
from lightning_prompts.dln.rewards import best, divergence
from lightning_prompts.dln.sharpening import Sharpening, SoftmaxSharpening, UniformWeights
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import Ape, DeepLanguageNetwork
from lightning_prompts.template import Template
from support.dln_toys import FORWARD, YES_NO, examples, generator, plain_answer, plain_mean, slot, stepper_of
from support.models import TINY
from support.references import plain_classes


@pytest.mark.parametrize("labels", [True, False])
def test_a_step_of_one_layer(labels: bool, tiny: FrozenLM) -> None:
    batch = examples(labels)
    texts = ("Go.", "Say yes.", "Say no.", "It is the other one.", "", "Go.", "Start.")
    result = stepper_of(tiny, [LanguageLayer(prompt="Start.")], texts).step(
        batch, ["Start."], PromptMemory(2, 2), [BanditStats()], 0.0, generator()
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
    result = stepper.step(examples(), ["Start."], memory, [BanditStats()], 0.0, generator())
    assert [(c.proposal.text, c.proposal.kind) for c in result.candidates[0]] == [
        ("Start.", "current"),
        ("Old one.", "memory"),
        ("Go.", "Given"),
    ]


def test_a_tie_keeps_the_current_prompt(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of(tiny, [LanguageLayer()], ("Go.", "Say it."))
    for rewards, chosen in (([-1.0, -1.0, -2.0], "Start."), ([-1.0, -0.9, -0.9], "Go.")):
        monkeypatch.setattr(stepper, "rewards", lambda *_, values=rewards: torch.tensor(values))
        result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [BanditStats()], 0.0, generator())
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
    result = stepper.step(batch, prompts, PromptMemory(2, 2), [BanditStats()] * count, 0.0, generator())
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
        layers = [
            LanguageLayer(max_new_tokens=4),
            LanguageLayer(residual=residual, max_new_tokens=4),
            LanguageLayer(residual=residual),
        ]
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
    result = stepper.step(examples(), ["Start."], PromptMemory(0, -1), [BanditStats()], 0.0, generator())
    assert result.prompts == ["Start."]
    assert result.empty == [0]


TWO_LAYERS = [LanguageLayer(prompt="Think.", max_new_tokens=6), LanguageLayer(prompt="Answer.")]
TEMPLATES = [PriorTemplate(), GivenAnswer(" So {target}."), EditThought("Refine.", "Fix.")]


@pytest.mark.parametrize(("sharpening", "labels"), [(SoftmaxSharpening(1.5), True), (UniformWeights(), False)])
def test_a_step_of_two_layers(sharpening: Sharpening, labels: bool) -> None:
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=600,initializer_range=0.2"))
    batch, trust, error_weight = examples(labels), 0.7 if labels else 0.0, 0.5
    texts = ("Go.", "Say yes.", "Say what it is.")
    posterior = Posterior(samples=4, templates=TEMPLATES, sharpening=sharpening)
    stepper = stepper_of(lm, TWO_LAYERS, texts, trust, posterior)
    prompts = ["Think.", "Answer."]
    result = stepper.step(
        batch, prompts, PromptMemory(2, 2), [BanditStats() for _ in range(2)], error_weight, generator(3)
    )
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
    result = stepper.step(batch, prompts, PromptMemory(0, -1), [BanditStats() for _ in range(3)], 0.0, generator(1))
    assert set(result.candidates) == {0, 1, 2}


def test_a_layer_that_does_not_learn_stays(tiny: FrozenLM) -> None:
    layers = [TWO_LAYERS[0], replace(TWO_LAYERS[1], learn=False)]
    result = stepper_of(tiny, layers).step(
        examples(), ["Think.", "Answer."], PromptMemory(0, -1), [BanditStats(), BanditStats()], 0.0, generator()
    )
    assert set(result.candidates) == {0}
    assert result.prompts[1] == "Answer."


def test_a_step_follows_from_its_generator() -> None:
    results = []
    lm = FrozenLM.load(LMConfig(f"{TINY},max_position_embeddings=1024"))
    for seed in (5, 5, 6):
        stepper = stepper_of(lm, TWO_LAYERS)
        stepper.settings = replace(stepper.settings, proposals=[LanguageModelProposals(3, max_new_tokens=8, shown=1)])
        memory, arms = PromptMemory(0, -1), [BanditStats(), BanditStats()]
        result = stepper.step(examples(), ["Think.", "Answer."], memory, arms, 0.5, generator(seed))
        results.append(result.rows())
    assert results[0] == results[1] != results[2]


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
    middle = PlacedLayer(LanguageLayer(residual=False), 1, 3).place(example, "It is a.", " So a.")
    assert middle.before == "It is a. So a.\n\n", "the hint is in what the layer reads"
    whole = PlacedLayer(LanguageLayer(strip_options=False), 0, 2).place(example)
    assert whole.before == "Which? Options: a b\n\n"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PlacedLayer(LanguageLayer(template="{prompt}{hidden}{answer}"), 0, 2), "has {hidden}"),
        (lambda: PlacedLayer(LanguageLayer(template="{prompt}{question}{answer}"), 1, 2), "lacks {hidden}"),
        (
            lambda: PlacedLayer(LanguageLayer(template="{prompt}{passage}{answer}"), 0, 2).place(
                examples()[0], hint=" So a."
            ),
            "layer 0: GivenAnswer puts the target after {question}, which the layer's template lacks",
        ),
        (lambda: PlacedLayer(LanguageLayer(strip_options=True), 0, 1), "strip_options is true, but a single layer"),
        (lambda: LanguageLayer(template="{prompt}{question}{hidden}{answer}", residual=False), "residual is false"),
        (lambda: LanguageLayer(template="{question} {answer}"), "no {prompt}"),
        (lambda: LanguageLayer(max_new_tokens=0), "max_new_tokens"),
        (lambda: LanguageLayer(stop="("), "layers.stop '(' is not a regular expression"),
        (lambda: LanguageLayer(stop=""), "layers.stop is empty"),
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


def test_divergence_is_that_of_the_current_prompt_from_the_candidate() -> None:
    current, other = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    log_probs = torch.stack([current, other]).log()[:, None, None]  # [C, B, J, Y]
    found = divergence(log_probs, torch.ones(1, 1))
    assert found.tolist() == pytest.approx([0.0, 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)])
