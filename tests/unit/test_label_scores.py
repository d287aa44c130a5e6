"""Classes scored by whole label strings, against one text at a time; answers drawn at a temperature."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig, Sampling, label_scores
from lightning_prompts.lm.encoding import Encoder
from lightning_prompts.lm.labels import CONTENT_FREE, without_content
from lightning_prompts.lm.passes import ContinuationScorer
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.models import TINY
from support.references import TEMPLATES, TWO, alike, plain_classes, plain_sum

SIX = (("(A)",), ("(B)",), ("an entity", "entity"), ("abbreviation",), ("human being", "human"), ("x",))


def examples(name: str = "prompt first") -> list[Example]:
    """Two label sets side by side."""
    template = Template(TEMPLATES[name])
    rows = [("Is it?", "yes", TWO), ("What is that, over there?", "x", SIX), ("Which?", "(B)", SIX), ("?", "no", TWO)]
    return [template.render({"question": q, "answer": a}, labels=labels) for q, a, labels in rows]


def soft(lm: FrozenLM, *shape: int) -> torch.Tensor:
    noise = torch.randn(*shape, lm.width, generator=torch.Generator().manual_seed(1))
    return noise * lm.embedding_matrix().float().std()


@pytest.mark.parametrize(
    ("shape", "per_row", "name"),
    [
        *(("gemma3", per_row, name) for per_row in (False, True) for name in TEMPLATES),
        ("llama", True, "example first"),
        ("gpt2", False, "prompt first"),
    ],
)
def test_classes_equal_one_text_at_a_time(
    shape: str, per_row: bool, name: str, shapes: Callable[[str], FrozenLM]
) -> None:
    lm, rows = shapes(shape), examples(name)
    prompt = soft(lm, 4, 5) if per_row else soft(lm, 5)
    scores = label_scores(lm, rows, prompt)
    assert scores.log_probs.shape == (4, 6)
    for b, example in enumerate(rows):
        vectors = prompt[b] if per_row else prompt
        expected = plain_classes(lm, example, vectors)
        assert torch.allclose(scores.log_probs[b, : len(example.labels)], expected, atol=1e-4)
        assert torch.isinf(scores.log_probs[b, len(example.labels) :]).all()
        row = lm.encode([example], 5)[0]
        mean = plain_sum(lm, row.context, row.answer, vectors) / len(row.answer)
        assert scores.nll[b] == pytest.approx(-mean, abs=1e-4)


def test_keys_and_values_in_front_and_the_real_model(real: FrozenLM) -> None:
    vectors = soft(real, 3)
    rows = [replace(example, answer=None) for example in examples()]
    known = real.key_values(vectors)
    first = label_scores(real, rows, known)
    assert first.nll == [None] * 4
    # The same vectors as the first tokens of the text: what stands in front of everything is what starts it.
    assert torch.allclose(first.log_probs, label_scores(real, rows, vectors).log_probs, atol=1e-4)
    assert torch.allclose(first.log_probs[0, :2], plain_classes(real, rows[0], vectors), atol=1e-4)


@pytest.mark.parametrize("per_row", [False, True])
def test_calibration_takes_off_what_is_said_without_a_question(per_row: bool, tiny: FrozenLM) -> None:
    rows = examples()
    prompt = soft(tiny, 4, 3) if per_row else soft(tiny, 3)
    scores = label_scores(tiny, rows, prompt, calibrate=True)
    for b, example in enumerate(rows):
        vectors = prompt[b] if per_row else prompt
        bare = [replace(example, after=example.after.replace(example.question, text)) for text in CONTENT_FREE]
        bias = torch.stack([plain_classes(tiny, one, vectors) for one in bare]).exp().mean(0)
        odds = plain_classes(tiny, example, vectors).exp() / bias
        expected = (odds / odds.sum()).log()
        assert torch.allclose(scores.log_probs[b, : len(example.labels)], expected, atol=1e-4)


def test_calibration_is_of_the_same_system_turn(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", CHAT)
    rows = [replace(examples()[0], chat=True, system=system) for system in ("Be brief.", "Say no to all of it.")]
    prompt = tiny.no_prompt()
    both = label_scores(tiny, rows, prompt, calibrate=True).log_probs
    alone = [label_scores(tiny, [row], prompt, calibrate=True).log_probs[0] for row in rows]
    assert torch.allclose(both, torch.stack(alone), atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_calibration_needs_the_question_in_the_text() -> None:
    example = Template("{prompt}{text}: {answer}").render({"text": "a", "question": "b", "answer": "x"}, labels=SIX)
    with pytest.raises(UserError, match="field 'question'"):
        without_content(example)
    with pytest.raises(UserError, match="field 'question'"):
        without_content(replace(example, fields={**example.fields, "hidden": "so"}))
    for fields in ({"text": "a"}, {"text": "a", "hidden": "so"}):
        with pytest.raises(UserError, match="field 'question'"):
            without_content(replace(example, fields=fields))


def test_calibration_leaves_the_words_around_a_short_question() -> None:
    template = Template("Sort on a scale.{prompt}\nQuestion: {question}\nThought: {hidden}\nAnswer: {answer}")
    example = template.render({"question": "on", "hidden": "A", "answer": "x"}, labels=SIX)
    for bare, text in zip(without_content(example), CONTENT_FREE, strict=True):
        assert bare.after == f"\nQuestion: {text}\nThought: {text}\nAnswer:"


@pytest.mark.parametrize(
    ("text", "question"),
    [("{prompt}\n_{question}_\nAnswer: {answer}\n", "Is it"), ("评论{question}情感{prompt}{answer}\n", "很好")],
)
def test_calibration_finds_a_question_that_touches_words(text: str, question: str) -> None:
    example = Template(text).render({"question": question, "answer": "x"}, labels=SIX)
    for bare, empty in zip(without_content(example), CONTENT_FREE, strict=True):
        parts = [part.replace(question, empty) for part in (example.before, example.after)]
        assert [bare.before, bare.after] == parts != [example.before, example.after]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{prompt}_{question}_\n{hidden}\nAnswer: {answer}", "_N/A_\nN/A\nAnswer:"),
        ("评论{question}情感{prompt}\n{hidden}\n{answer}", "评论N/A情感\nN/A"),
        ("_{question}_ on{prompt} {hidden}{answer}", "_N/A_ on N/A"),
    ],
)
def test_calibration_finds_what_touches_words_beside_other_text(text: str, wanted: str) -> None:
    example = Template(text).render({"question": "很好", "hidden": "It is so.", "answer": "x"}, labels=SIX)
    bare = without_content(example)[0]
    assert bare.before + bare.after == wanted


def test_calibration_of_thoughts_without_the_question() -> None:
    template = Template("{prompt}\n{hidden}\nAnswer: {answer}")
    for hidden in ("It is so.", ""):
        example = template.render({"question": "Is it?", "hidden": hidden, "answer": "x"}, labels=SIX)
        afters = [f"\n{text if hidden else hidden}\nAnswer:" for text in CONTENT_FREE]
        assert [bare.after for bare in without_content(example)] == afters


def test_what_labels_share_runs_once(tiny: FrozenLM) -> None:
    rows = [replace(example, answer=None) for example in examples()[:1]]
    before = tiny.tokens_forwarded
    label_scores(tiny, rows, soft(tiny, 5))
    context = 5 + len("Is it?\nAnswer:")  # bytes are tokens
    feeds = [" yes it i", "yes it i", " correc", "correc", " n", "n"]  # " yes" and "yes" begin the longer ones
    assert tiny.tokens_forwarded - before == context + sum(map(len, feeds))


# --- labels that begin alike ------------------------------------------------------------------------------------------


CHAT = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("shape", "calibrate", "end"),
    [
        *(("llama", False, end) for end in ("\n", " so.", "", None)),
        *(("gemma3", True, end) for end in ("\n", None)),
    ],
)
def test_labels_that_begin_alike_are_scored_with_their_ends(
    shape: str, calibrate: bool, end: str | None, shapes: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, rows = shapes(shape), alike(end)
    monkeypatch.setattr(lm.tokenizer, "chat_template", CHAT)
    prompt = soft(lm, 3, 4)
    scores = label_scores(lm, rows, prompt, calibrate)
    last = lm.encoder.tokens(end)[-1] if end else lm.tokenizer.eos_token_id
    assert {ids[-1] for ids in lm.encoder.label_tokens(rows[0]).tokens} == {last}
    assert tuple(lm.encoder.tokens("yes")) in lm.encoder.label_tokens(rows[1]).tokens, "others are scored as they were"
    for b, example in enumerate(rows):
        expected = plain_classes(lm, example, prompt[b])
        if calibrate:
            bare = [replace(example, after=example.after.replace(example.question, text)) for text in CONTENT_FREE]
            bias = torch.stack([plain_classes(lm, one, prompt[b]) for one in bare]).exp().mean(0)
            expected = (expected - bias.log()).log_softmax(0)
        assert torch.allclose(scores.log_probs[b, : len(example.labels)], expected, atol=1e-4)
        row = lm.encode([example], 4)[0]
        mean = plain_sum(lm, row.context, row.answer, prompt[b]) / len(row.answer)
        assert scores.nll[b] == pytest.approx(-mean, abs=1e-4), "of the answer's tokens alone"


def test_a_prompt_says_10_where_it_writes_10() -> None:
    """A prompt trained on labels 1 and 10: classes are those that it writes as free text."""
    lm = FrozenLM.load(LMConfig(f"{TINY},initializer_range=0.3"))
    template = Template("{prompt}{question}:{answer}\n")
    rows = [template.render({"question": q, "answer": a}, labels=[["1"], ["10"]]) for q, a in (("a", "1"), ("b", "10"))]
    prompt = soft(lm, 8).requires_grad_()
    optimizer = torch.optim.Adam([prompt], 0.1)
    for _ in range(140):
        scores = lm.score(rows, prompt, with_end=True)
        optimizer.zero_grad()
        (scores.nll + scores.end_nll).mean().backward()
        optimizer.step()
    trained = prompt.detach()
    assert lm.generate(rows, trained, 4) == ["1", "10"]
    assert label_scores(lm, rows, trained).log_probs.argmax(-1).tolist() == [0, 1]


def test_ends_cost_a_few_tokens(tiny: FrozenLM) -> None:
    example = replace(alike()[0], answer=None, labels=(("1",), ("10",)))
    before = tiny.tokens_forwarded
    label_scores(tiny, [example], soft(tiny, 5))
    context = 5 + len("How many are there?\nAnswer:")
    feeds = [" 1", " 10", "1", "10"]  # the last token is predicted, not run; 1 before its end is the start of 10
    assert tiny.tokens_forwarded - before == context + sum(len(feed) for feed in feeds if "0" in feed)


@pytest.mark.parametrize("per_row", [False, True])
def test_many_labels_are_scored_a_few_rows_at_a_time(
    per_row: bool, tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, prompt = alike() * 2, soft(tiny, 6, 4) if per_row else soft(tiny, 4)
    expected = label_scores(tiny, rows, prompt)
    real, sizes = FrozenLM.continuation_scores, []

    def counted(lm: FrozenLM, contexts: list[list[int]], *rest: object) -> torch.Tensor:
        sizes.append(len(contexts))
        return real(lm, contexts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenLM, "continuation_scores", counted)
    feeds = [" no way", "no way", " nope", "nope", " one", "one", " 10", "10"]
    monkeypatch.setattr("lightning_prompts.lm.labels.MOST_LOGITS", tiny.vocabulary * 4 * (1 + sum(map(len, feeds))))
    found = label_scores(tiny, rows, prompt)
    assert sizes == [4, 2]
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    assert found.nll == pytest.approx(expected.nll, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "ended"),
    [
        ([["no"], ["no way"]], True),
        ([["no"], ["yes", "no way"]], True),
        ([["no", "no way"], ["yes"]], False),  # one class's own
        ([["no"], ["nope"]], False),  # other tokens: " no" and " n" "ope"
        ([["C"], ["C++"]], True),
        ([["5"], ["50"]], True),
        ([["A+"], ["A"]], True),
        ([["negative"], ["positive"]], False),
    ],
)
def test_tokens_that_begin_alike_count_and_letters_do_not(labels: list[list[str]], ended: bool, real: FrozenLM) -> None:
    template = Template("{prompt}{question}: {answer}\n")
    known = real.encoder.label_tokens(template.render({"question": "a"}, labels=labels))
    texts = [f"{space}{text}" for way in labels for text in way for space in (" ", "")]
    assert [real.text(list(ids)) for ids in known.tokens] == [text + "\n" * ended for text in texts]
    assert known.owners == tuple(index for index, way in enumerate(labels) for _ in way for _ in range(2))


def test_labels_without_an_end(tiny: FrozenLM, caplog: pytest.LogCaptureFixture) -> None:
    labels = (("1",), ("10",), ("2",))
    example = replace(alike("")[0], labels=labels)
    encoder = Encoder(tiny.tokenizer, "it")
    with caplog.at_level(logging.WARNING):
        encoder.label_tokens(replace(example, labels=TWO))
        encoder.label_tokens(replace(example, end=None))
        encoder.label_tokens(replace(example, end=";"))
        assert caplog.messages == []
        found = [encoder.label_tokens(example) for _ in range(2)]
    assert found[0].tokens[0] == (*tiny.encoder.tokens(" 1"), tiny.tokenizer.eos_token_id)
    (told,) = caplog.messages
    assert told.startswith("labels '1' and '10' begin alike, and the template has no text after {answer}")
    endless = copy.deepcopy(tiny.tokenizer)
    endless.eos_token = None
    for end in ("", None):
        with pytest.raises(
            UserError, match=r"^labels '1' and '10' begin alike, and nothing marks the end of a label.* \\n$"
        ):
            Encoder(endless, "it").label_tokens(replace(example, end=end))
    assert len(Encoder(endless, "it").label_tokens(replace(example, end=";")).tokens) == 6


def test_an_end_that_a_label_has_in_it(tiny: FrozenLM) -> None:
    example = replace(alike(".")[0], labels=(("U.S.",), ("U.S",)))
    with pytest.raises(UserError, match=r"^labels 'U\.S' and 'U\.S\.' begin alike, even with the text after {answer};"):
        tiny.encoder.label_tokens(example)


def test_the_window_has_room_for_the_end(tiny: FrozenLM) -> None:
    example = replace(alike(" and so on")[0], source="row 3", answer=None, reference=None)
    room = tiny.context - 2 - len("How many are there?\nAnswer:") - len(" and so on")
    label_scores(tiny, [replace(example, labels=(("a",), ("a" * (room - 1),)))], soft(tiny, 2))
    with pytest.raises(UserError, match=r"row 3: .* are 257 tokens, more than the context window"):
        label_scores(tiny, [replace(example, labels=(("a",), ("a" * room,)))], soft(tiny, 2))


def test_two_labels_of_the_same_tokens(tiny: FrozenLM) -> None:
    example = replace(examples()[0], labels=(("a",), (" a",)), reference="a")
    with pytest.raises(UserError, match="have the same tokens"):
        label_scores(tiny, [example], soft(tiny, 2))


def test_a_label_beyond_the_window(tiny: FrozenLM) -> None:
    example = replace(examples()[0], source="row 3", labels=(("a" * 300,), ("b",)), answer=None, reference=None)
    with pytest.raises(UserError, match=r"row 3: .* more than the context window"):
        label_scores(tiny, [example], soft(tiny, 2))


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, float("-inf")]])
    count = 4000
    drawn = Sampling(0.7, range(count)).choose(logits.expand(count, -1), 0)
    shares = torch.bincount(drawn, minlength=4) / count
    expected = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(shares, expected, atol=0.03)
    assert shares[3] == 0


def test_a_row_s_draws_do_not_depend_on_the_batch(tiny: FrozenLM, antonyms: list[Example]) -> None:
    prompt = soft(tiny, 4)
    seeds = [7, 8, 9, 10, 11, 12, 13]
    together = tiny.generate(antonyms, prompt, 9, Sampling(1.0, seeds))
    alone = [
        tiny.generate([one], prompt, 9, Sampling(1.0, [seed]))[0] for one, seed in zip(antonyms, seeds, strict=True)
    ]
    assert together == alone
    assert together != tiny.generate(antonyms, prompt, 9, Sampling(1.0, [seed + 50 for seed in seeds]))
    cold = tiny.generate(antonyms, prompt, 9, Sampling(1e-4, seeds))
    assert cold == tiny.generate(antonyms, prompt, 9)


def test_draws_of_one_context_run_it_once(tiny: FrozenLM, antonyms: list[Example]) -> None:
    prompt = soft(tiny, 4)
    repeated = [example for example in antonyms[:2] for _ in range(3)]
    plain = tiny.generate_tokens(tiny.encode(repeated, 4), prompt, 6, sampling=Sampling(1.0, range(6)))
    before = tiny.tokens_forwarded
    grouped = tiny.generate_tokens(tiny.encode(repeated, 4), prompt, 1, sampling=Sampling(1.0, range(6), group=3))
    rows = tiny.encode(antonyms[:2], 4)
    shared = len("Here are two") + 4 + 1  # the texts and the slot, and the space after it
    assert tiny.tokens_forwarded - before == shared + sum(len(row.context) - shared - 1 for row in rows) + 6
    grouped = tiny.generate_tokens(tiny.encode(repeated, 4), prompt, 6, sampling=Sampling(1.0, range(6), group=3))
    assert grouped == plain


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature, [1])


# --- prompts x examples x labels --------------------------------------------------------------------------------------

PROMPTS = ["Say it.", "", "Answer the question, if there is one.", "Say"]


@pytest.mark.parametrize(("shape", "name"), [("llama", "example first"), ("gemma2", "prompt first")])
def test_a_grid_of_continuations_equals_one_text_at_a_time(
    shape: str, name: str, shapes: Callable[[str], FrozenLM]
) -> None:
    lm, rows = shapes(shape), examples(name)
    prompts = [lm.encoder.tokens(text) for text in PROMPTS]
    continuations = [lm.encoder.label_tokens(example).tokens for example in rows]
    scorer = ContinuationScorer(lm)
    found = scorer.score(lm.encode(rows, 1), prompts, continuations)
    for c, ids in enumerate(prompts):
        vectors = lm.embed(torch.tensor(ids, dtype=torch.long))
        for n, example in enumerate(rows):
            context = lm.encode([replace(example, answer=None)], len(ids))[0].context
            expected = [plain_sum(lm, context, list(text), vectors) for text in continuations[n]]
            assert found[c][n] == pytest.approx(expected, abs=1e-4)
    pieces = ContinuationScorer(lm, memory_mb=1e-3).score(lm.encode(rows, 1), prompts, continuations)
    for one, other in zip(found, pieces, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            # Float32 holds seven digits of these sums, and how threads share a product decides the last one.
            assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-6)


def test_whichever_comes_first_is_shared(tiny: FrozenLM) -> None:
    prompts = [[40 + c] * 20 for c in range(4)]
    tokens = {}
    for name in TEMPLATES:
        rows = [replace(example, labels=(("1",), ("2",))) for example in examples(name)]
        before = tiny.tokens_forwarded
        ContinuationScorer(tiny).score(tiny.encode(rows, 1), prompts, [[[49], [50]]] * len(rows))
        tokens[name] = tiny.tokens_forwarded - before
    sizes = [len(example.question) for example in examples()]
    assert tokens["prompt first"] == 4 * 20 + 4 * sum(size + len("\nAnswer:") for size in sizes)
    assert tokens["example first"] == len("Q: ") + sum(size + len("\n") for size in sizes) + 4 * 4 * (20 + 0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_blocks_that_begin_alike_run_that_once(name: str, tiny: FrozenLM) -> None:
    rows = [
        replace(example, after=f"{example.after} {thought}")
        for example in examples(name)[:2]
        for thought in ("abc", "def", "ghi")
    ]
    prompts, texts = [[40 + c] * 9 for c in range(3)], [[[49], [50, 51]]] * 6
    before = tiny.tokens_forwarded
    plain = ContinuationScorer(tiny).score(tiny.encode(rows, 1), prompts, texts)
    middle = tiny.tokens_forwarded
    found = ContinuationScorer(tiny).score(tiny.encode(rows, 1), prompts, texts, block=3)
    assert torch.allclose(torch.tensor(found), torch.tensor(plain), atol=1e-5)
    fewer = (middle - before) - (tiny.tokens_forwarded - middle)
    shared = [len(example.question) + len("\nAnswer: ") for example in examples()[:2]]
    assert fewer == 3 * 2 * sum(shared) if name == "prompt first" else fewer > 0
    pieces = ContinuationScorer(tiny, memory_mb=1e-3).score(tiny.encode(rows, 1), prompts, texts, block=3)
    assert torch.allclose(torch.tensor(pieces), torch.tensor(plain), atol=1e-5)


def test_continuations_survive_want_of_memory(tiny: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.encode(examples(), 1)
    prompts, texts = [[40 + c] * 5 for c in range(4)], [[[49], [50, 51]]] * 4
    expected = ContinuationScorer(tiny).score(rows, prompts, texts)
    real, sizes = FrozenLM.continuation_scores, []

    def small_memory(lm: FrozenLM, contexts: list[list[int]], *rest: object, **more: object) -> torch.Tensor:
        sizes.append(len(contexts) // 4)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(lm, contexts, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenLM, "continuation_scores", small_memory)
    found = ContinuationScorer(tiny).score(rows, prompts, texts)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
