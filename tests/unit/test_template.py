from __future__ import annotations

import pytest

from lightning_prompts.errors import UserError
from lightning_prompts.template import Template, cut

ROW = {"question": "hot", "answer": "cold"}


def test_infill() -> None:
    example = Template("Here are two{prompt} {question} and {answer}").render(ROW)
    assert (example.before, example.after, example.answer) == ("Here are two", " hot and", " cold")
    assert example.reference == "cold"


def test_prompt_first_and_last() -> None:
    first = Template("{prompt}\nQuestion: {question}\nAnswer: {answer}").render(ROW)
    assert (first.before, first.after, first.answer) == ("", "\nQuestion: hot\nAnswer:", " cold")
    last = Template("{question}{prompt} {answer}").render(ROW)
    assert (last.before, last.after, last.answer) == ("hot", "", " cold")


def test_text_after_the_answer_is_its_end() -> None:
    example = Template("{prompt} {question} = {answer};").render(ROW)
    assert (example.answer, example.reference, example.end) == (" cold", "cold", ";")
    assert Template("{prompt} {answer}", chat=True).render(ROW).end is None, "the end of the turn"


def test_braces_in_values_mean_nothing() -> None:
    example = Template("{prompt} {{{question}}} {answer}").render({"question": "{x} {prompt}", "answer": "{y}"})
    assert example.after == " {{x} {prompt}}"
    assert example.answer == " {y}"


def test_chat_keeps_the_answer_without_leading_space() -> None:
    example = Template("{prompt} {question}\n{answer}", chat=True).render(ROW)
    assert (example.after, example.answer) == (" hot", "cold")


def test_no_reference() -> None:
    assert Template("{prompt} {question} {answer}").render({"question": "hot"}).answer is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{question} {answer}", "no {prompt}"),
        ("{prompt} {question}", "no {answer}"),
        ("{prompt}{prompt} {answer}", "more than one {prompt}"),
        ("{answer} {prompt}", "must be the last"),
        ("{prompt} {answer", "braces"),
        ("{prompt} {question!r} {answer}", "plain field name"),
        ("{prompt} {question.__class__} {answer}", "plain field name"),
    ],
)
def test_bad_templates(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("{", r"\{").replace("}", r"\}")):
        Template(text)


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"row 3: template field \{quesion\} is unknown; did you mean question\?"):
        Template("{prompt} {quesion} {answer}").render(ROW, "row 3")


def test_bad_stop() -> None:
    with pytest.raises(UserError, match="not a regular expression"):
        Template("{prompt} {answer}", stop="[")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [(" cold, warm", r"[^\w'-]", "cold"), ("\n four\nQuestion", r"\n", "four"), ("x", r"\n", "x"), ("", r"\n", "")],
)
def test_cut(text: str, stop: str, expected: str) -> None:
    assert cut(text, stop) == expected


TYPES = (("expression", "abbreviation"), ("human",))


@pytest.mark.parametrize(("answer", "index"), [("expression", 0), (" human ", 1), (None, None)])
def test_the_class_of_a_reference(answer: str | None, index: int | None) -> None:
    template = Template("{prompt}\n{question}\nAnswer: {answer}")
    example = template.render({"question": "q", "answer": answer}, labels=TYPES)
    assert example.labels == TYPES
    assert example.label == index
    assert template.render({"question": "q", "answer": "free"}).label is None


@pytest.mark.parametrize(
    ("answer", "labels", "words"),
    [
        ("abbreviation", TYPES, r"rows.jsonl row 3: label 'abbreviation' is unknown; known labels: expression, human"),
        ("a", (("a", "x"), ("b", "x")), "row 3: labels 'a' and 'b' share the verbaliser 'x'"),
        ("a", (("a",), ("a",)), "row 3: labels 'a' and 'a' share the verbaliser 'a'"),
        ("a", (("a",), ()), "row 3: label 1 has no verbaliser"),
        ("a", (("a", " "), ("b",)), "row 3: label 0 has an empty verbaliser"),
    ],
)
def test_bad_labels(answer: str, labels: tuple[tuple[str, ...], ...], words: str) -> None:
    template = Template("{prompt}\n{question}\nAnswer: {answer}")
    with pytest.raises(UserError, match=words):
        template.render({"question": "q", "answer": answer}, "rows.jsonl row 3", labels=labels)
