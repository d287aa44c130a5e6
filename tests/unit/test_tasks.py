"""Generated tasks, each against a solver that reads the rendered text and shares no code with the generator."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from lightning_prompts.datamodules import Addition, LastLetters, LetterReversal, ModularProduct, SymbolicSum
from lightning_prompts.datamodules.generated import GeneratedTask
from lightning_prompts.datamodules.sources import wordnet_words
from lightning_prompts.datamodules.splits import Deck
from lightning_prompts.errors import UserError
from lightning_prompts.template import cut, final_result
from lightning_prompts.types import Example

IN = ("train", "val", "test")
OUT = {
    Addition: ["test/5_digits", "test/6_digits"],
    SymbolicSum: ["test/5_variables", "test/6_variables"],
    ModularProduct: ["test/larger_factors", "test/other_moduli"],
    LetterReversal: ["test/7_letters", "test/8_letters"],
    LastLetters: ["test/4_words", "test/5_words"],
}
TASKS = list(OUT)
TABLE = set(wordnet_words())


def splits(data: GeneratedTask) -> list[str]:
    return ["train", "val", *data.splits("test")]


def everything(data: GeneratedTask) -> list[Example]:
    return [example for split in splits(data) for example in data.examples(split)]


def text(example: Example) -> str:
    """What the LM reads, without the space at the start."""
    return f"{example.before}{example.after}".strip()


def terms(example: Example) -> list[str]:
    """The two numbers of an addition, digits as they are written."""
    match = re.fullmatch(r"(\d+)\+(\d+)=", text(example).replace(" ", ""))
    assert match
    return list(match.groups())


def solve_addition(question: str) -> str:
    return str(sum(int(number) for number in question.removesuffix("=").split("+")))


def solve_symbolic_sum(question: str) -> str:
    match = re.fullmatch(r"((?:x\d+=\d+, )+)sum\((.+)\)=", question)
    assert match
    values = dict(pair.split("=") for pair in match[1].strip(", ").split(", "))
    assert list(values) == match[2].split("+"), "every variable is summed once"
    return str(sum(map(int, values.values())))


def solve_modular_product(question: str) -> str:
    match = re.fullmatch(r"(\d+)\*(\d+) mod (\d+)=", question)
    assert match
    factor, times, modulus = map(int, match.groups())
    rest = 0
    for _ in range(times):
        rest += factor
        while rest >= modulus:
            rest -= modulus
    return str(rest)


def solve_letter_reversal(question: str) -> str:
    letters = list(question.removesuffix(" ->"))
    letters.reverse()
    return "".join(letters)


def solve_last_letters(question: str) -> str:
    return "".join(re.findall(r"([a-z])(?= )", question))


SOLVERS: dict[type[GeneratedTask], Callable[[str], str]] = {
    Addition: solve_addition,
    SymbolicSum: solve_symbolic_sum,
    ModularProduct: solve_modular_product,
    LetterReversal: solve_letter_reversal,
    LastLetters: solve_last_letters,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_answers_are_right_sizes_exact_and_questions_differ(task: type[GeneratedTask], seed: int) -> None:
    sizes = {"train": 321, "val": 45, "test": 67}
    data = task(seed=seed, **{f"{split}_size": size for split, size in sizes.items()})
    assert splits(data) == [*IN, *OUT[task]]
    for split in splits(data):
        assert len(data.examples(split)) == sizes[split.partition("/")[0]]
    for example in everything(data):
        assert example.answer.strip() == example.reference == SOLVERS[task](text(example))
        assert final_result(cut(example.answer + example.end, example.stop), example.extract) == example.reference
    assert len({example.question for example in everything(data)}) == 321 + 45 + 3 * 67


@pytest.mark.parametrize("task", TASKS)
def test_the_default_sizes(task: type[GeneratedTask]) -> None:
    data = task()
    assert len(data.examples("train")) == (600 if task is LetterReversal else 5000)
    assert [len(data.examples(split)) for split in splits(data)[1:]] == [200] * 4
    assert len({text(example) for example in everything(data)}) == len(everything(data))
    assert [batch.split for loader in data.test_dataloader() for batch in loader][::4] == ["test", *OUT[task]]


@pytest.mark.parametrize("task", TASKS)
def test_train_size_does_not_change_the_test_questions(task: type[GeneratedTask]) -> None:
    small, again, larger, other = task(train_size=50), task(train_size=50), task(train_size=90), task(seed=1)
    assert everything(small) == everything(again)
    for split in splits(small):
        assert small.examples(split)[:40] != other.examples(split)[:40]
        if split != "train":
            assert small.examples(split) == larger.examples(split)


def test_data_is_the_same_in_every_process() -> None:
    """Python's hashes differ from one process to the next: these were written down in another one."""
    assert [text(task().examples(split)[-1]) for task in TASKS for split in ("test", OUT[task][0])] == [
        "6+59=",
        "63441+18558=",
        "x1=7, x2=4, x3=0, sum(x1+x2+x3)=",
        "x1=7, x2=8, x3=0, x4=0, x5=0, sum(x1+x2+x3+x4+x5)=",
        "28*8 mod 3=",
        "79*99 mod 5=",
        "beauty ->",
        "diapsid ->",
        "felicitous unacknowledged ->",
        "inauspiciousness angry inexpensiveness immoderate ->",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_spaced_only_inserts_spaces(task: type[GeneratedTask]) -> None:
    plain, spaced = task(), task(spaced=True)
    for split in splits(plain):
        for one, other in zip(plain.examples(split), spaced.examples(split), strict=True):
            assert text(other).replace(" ", "").replace(",", "") == text(one).replace(" ", "").replace(",", "")
            assert other.reference == " ".join(one.reference)
            assert other.answer == f" {other.reference}", "each character has its space ahead of it, the first too"
            written = re.sub(r"x\d|sum|mod", "", text(other)) + other.answer
            assert not re.search(r"\w\w", written)
            assert not re.search(r"\d=|=\d", written)


def test_spaced_values_of_variables() -> None:
    values = set()
    for example in SymbolicSum(spaced=True, max_value=30, train_size=500).examples("train"):
        written = re.findall(r"x\d = ((?:\d ?)+),", text(example))
        assert all(re.fullmatch(r"\d( \d)?", value) for value in written)
        numbers = [int(value.replace(" ", "")) for value in written]
        assert " ".join(str(sum(numbers))) == example.reference
        values.update(numbers)
    assert values == set(range(31))


def test_spaced_words_have_separators() -> None:
    for example in LastLetters(spaced=True).examples("test/4_words"):
        apart = text(example).removesuffix(" ->").split(", ")
        assert {word.replace(" ", "") for word in apart} <= TABLE
        assert example.reference == " ".join(word[-1] for word in apart)
        assert example.fields["words"] == " ".join(word.replace(" ", "") for word in apart)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("spaced", [False, True])
def test_every_step_of_a_column_addition(aligned: bool, spaced: bool) -> None:
    for example in everything(Addition(steps=True, aligned=aligned, spaced=spaced, train_size=500)):
        first, second = terms(example)
        width = max(len(first), len(second))
        a, b = int(first), int(second)
        written = example.answer
        if spaced:
            assert re.fullmatch(r"( \S)+", written)
            written = written.replace(" ", "")
        steps, result = written.split("=")
        assert int(result) == a + b
        assert str(a + b) == example.reference.replace(" ", "")
        *groups, last = steps.split(";")
        assert len(groups) == width
        for place, group in enumerate(groups):
            unit = 10**place
            carry = (a % unit + b % unit) // unit
            assert group == f"{a // unit % 10}{b // unit % 10}{carry}{(a + b) // unit % 10}"
        assert last == f"00{(a + b) // 10**width}"


def test_steps_of_an_example() -> None:
    row = Addition(steps=True).write(list("321+654"))
    assert f"{row.fields['question']}={row.fields['answer']}" == "321+654=1405;2507;3609;000=975"
    assert Addition(steps=True).write(list("5+97")).fields["answer"] == "5702;0910;001=102"
    spaced = Addition(steps=True, aligned=True, spaced=True).write(list("7+65")).fields
    assert (spaced["question"], spaced["answer"]) == ("0 7 + 6 5", "7 5 0 2 ; 0 6 1 7 ; 0 0 0 = 7 2")


def test_aligned_pads_only_the_question() -> None:
    data, plain = Addition(aligned=True), Addition()
    shorter = 0
    for one, other in zip(data.examples("train"), plain.examples("train"), strict=True):
        first, second = terms(one)
        assert len(first) == len(second)
        assert list(map(int, terms(one))) == list(map(int, terms(other)))
        assert one.reference == other.reference == str(int(one.reference))
        shorter += terms(one) != terms(other)
    assert shorter > 3000


@pytest.mark.parametrize(
    ("spaced", "generation", "result"),
    [
        (False, "1405;2507;3609;000=975$ 1+1=2", "975"),
        (False, "1405;=12;000= 975 $", "975"),
        (False, "000=975", "975"),
        (False, "000=975 or so$", "975 or so"),
        (False, "975$", ""),
        (False, "1405;2507;3609;000=$=975", ""),
        (False, "000=975=$", ""),
        (False, "", ""),
        (True, " 1 4 0 5 ; 0 0 0 = 9 7 5$", "9 7 5"),
        (True, " 1 4 0 5 ; 0 0 0 = 975$", "975"),
        (True, " 9 7 5$", ""),
    ],
)
def test_the_result_of_a_generation_with_steps(spaced: bool, generation: str, result: str) -> None:
    example = Addition(steps=True, spaced=spaced, train_size=1).examples("train")[0]
    assert final_result(cut(generation, example.stop), example.extract) == result


def test_the_result_of_a_right_generation_is_the_reference() -> None:
    for spaced in (False, True):
        for example in Addition(steps=True, spaced=spaced).examples("test"):
            generation = f"{example.answer}{example.end} 1+1=2"
            assert final_result(cut(generation, example.stop), example.extract) == example.reference
            broken = generation.replace("=", ";", 1)
            assert final_result(cut(broken, example.stop), example.extract) != example.reference
    assert Addition().extract is None


def test_addition_in_and_out_of_distribution() -> None:
    data = Addition()
    for split in IN:
        lengths = Counter((len(a), len(b)) for a, b in map(terms, data.examples(split)))
        assert set(lengths) == {(a, b) for a in range(1, 5) for b in range(1, 5)}
        small = lengths.pop((1, 1))  # there are only 100 of these
        assert small == {"test": 10, "val": 9, "train": 81}[split]
        assert max(lengths.values()) - min(lengths.values()) <= 1
    for digits in (5, 6):
        for a, b in map(terms, data.examples(f"test/{digits}_digits")):
            assert len(a) == len(b) == digits
    numbers = [number for example in data.examples("train") for number in terms(example) if len(number) == 2]
    assert {int(number) for number in numbers} == set(range(10, 100))
    assert not any(
        number.startswith("0") and number != "0" for example in everything(data) for number in terms(example)
    )
    assert {"0", "9"} <= {number for example in data.examples("train") for number in terms(example)}


def test_symbolic_sum_in_and_out_of_distribution() -> None:
    def values(example: Example) -> list[int]:
        return [int(value) for value in re.findall(r"x\d+=(\d+)", text(example))]

    data = SymbolicSum()
    for split in IN:
        counts = Counter(len(values(example)) for example in data.examples(split))
        assert set(counts) == {2, 3, 4}
        assert counts[2] == {"test": 10, "val": 9, "train": 81}[split]
    assert Counter(len(values(example)) for example in data.examples("test")) == {2: 10, 3: 95, 4: 95}
    for count in (5, 6):
        assert {len(values(example)) for example in data.examples(f"test/{count}_variables")} == {count}
    assert {value for example in everything(data) for value in values(example)} == set(range(10))
    larger = SymbolicSum(max_value=20).examples("train")
    assert {value for example in larger for value in values(example)} == set(range(21))


def test_modular_product_in_and_out_of_distribution() -> None:
    def numbers(split: str) -> list[list[int]]:
        return [[int(number) for number in re.findall(r"\d+", text(example))] for example in data.examples(split)]

    data = ModularProduct()
    for split in IN:
        moduli = Counter(m for _, _, m in numbers(split))
        assert set(moduli) == {3, 5, 7, 9}
        assert len(set(moduli.values())) == 1
    assert {a for a, _, _ in numbers("train")} == {b for _, b, _ in numbers("train")} == set(range(1, 51))
    larger = numbers("test/larger_factors")
    assert {m for _, _, m in larger} == {3, 5, 7, 9}
    assert {factor for a, b, _ in larger for factor in (a, b)} == set(range(51, 100))
    other = numbers("test/other_moduli")
    assert {m for _, _, m in other} == {11, 13}
    assert all(1 <= factor <= 50 for a, b, _ in other for factor in (a, b))
    assert ModularProduct(ood_max_factor=None, ood_moduli=[]).splits("test") == ["test"]


@pytest.mark.parametrize("seed", range(5))
def test_letter_reversal_in_and_out_of_distribution(seed: int) -> None:
    data = LetterReversal(seed=seed)
    place: dict[str, str] = {}
    for split in splits(data):
        lengths = {3, 4, 5, 6} if split in IN else {int(split[5])}
        assert {len(example.question) for example in data.examples(split)} == lengths
        for example in data.examples(split):
            assert example.question in TABLE
            for word in (example.question, example.reference):
                assert place.setdefault(word, split) == split, f"{word} stands in two splits"
            assert example.question != example.reference


def test_last_letters_in_and_out_of_distribution() -> None:
    data = LastLetters()
    for split in splits(data):
        questions = [text(example).removesuffix(" ->").split(" ") for example in data.examples(split)]
        counts = Counter(map(len, questions))
        if split in IN:
            assert counts == {2: len(questions) // 2, 3: len(questions) // 2}
        else:
            assert set(counts) == {int(split[5])}
        assert {word for question in questions for word in question} <= TABLE


@pytest.mark.parametrize("task", TASKS)
def test_out_of_distribution_sets_are_optional(task: type[GeneratedTask]) -> None:
    key = {
        Addition: "ood_digits",
        SymbolicSum: "ood_variables",
        LetterReversal: "ood_lengths",
        LastLetters: "ood_words",
    }
    off = {key[task]: []} if task in key else {"ood_max_factor": None, "ood_moduli": []}
    assert task(**off).splits("test") == ["test"]


def test_all_questions_can_be_drawn() -> None:
    data = Addition(min_digits=1, max_digits=1, ood_digits=[30], train_size=50, val_size=20, test_size=30)
    pairs = {tuple(terms(example)) for split in IN for example in data.examples(split)}
    assert pairs == {(str(a), str(b)) for a in range(10) for b in range(10)}
    assert {len(number) for example in data.examples("test/30_digits") for number in terms(example)} == {30}


def test_fields_for_custom_templates() -> None:
    plain = {"template": "{prompt}Add {a} and {b}: {answer}\n", "stop": r"\n", "train_size": 5}
    for example in Addition(**plain).examples("train"):
        a, b = re.fullmatch(r"Add (\d+) and (\d+):", text(example)).groups()
        assert int(a) + int(b) == int(example.reference)
    for example in ModularProduct(template="{prompt}{b} {a} {m}: {answer}", train_size=5).examples("train"):
        b, a, m = map(int, text(example).strip(":").split())
        assert a * b % m == int(example.reference)
        assert example.question == f"{a}*{b} mod {m}"
    example = SymbolicSum(template="{prompt}{sum} if {assignments}: {answer}", train_size=5).examples("train")[0]
    assert re.fullmatch(r"sum\(x1\+.*\) if x1=\d, .*\d:", text(example))
    example = LetterReversal(template="{prompt}{word}, {question}:{answer}", spaced=True).examples("train")[0]
    assert re.fullmatch(r"(\w+), (\w )+\w:", text(example))
    chat = Addition(chat=True, system="Add.", train_size=5).examples("train")[0]
    assert (chat.chat, chat.system, chat.end) == (True, "Add.", "$")


def test_a_deck_deals_every_question_once_in_any_order() -> None:
    orders = Counter()
    for seed in range(3000):
        deck, generator = Deck(["ab", range(2)]), random.Random(seed)
        dealt = [tuple(deck.deal(generator)) for _ in range(4)]
        assert deck.left == 0
        assert set(dealt) == {("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")}
        orders[tuple(dealt)] += 1
    assert len(orders) == 24
    assert min(orders.values()) > 80, "125 each, give or take"
    assert max(orders.values()) < 180


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (
            Addition,
            {"min_digits": 1, "max_digits": 1, "train_size": 61, "val_size": 20, "test_size": 20},
            r"Addition has only 100 different questions for test, val, train, not data.test_size 20 \+ "
            r"data.val_size 20 \+ data.train_size 61; lower these",
        ),
        (
            Addition,
            {"min_digits": 2, "ood_digits": [1], "test_size": 101},
            "only 100 different questions for test/1_digits, not data.test_size 101",
        ),
        (Addition, {"min_digits": 0}, "data.min_digits must be at least 1, got 0"),
        (Addition, {"min_digits": 1, "max_digits": 0}, "data.max_digits must be at least 1, got 0"),
        (Addition, {"min_digits": 4, "max_digits": 3}, "data.min_digits 4 is above data.max_digits 3"),
        (Addition, {"ood_digits": [4]}, "data.ood_digits 4 lies in the training range 1 to 4"),
        (Addition, {"ood_digits": [6, 1]}, "data.ood_digits 1 lies in the training range 1 to 4"),
        (Addition, {"ood_digits": [0]}, "data.ood_digits must be at least 1, got 0"),
        (Addition, {"ood_digits": [5, 5]}, "data.ood_digits names 5 more than once"),
        (SymbolicSum, {"max_value": 1}, "SymbolicSum has only 28 different questions for test, val, train"),
        (SymbolicSum, {"max_value": 0}, "data.max_value must be at least 1, got 0"),
        (SymbolicSum, {"min_variables": 0}, "data.min_variables must be at least 1, got 0"),
        (SymbolicSum, {"min_variables": 5}, "data.min_variables 5 is above data.max_variables 4"),
        (SymbolicSum, {"ood_variables": [3]}, "data.ood_variables 3 lies in the training range 2 to 4"),
        (ModularProduct, {"max_factor": 10}, "ModularProduct has only 400 different questions for test, val, train"),
        (ModularProduct, {"ood_max_factor": 51}, "only 4 different questions for test/larger_factors"),
        (ModularProduct, {"max_factor": 0}, "data.max_factor must be at least 1, got 0"),
        (ModularProduct, {"ood_max_factor": 50}, "data.ood_max_factor 50 lies in the training range 1 to 50"),
        (ModularProduct, {"ood_max_factor": 0}, "data.ood_max_factor 0 lies in the training range"),
        (ModularProduct, {"moduli": [5, 1]}, "data.moduli must be at least 2, got 1"),
        (ModularProduct, {"moduli": []}, "data.moduli is empty"),
        (ModularProduct, {"moduli": [5, 7, 5]}, "data.moduli names 5 more than once"),
        (ModularProduct, {"ood_moduli": [0]}, "data.ood_moduli must be at least 2, got 0"),
        (ModularProduct, {"ood_moduli": [13, 7]}, "data.ood_moduli 7 is one of data.moduli too"),
        (LetterReversal, {"train_size": 5000}, r"LetterReversal has only 10\d\d different questions for test, val"),
        (LetterReversal, {"ood_lengths": [40]}, "data.ood_lengths: there is no word of 40 letters"),
        (LetterReversal, {"ood_lengths": [20]}, "only 3 different questions for test/20_letters"),
        (LetterReversal, {"max_length": 25, "ood_lengths": []}, "data.max_length: there is no word of 21 letters"),
        (LetterReversal, {"min_length": 0}, "data.min_length must be at least 1, got 0"),
        (LetterReversal, {"min_length": 7}, "data.min_length 7 is above data.max_length 6"),
        (LetterReversal, {"ood_lengths": [3]}, "data.ood_lengths 3 lies in the training range 3 to 6"),
        (LastLetters, {"min_words": 1, "max_words": 1, "train_size": 6000}, "LastLetters has only 6013 different"),
        (LastLetters, {"min_words": 0}, "data.min_words must be at least 1, got 0"),
        (LastLetters, {"max_words": 1}, "data.min_words 2 is above data.max_words 1"),
        (LastLetters, {"ood_words": [2]}, "data.ood_words 2 lies in the training range 2 to 3"),
        *(
            (task, {f"{split}_size": size}, f"data.{split}_size must be at least 1, got {size}")
            for task in TASKS
            for split, size in zip(IN, (0, -1, 0), strict=True)
        ),
        *((task, {"batch_size": 0}, "data.batch_size must be at least 1, got 0") for task in TASKS),
    ],
)
def test_invalid_settings_raise(task: type[GeneratedTask], settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        task(**settings).examples("train")
    assert "\n" not in str(raised.value)
