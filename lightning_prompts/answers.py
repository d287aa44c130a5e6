r"""Find the answer in a text, and compare two answers: numbers, ``\boxed{}``, fractions, units."""

from __future__ import annotations

import re
import string
from collections import Counter
from fractions import Fraction

from lightning_prompts.template import final_result
from lightning_prompts.types import Example

# A number, including 1e3 and 1/2. A unit may follow (5cm), but not a variable (2x). The lookahead keeps the longest
# number: 12.5h has no 12.
_NUMBER = re.compile(
    r"(?<![\w.^])(?=([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?))"
    r"\1(?![\d]|[A-Za-z]\b|[A-Za-z]\d)"
)
_POWER_OF_UNIT = re.compile(r"(?<=[a-z])\^\{?[23]\}?(?!\w)")
_FORMULA = re.compile(r"[=^_(\[|{}<>*]|\\(?!text|mathrm|mbox|%|\$|!|,|\s)")
# A variable of one letter beside a number or another variable: x+5, 5 - x, x/2, 3+2i, x^2+2; no unit (m/s, 3-inch).
_ALGEBRA = re.compile(
    r"(?<![A-Za-z\\])[A-Za-zπ](?:(\s*)[-+]\1(?:\d|[A-Za-zπ](?![A-Za-z])|\()|\s*/\s*[\d(]|\^\{?\d+\}?\s*[-+]\s*\S)"
    r"|[\d)](\s*)[-+/]\2\d*[A-Za-zπ](?![A-Za-z])"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}|(\d)\s*(\d))")
_MIXED = re.compile(r"\b(\d+)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")  # 3 1/2
_HUGE = re.compile(r"[eE][-+]?\d{4}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|([-+]?\d[\d.,/]*|\\[dt]?frac\s*(?:\d\s*\d|\{[^{}]*\}\s*\{[^{}]*\})))")
_MARK = re.compile(r"####\s*(.+)")
# Words before the answer, in solutions of models and people.
_ANNOUNCED = re.compile(r"\banswer\b\s*(?:is\b|=|:|(?=[-+$\\\d]))\s*:?\s*(.*\w.*)", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``; ``None`` if there is no box.

    The content may have braces in it. Without braces it is one number or fraction, as in ``$\boxed 2$``.

    >>> boxed("so it is \\boxed{\\frac{1}{2}}."), boxed("we get $\\boxed 2$ since $x^{10}$")
    ('\\frac{1}{2}', '2')
    """
    for box in reversed(list(_BOX.finditer(text))):
        if not box[1]:
            return box[2].rstrip(".,")
        depth = 1
        for index in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[box.end() : index].strip()
    return None


def final_answer(text: str) -> str:
    r"""Return the answer of a solution: in the last ``\boxed{}``, after ``####``, after "answer is", or all of it.

    >>> final_answer("2 + 2 is 4. The answer is 4"), final_answer("It is so.\n#### 12")
    ('4', '12')
    """
    inside = boxed(text)
    if inside is not None:
        return inside
    for pattern in (_MARK, _ANNOUNCED):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).strip()
    return text.strip()


def number(text: str) -> Fraction | None:
    r"""Return the last number in a text, exactly; ``None`` if there is no number.

    Reads signs, decimals, thousands separators, ``1/2``, ``\frac{1}{2}`` and percent signs (``50\%`` is 50); ignores
    units and currency signs.

    >>> number("about $1,250.50"), number("one half, 1/2"), number("none")
    (Fraction(2501, 2), Fraction(1, 2), None)
    """
    text = _simple(text)
    text = re.sub(r"(?<=[\w:)])\s+-\s+(?=[$€£]?[\d.])", " ", text)  # a dash after a word is no sign
    text = re.sub(r"([-+])\s*[$€£]?\s*(?=[\d.])", r"\1", text)  # - $5 is -5
    for candidate in reversed(_NUMBER.findall(text)):
        if _HUGE.search(candidate):  # would take forever
            continue
        over, _, under = candidate.replace(",", "").replace(" ", "").partition("/")
        try:
            return Fraction(over) / Fraction(under) if under else Fraction(over)
        except (ValueError, ZeroDivisionError):
            continue
    return None


def normalized(text: str) -> str:
    r"""Remove what does not change the meaning of an answer: ``\text{}``, dollar signs, a final period, and spaces.

    Spaces between numbers stay, except before three digits (``10 000``).

    >>> normalized("\\text{Yes}, it is.")
    'yes,itis'
    """
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|qquad)(?![a-z])|[$°]|\\circ|\^\{?\\circ\}?", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%")
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\s+(?=\d{3}(?!\d))", "", text)
    return text.rstrip(".").casefold()


def is_number(text: str) -> bool:
    """Return whether an answer is one number, perhaps with a unit, and not a formula."""
    plain = _POWER_OF_UNIT.sub("", _simple(text))
    plain = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " ", plain)
    return len(_NUMBER.findall(plain)) == 1 and not _FORMULA.search(plain) and not _ALGEBRA.search(plain)


def _simple(text: str) -> str:
    """Remove the spacing of LaTeX, and write fractions as ``a/b``, and thousands with a comma."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\u2212", "-").replace("\u2013", "-")
    text = re.sub(r"(?<=\d)\\ (?=\d)", "", text)
    text = _MIXED.sub(lambda match: f" {int(match[1]) * int(match[3]) + int(match[2])}/{match[3]} ", text)
    return _FRACTION.sub(lambda match: f" {match[1] or match[3]}/{match[2] or match[4]} ", text)


def same_answer(text: str, reference: str) -> bool:
    r"""Return whether the answer of a solution is the reference: as numbers if the reference is one, else as text.

    Args:
        text: A generation, with or without the steps to its answer.
        reference: The reference answer.

    >>> same_answer("the answer is .5", "\\boxed{\\frac{1}{2}}"), same_answer("7", "#### 8")
    (True, False)
    """
    mine, wanted = final_answer(text), final_answer(reference)
    if normalized(mine) == normalized(wanted):
        return True
    if not is_number(wanted):
        return False
    mine = mine.rpartition("=")[2]
    plain = _simple(mine)
    # A formula is not a number, although there are numbers in it: the 3 of a square root.
    if re.search(r"\\(?!text|mathrm|mbox|[dt]?frac|left|right|%|\$|!|,|\s|\(|\))", plain):
        return False
    # Nor is the 2 of 3x+2, wherever the formula stands in the text.
    *_, last = (0, *(found.end() for found in _NUMBER.finditer(plain)))
    if any(found.end() >= last for found in _ALGEBRA.finditer(plain)):
        return False
    # A box is all of the answer: not the 3 of -1, 3 or the 10 of 10^2.
    if boxed(text) is not None and (len(_NUMBER.findall(plain)) != 1 or re.search(r"[\d)]\s*\^", plain)):
        return False
    return (found := number(mine)) is not None and found == number(wanted)


def is_correct(example: Example, text: str) -> bool | None:
    """Return whether a generation has the reference answer of the example; ``None`` if it has no reference."""
    if example.reference is None:
        return None
    result = final_result(text, example.extract)
    return same_answer(result, example.reference) if example.numeric else result == example.reference


def token_f1(text: str, reference: str) -> float:
    """Return the F1 of the words of two texts in any order, as SQuAD scores answers (Rajpurkar et al. 2016).

    >>> token_f1("a red apple", "The apple is red.")
    0.8
    """
    mine, wanted = _words(text), _words(reference)
    if not mine or not wanted:
        return float(mine == wanted)
    shared = sum((Counter(mine) & Counter(wanted)).values())
    return 2 * shared / (len(mine) + len(wanted))


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.casefold() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]
