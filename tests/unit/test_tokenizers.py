"""Pieces of a text are the tokens of the whole text, on every kind of tokenizer, or the row is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lightning_prompts.datamodules import QuestionAnswer
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.encoding import Encoder
from lightning_prompts.methods import HardPromptSearch, SoftPromptTuning
from lightning_prompts.search.candidates import round_trips
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.models import TINY
from support.odd_tokenizers import KINDS, save_model, tokenizer_of
from support.training import data, trainer

TEMPLATES = [
    "Here are two{prompt} {question} and {answer}.",
    "{prompt}Question: {question}\nAnswer: {answer}\n",
    "Question: {question}\n\n{prompt}\n\nAnswer: {answer}\n",
    "Q: {question}{prompt}\nA:\n{answer}\n\n",
    "Words: {prompt} {question}: {answer}",
    "{prompt}{question}ly {answer}",
]
PROMPTS = [" opposite words", "word", "\nA word\n", " ", ""]
SPACED = [kind for kind in KINDS if kind.startswith(("byte", "llama", "metaspace"))]


def whole_text(template: str, prompt: str) -> str:
    return template.format(prompt=prompt, question="hot", answer="cold")


def refused(encoder: Encoder, example: Example, prompt: str) -> str:
    try:
        slot = encoder.tokens(prompt, start=not example.before)
        encoder.row(example, len(slot), with_end=True)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_pieces_are_the_whole_text_or_refused(kind: str, template: str) -> None:
    """The same tokens; or other tokens of the same text, where the pieces cut a word apart."""
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, "the model")
    example = Template(template).render({"question": "hot", "answer": "cold"}, "row 1")
    for prompt in PROMPTS:
        if kind not in SPACED and (told := refused(encoder, example, prompt)):
            assert "the tokenizer of the model" in told
            continue
        slot = encoder.tokens(prompt, start=not example.before)
        row = encoder.row(example, len(slot), with_end=True)
        context = [slot[-1 - token] if token < 0 else token for token in row.context]
        whole = tokenizer.encode(whole_text(template, prompt), add_special_tokens=False)
        ids = context + row.answer + row.end
        assert ids == whole or tokenizer.decode(ids) == tokenizer.decode(whole), (template, prompt)


@pytest.mark.parametrize("kind", SPACED)
def test_text_inside_a_text_comes_back_as_it_was(kind: str) -> None:
    encoder = Encoder(tokenizer_of(kind))
    for text in (" opposite words", "word", "\nA word\n", "\n\n", "  two  spaces ", "é, ﬁ and 日本", " .", "'s", "\t1"):
        assert encoder.text(encoder.tokens(text)) == text
        assert encoder.round_trips(encoder.tokens(text))


@pytest.mark.parametrize("kind", ["llama 2", "metaspace always", "byte level, prefix space"])
def test_a_search_starts_with_its_defaults_and_keeps_words(kind: str, tmp_path: Path) -> None:
    L.seed_everything(0)
    model = HardPromptSearch(top_k=200, lm=LMConfig(save_model(tmp_path / "model", kind, TINY)), max_new_tokens=1)
    model.configure_model()
    assert model.lm.text(model.token_ids()) == " Answer the question, please."
    word = model.lm.encoder.tokens(" word")
    assert model.lm.text(word) == " word"
    candidates = model.token_ids().repeat(2, 1)
    candidates[1, : len(word)] = torch.tensor(word)
    assert round_trips(model.lm, candidates).tolist() == [True, True]
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=data())


def test_tokens_of_a_model_without_spaces_are_refused(tmp_path: Path) -> None:
    encoder = Encoder(tokenizer_of("words"), "m")
    with pytest.raises(UserError, match=r"the tokenizer of m reads 'word' like ' word'.*start the text with a space"):
        encoder.tokens("word")


def test_an_unknown_character_does_not_survive() -> None:
    encoder = Encoder(tokenizer_of("words"))
    assert not encoder.round_trips(encoder.tokens(" unheard"))


def test_dropped_line_breaks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    Encoder(tokenizer_of("drops line breaks"), "m")
    assert "the tokenizer of m drops line breaks" in caplog.text


def test_the_embedded_model_needs_no_marks(real: FrozenLM) -> None:
    texts = [" hot", "hot", "\n\nA", "  x", "\tx ", "1", ".", "é", " 日本", "a\n", "'s", "<x>"]
    assert [real.encoder.tokens(text) for text in texts] == [
        real.tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]


PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"


def swallowing(kind: str) -> PreTrainedTokenizerFast:
    """Phi-3's kind: control tokens that swallow the white space to their right."""
    tokenizer = KINDS[kind]()
    tokens = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = PHI
    return tokenizer


BOTH = "{% for m in messages %}<|user|>{{ m.content }}"


@pytest.mark.parametrize(
    ("chat_template", "end"),
    [
        (PHI, "<|end|>"),
        (BOTH + "{{ eos_token }}{% endfor %}", "</s>"),
        (BOTH + "\n{% endfor %}", "</s>"),
        (BOTH + "{% endfor %}", "</s>"),
        ("<|user|>{{ messages[0].content }}", "</s>"),
        ("{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}" + BOTH + "{% endfor %}", "</s>"),
    ],
)
def test_a_chat_without_text_after_the_answer_ends_as_the_turn_does(chat_template: str, end: str) -> None:
    tokenizer = swallowing("byte level")
    tokenizer.chat_template = chat_template
    encoder = Encoder(tokenizer, "m")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("</s>", end)}
    fields = {"question": "hot", "answer": "no"}
    labels = (("no",), ("no way",))
    chat, plain = (
        Template("Say{prompt} {question}? {answer}", chat=chat).render(fields, labels=labels) for chat in (True, False)
    )
    assert encoder.row(chat, 3, with_end=True).end == [ids[end]]
    for example, wanted in ((chat, ids[end]), (plain, ids["</s>"]), (replace(plain, end=None), ids["</s>"])):
        assert {tokens[-1] for tokens in encoder.label_tokens(example).tokens} == {wanted}
        assert encoder.end_token(example.chat) == wanted
    assert encoder.row(replace(chat, end=" x"), 3, with_end=True).end == encoder.tokens(" x")


def test_generation_ends_with_the_turn() -> None:
    tokenizer = swallowing("byte level")
    lm = FrozenLM.load(LMConfig(f"{TINY},vocab_size={len(tokenizer)}"), tokenizer)
    assert {*tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])} <= lm.end_tokens()


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("Say{prompt} {question}: {answer}", True),
        ("<|user|>\nSay{prompt} {question}<|end|>\n<|assistant|>\n{answer}<|end|>\n", False),
        ("<|user|> Say{prompt} {question}<|end|> {answer}<|end|>", False),
        ("Say {question} <|end|>\n\n{prompt}{answer}\n", False),
    ],
)
def test_what_follows_a_control_token_is_the_whole_text(kind: str, template: str, chat: bool) -> None:
    tokenizer = swallowing(kind)
    encoder = Encoder(tokenizer, "m")
    example = Template(template, chat=chat).render({"question": "hot", "answer": "cold"}, "row 1")
    before, after, answer = encoder.texts(example)
    for prompt in ["", " opposite words"] if before.endswith("Say") else [""]:
        slot = encoder.tokens(prompt)
        row = encoder.row(example, len(slot))
        context = [slot[-1 - token] if token < 0 else token for token in row.context]
        whole = tokenizer.encode(f"{before}{prompt}{after}{answer}", add_special_tokens=False)
        assert context + row.answer == whole, (template, prompt)


def test_control_tokens_in_a_row_are_told_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Hugging Face's tokenizers read them; those of the template are meant."""
    files = {}
    for split in ("train", "val", "test"):
        table = [{"question": f"{split} {n}", "answer": f"a{n}", "note": f"{n} <|end|>"} for n in range(8)]
        if split == "train":
            table[3]["question"], table[5]["answer"] = "what is <|end|> for", "x<|end|>"
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("\n".join(map(json.dumps, table)))
    rows = QuestionAnswer(**files, template="{prompt} {question}<|end|> {answer}\n")  # type: ignore[arg-type]
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(SoftPromptTuning(2, lm=LMConfig(TINY)), datamodule=rows)
    (told,) = [message for message in caplog.messages if "control token" in message]
    assert "train.jsonl row 4: field 'question' contains '<|end|>', which the tokenizer of random:llama" in told
    assert "as a control token and not as text; change the text unless this is intended (and 1 more like it)" in told


@pytest.mark.parametrize(
    ("kind", "question", "answer", "words"),
    [
        (
            "words",
            "hot unheard",
            "cold",
            "has no token for a part of 'A word hot unheard: cold'; change the text, or use",
        ),
        ("unigram", "hot", "c\u00f6ld", "has no token for a part of 'A word hot: c\u00f6ld'"),
        ("lowercase", "HOT", "Cold", "turns the answer 'Cold' into 'cold', so no generation can match it"),
        ("nfkc", "hot", "\ufb01ve", "turns the answer '\ufb01ve' into 'five'"),
        ("nfkc", "hot", "a\u00a0b", "turns the answer 'a\\xa0b' into 'a b'"),
        ("lowercase", "HOT", "cold", ""),
        ("words", "hot", "cold", ""),
        ("unigram", "hot  word", "cold", ""),
        ("llama 2", "H\u00f6t", "C\u00f6ld", ""),
    ],
)
def test_texts_that_a_tokenizer_does_not_keep_are_told(
    kind: str, question: str, answer: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = Template("A word{prompt} {question}: {answer}")
    rows = [
        template.render({"question": "hot", "answer": "cold"}, "row 1"),
        template.render({"question": question, "answer": answer}, "row 2"),
    ]
    encoder = Encoder(tokenizer_of(kind), "m")
    caplog.clear()
    encoder.warn_of_losses(rows)
    assert len(caplog.messages) == bool(words)
    assert f"row 2: the tokenizer of m {words}" in caplog.text or not words


def turns(template: str, **settings: Any) -> tuple[Encoder, Any]:
    tokenizer = KINDS["byte level"]()
    tokenizer.chat_template = template
    example = Template("Say{prompt} {question}? {answer}", chat=True, **settings).render(
        {"question": "a\ue000b\ue001", "answer": "x"}, "row 7"
    )
    return Encoder(tokenizer, "m"), example


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
TRIMMED = PLAIN.replace("m.content", "m.content | trim")


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, f"{{# \ue002 #}}{PLAIN}"])
def test_a_question_may_hold_any_character(template: str) -> None:
    encoder, example = turns(template, system="Be brief.")
    before, after, _ = encoder.texts(example)
    assert (before, after) == ("<system>Be brief.\n<user>Say", " a\ue000b\ue001?\n<assistant>")


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (PLAIN.replace("m.content", "'x'"), {}, "shows 0 times the user's turn"),
        (PLAIN.replace("m.content", "m.content | upper"), {}, "changes the user's turn"),
        (PLAIN.replace("m.content", "m.content[:6]"), {}, "changes the user's turn"),
        (PLAIN.replace("m.content", "m.content ~ m.content"), {}, "shows 2 times the user's turn"),
        (PLAIN.replace("m.content", "m.content | replace('?', '')"), {}, "changes the user's turn 'Say a.*once and"),
        (
            PLAIN.replace("in messages", "in messages if m.role == 'user'"),
            {"system": "Be brief."},
            "drops or changes the system turn 'Be brief.'; remove data.system",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN,
            {"system": "Be brief."},
            "does not support a system turn; remove data.system",
        ),
        ("{{ raise_exception('never') }}", {}, r"the chat template of m fails \(never\)"),
        ("{{ messages[0].content.nothing.more }}", {}, "the chat template of m fails"),
    ],
)
def test_a_chat_template_that_loses_text_is_refused(template: str, settings: dict[str, str], words: str) -> None:
    encoder, example = turns(template, **settings)
    with pytest.raises(UserError, match=words) as raised:
        encoder.row(example, 2)
    assert str(raised.value).startswith("row 7: the chat template of m")
    assert "\n" not in str(raised.value)
