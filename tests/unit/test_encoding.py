from __future__ import annotations

import pytest

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.encoding import Encoder, check_fits
from lightning_prompts.lm.loading import byte_tokenizer
from lightning_prompts.lm.plan import shared_prefix
from lightning_prompts.template import Template
from support.odd_tokenizers import sentencepiece_like

TEMPLATE = Template("Here are two{prompt} {question} and {answer}")
EXAMPLE = TEMPLATE.render({"question": "hot", "answer": "cold"})


def test_prompt_positions_stand_in_the_slot() -> None:
    row = Encoder(byte_tokenizer()).row(EXAMPLE, 3)
    assert [token for token in row.context if token < 0] == [-1, -2, -3]
    assert row.context.index(-1) == len("Here are two")
    assert len(row.answer) == len(" cold")


def test_bos_is_put_first_and_eos_nowhere() -> None:
    encoder = Encoder(sentencepiece_like())
    row = encoder.row(EXAMPLE, 2)
    assert encoder.bos_ids == [1]
    assert row.context[0] == 1
    assert 2 not in row.context + row.answer
    assert row.context.count(1) == 1


def test_pieces_inside_a_text_get_no_extra_space() -> None:
    tokenizer = sentencepiece_like()
    encoder = Encoder(tokenizer)
    whole = tokenizer.encode("hand hot", add_special_tokens=False)
    assert encoder.tokens("hand", start=True) + encoder.tokens(" hot") == whole
    assert encoder.tokens("hot") != tokenizer.encode("hot", add_special_tokens=False)


def test_pieces_join_to_the_whole_text(real: FrozenLM) -> None:
    row = real.encoder.row(EXAMPLE, 0)
    assert row.context + row.answer == real.tokenizer.encode("Here are two hot and cold")


def test_chat_goes_through_the_template(real: FrozenLM) -> None:
    example = Template("Opposite of{prompt} {question}? {answer}", chat=True, system="Be brief.").render(
        {"question": "hot", "answer": "cold"}
    )
    row = real.encoder.row(example, 1)
    slot = row.context.index(-1)
    text = real.text(row.context[:slot]) + "|" + real.text(row.context[slot + 1 :])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOpposite of| hot?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert real.text(row.answer) == "cold"


def test_chat_without_a_chat_template_is_refused() -> None:
    example = Template("{prompt} {question} {answer}", chat=True).render({"question": "a", "answer": "b"})
    with pytest.raises(UserError, match="no chat template; set chat: false"):
        Encoder(byte_tokenizer()).row(example, 1)


def test_nothing_before_the_answer_is_refused() -> None:
    example = Template("{prompt}{answer}").render({"answer": "b"}, "row 1")
    with pytest.raises(UserError, match="row 1: nothing precedes the answer"):
        Encoder(byte_tokenizer()).row(example, 0)


def test_shared_prefix() -> None:
    rows = [[7, 8, -1, -2, 9, 5, 6], [7, 8, -1, -2, 9, 4]]
    assert shared_prefix(rows, shared_prompt=True) == [7, 8, -1, -2, 9]
    assert shared_prefix(rows, shared_prompt=False) == [7, 8]
    assert shared_prefix(rows[:1], shared_prompt=True) == [7, 8, -1, -2, 9, 5], "one token of context stays"
    assert shared_prefix([[1], [1]], shared_prompt=True) == []


def test_the_window_holds_as_many_tokens_as_it_says() -> None:
    check_fits(EXAMPLE, total=10, length=3, name="it", context=10)
    with pytest.raises(UserError, match=r"prompt \(3\), text and answer are 11 tokens, more than .* of it \(10\)"):
        check_fits(EXAMPLE, total=11, length=3, name="it", context=10)
