from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_prompts.lm import FrozenLM, generation
from lightning_prompts.lm.language_model import Usage
from lightning_prompts.lm.sampling import Sampling
from lightning_prompts.template import Template, cut
from lightning_prompts.types import Example
from support.models import SHAPES

Models = Callable[[str], FrozenLM]


def make_prompt(lm: FrozenLM, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, lm.width, generator=generator) * lm.embedding_matrix().float().std()


@torch.no_grad()
def teacher_forced(lm: FrozenLM, context: list[int], prompt: torch.Tensor, count: int) -> list[int]:
    """Greedy tokens without a cache: the whole row again for each token, with transformers' own attention."""
    ids = list(context)
    for _ in range(count):
        index = torch.tensor(ids)
        vectors = lm.embed(index.clamp(min=0)).clone()
        vectors[index < 0] = prompt[-1 - index[index < 0]].to(vectors.dtype)
        ids.append(int(lm.model(inputs_embeds=vectors[None]).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize(
    ("shape", "per_row"), [*((shape, True) for shape in SHAPES), ("llama", False), ("gemma3", False)]
)
def test_greedy_equals_the_teacher_forced_argmax(
    shape: str, per_row: bool, shapes: Models, antonyms: list[Example]
) -> None:
    lm = shapes(shape)
    prompt = make_prompt(lm, len(antonyms), 4) if per_row else make_prompt(lm, 4)
    rows = lm.encode(antonyms, 4)
    ends = lm.end_tokens()
    for b, tokens in enumerate(lm.generate_tokens(rows, prompt, 8)):
        expected = teacher_forced(lm, rows[b].context, prompt[b] if per_row else prompt, 8)
        cut = next((i for i, token in enumerate(expected) if token in ends), 8)
        assert tokens == expected[:cut]


@pytest.mark.parametrize("stops", [None, "i", "[a-m]", "."])
@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("drawn", [False, True])
def test_reading_tokens_a_pass_late_changes_nothing(
    stops: str | None,
    limit: int,
    drawn: bool,
    tiny: FrozenLM,
    antonyms: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, prompt = tiny.encode(antonyms, 4), make_prompt(tiny, 4)
    found = []
    for late in (False, True):
        monkeypatch.setattr(generation, "reads_late", lambda device, late=late: late)
        sampling = Sampling(1.0, range(len(rows))) if drawn else None
        before = tiny.usage + Usage()
        patterns = None if stops is None else [stops] * len(rows)
        found.append((tiny.generate_tokens(rows, prompt, limit, patterns, sampling), tiny.usage - before))
    (now, used), (later, used_late) = found
    assert later == now
    assert used_late == used


def test_the_real_model_generates_its_argmax_whatever_the_batch(real: FrozenLM, antonyms: list[Example]) -> None:
    prompt = real.embed(torch.tensor(real.encoder.tokens(" antonyms")))
    rows = real.encode(antonyms[:3], len(prompt))
    together = real.generate_tokens(rows, prompt, 6)
    assert together == [real.generate_tokens([row], prompt, 6)[0] for row in rows]
    assert together[0] == teacher_forced(real, rows[0].context, prompt, 6)
    theirs = real.model.generate(
        **real.tokenizer("Here are two antonyms hot and", return_tensors="pt"), max_new_tokens=6, do_sample=False
    )
    assert theirs[0, -6:].tolist() == together[0]


def test_greedy_flag_of_a_score_agrees_with_generation(real: FrozenLM, antonyms: list[Example]) -> None:
    prompt = real.embed(torch.tensor(real.encoder.tokens(" antonyms")))
    rows = real.encode(antonyms, len(prompt))
    generated = real.generate_tokens(rows, prompt, 8)
    greedy = real.score(antonyms, prompt).greedy.tolist()
    assert greedy == [tokens[: len(row.answer)] == row.answer for tokens, row in zip(generated, rows, strict=True)]
    assert True in greedy
    assert False in greedy


def test_a_stop_ends_a_row_early(real: FrozenLM) -> None:
    template = Template("Here are two{prompt} {question} and {answer}", stop=r"[^\w'-]")
    examples = [template.render({"question": word}) for word in ("hot", "day")]
    before = real.tokens_forwarded
    texts = real.generate(examples, real.embed(torch.tensor(real.encoder.tokens(" antonyms"))), 50)
    assert all(text.isalpha() for text in texts)
    assert real.tokens_forwarded - before < 40


@pytest.mark.parametrize("stop", [r"\Z", "$", "(?!.)"])
def test_an_empty_match_at_the_end_of_the_text_is_no_stop(stop: str, tiny: FrozenLM, antonyms: list[Example]) -> None:
    """It would end any text after its first token."""
    rows, prompt = tiny.encode(antonyms[:3], 4), make_prompt(tiny, 4)
    whole = [tiny.text(ids, special=False) for ids in tiny.generate_tokens(rows, prompt, 7)]
    found = [tiny.text(ids, special=False) for ids in tiny.generate_tokens(rows, prompt, 7, [stop] * 3)]
    assert [cut(text, stop) for text in found] == [cut(text, stop) for text in whole]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_row_near_the_end_of_the_window_stops_alone(room: int, shapes: Models) -> None:
    """GPT-2's learned positions fail when one is asked for that does not exist."""
    lm = shapes("gpt2")
    template = Template("{prompt}{question}: {answer}")
    prompt = make_prompt(lm, 4)
    long, short = (template.render({"question": "x" * size}) for size in (lm.context - 5 - room, 3))
    rows = lm.encode([long, short], 4)
    assert len(rows[0].context) == lm.context - room
    together = lm.generate_tokens(rows, prompt, 8)
    assert together == [lm.generate_tokens([row], prompt, 8)[0] for row in rows]
    assert [len(tokens) for tokens in together] == [room, 8]


def test_no_tokens_asked_for(tiny: FrozenLM, antonyms: list[Example]) -> None:
    assert tiny.generate_tokens(tiny.encode(antonyms, 2), make_prompt(tiny, 2), 0) == [[] for _ in antonyms]


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("kind", ["greedy", "drawn", "drawn, in groups", "a prompt per row"])
def test_out_of_memory_halves_the_batch_and_changes_nothing(
    kind: str, most: int, tiny: FrozenLM, antonyms: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [example for example in antonyms[:4] for _ in range(2)]
    prompt = torch.randn(8, 3, tiny.width) if kind == "a prompt per row" else torch.randn(3, tiny.width)

    def generate() -> list[str]:
        group = 2 if kind == "drawn, in groups" else None
        sampling = Sampling(0.7, range(8), group) if "drawn" in kind else None
        return tiny.generate(examples, prompt, 6, sampling)

    expected = generate()
    plain = generation._generate
    passes: list[int] = []

    def small(lm: FrozenLM, rows: Any, *args: Any) -> Any:
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passes.append(len(rows))
        return plain(lm, rows, *args)

    monkeypatch.setattr(generation, "_generate", small)
    assert generate() == expected
    assert sum(passes) == 8
    assert max(passes) <= most
