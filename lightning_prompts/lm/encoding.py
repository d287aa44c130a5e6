"""Text to token ids and back. The language model owns the only tokenizer; no other module calls it for pieces of text.

A row is a list of integers: a token id, or ``-1 - p`` for position ``p`` of the prompt. The parts around the prompt
slot are tokenised one by one, the same way for every method, so that a soft prompt, a hard prompt and a fixed text are
compared on the same tokens.

Many tokenizers change the start of a text (they add or drop a space). A piece inside a text is therefore tokenised and
decoded behind a mark, a short text whose own tokens are then taken off.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_prompts.errors import UserError
from lightning_prompts.types import Example

log = logging.getLogger(__name__)

ROWS_KEPT = 10_000  # encoded; some kilobytes each
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning; one of them marks the prompt slot in a chat
# What stands ahead of a piece while it is tokenised, in order of preference: nothing that would merge with the piece.
MARKS = {"space": ("a", ".", "1", "\n"), "word": ("\n", "1", ".", "|")}
FOLLOWERS = {"space": ("a", ".", "1", " a"), "word": (" a", "\n", ".", "|")}
# Texts that a tokenizer gives back unchanged if it loses nothing at the ends of a piece or within it.
PROBES = (" a", "a ", "\na", "a\n", "  a  b", "\n\na\n\n", "A a", "a\tb", "a , b .", "\ufb01 e\u0301")


@dataclass(frozen=True, slots=True)
class Row:
    """One example as token ids.

    Attributes:
        context: What the LM is conditioned on, prompt positions as ``-1 - p``.
        answer: The answer's token ids, empty when there is no reference.
        end: Token ids of what follows the answer, where they are to be scored too.
    """

    context: list[int]
    answer: list[int]
    end: list[int] = field(default_factory=list)

    def around_slot(self) -> tuple[list[int], list[int]]:
        """The context before and after the prompt slot."""
        spots = [index for index, token in enumerate(self.context) if token < 0]
        return self.context[: spots[0]], self.context[spots[-1] + 1 :]


Labels: TypeAlias = tuple[tuple[str, ...], ...]
Way = TypeVar("Way", str, tuple[int, ...])


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """Classes as token sequences.

    Attributes:
        tokens: The sequences, with their ends where labels begin alike; see `Encoder.label_tokens`.
        owners: The class of each, an index.
        classes: ``Y``, how many there are.
    """

    tokens: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    classes: int


class Encoder:
    """Turns examples into rows, and tokens into text.

    Args:
        tokenizer: The LM's tokenizer.
        name: The model, for error messages.
        rows: Rows of the model's embeddings; ``None`` where that is unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the model", rows: int | None = None) -> None:
        """Find out what the tokenizer does to the start of a text, and whether it loses anything."""
        self.tokenizer = tokenizer
        self.name = name
        self.rows = rows
        plain = self._encode("a")
        full = tokenizer.encode("a", add_special_tokens=True)
        # The tokens that start a sequence (BOS); an end-of-sequence token after the text must not be copied.
        self.bos_ids: list[int] = full[: full.index(plain[0])] if plain and plain[0] in full else []
        marks = {mark: self._encode(mark) for mark in itertools.chain(*MARKS.values())}
        self._marks = {
            mark: ids
            for mark, ids in marks.items()
            if tokenizer.unk_token_id not in ids and self._decode(ids).lstrip(" ") == mark
        }
        # Marks behind which a word and the same word with a space ahead are different tokens.
        self._telling = {mark for mark in self._marks if self._encode(f"{mark}a") != self._encode(f"{mark} a")}
        self._direct = all(self._encode(text) == self._behind_mark(text) for text in ("a", "1", " a", "\na"))
        self._decoded_behind: list[int] = []
        inside = self._inside(" a")
        if self._decode(inside) != " a" and "a" in self._marks:
            self._decoded_behind = self._marks["a"]
        controls = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest = sorted(controls, key=len, reverse=True)
        # Control tokens, and at the end of a text those and the white space that they swallow.
        self._control = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._control_end = re.compile(
            "|".join(re.escape(text) + r"\s*" * controls[text].rstrip + r"\Z" for text in longest) or "(?!)"
        )
        # Words that were added to the vocabulary may swallow the white space around them.
        greedy = [token for token in tokenizer.added_tokens_decoder.values() if token.lstrip or token.rstrip]
        self._lossless = all(self.text(self._inside(text)) == text for text in PROBES)
        self._lossless = self._lossless and all(token.special for token in greedy)
        if not self._lossless and "\n" not in self.text(self._inside("a\na")):
            log.warning("the tokenizer of %s drops line breaks, so a stop such as \\n never matches an answer", name)
        self._rows: dict[tuple[object, ...], Row] = {}  # an epoch meets the same examples as the one before
        self._label_tokens: dict[tuple[Labels, str | None], LabelTokens] = {}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: Sequence[int], special: bool = True) -> str:
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(decoded)

    def marks(self) -> dict[str, list[str]]:
        """What is put ahead of a piece inside a text to tokenise it, by what it begins with, in order of preference."""
        return {kind: [] if self._direct else self._ordered(kind) for kind in MARKS}

    def _ordered(self, kind: str) -> list[str]:
        """The marks that this tokenizer keeps as they are, telling ones first."""
        return sorted((mark for mark in MARKS[kind] if mark in self._marks), key=lambda mark: mark not in self._telling)

    def _mark_of(self, text: str) -> str | None:
        """The first mark that does not merge with a piece of text; ``None`` if all do."""
        for mark in self._ordered("space" if text[:1].isspace() else "word"):
            own = self._marks[mark]
            if self._encode(mark + text)[: len(own)] == own:
                return mark
        return None

    def _behind_mark(self, text: str) -> list[int]:
        """Tokens of a piece without those of the mark ahead of it; all its tokens where there is no such mark."""
        mark = self._mark_of(text)
        return self._encode(text) if mark is None else self._encode(mark + text)[len(self._marks[mark]) :]

    def _inside(self, text: str) -> list[int]:
        """Tokens of a piece that something precedes, unchecked."""
        return self._encode(text) if self._direct or not text else self._behind_mark(text)

    def text(self, ids: Sequence[int], special: bool = True) -> str:
        """Token ids as they read inside a text, with their leading space.

        Args:
            ids: The token ids.
            special: Whether to show special tokens.
        """
        if not self._decoded_behind:
            return self._decode(ids, special)
        head, whole = self._decode(self._decoded_behind, special), self._decode([*self._decoded_behind, *ids], special)
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids, special)

    def round_trips(self, ids: Sequence[int]) -> bool:
        """Whether tokens are the same again after they were written as text."""
        return self.tokenizer.unk_token_id not in ids and self._inside(self.text(ids)) == list(ids)

    def tokens(self, text: str, start: bool = False) -> list[int]:
        """Token ids of a piece of text, without special tokens.

        Args:
            text: The piece, with the white space that belongs to it.
            start: Whether it starts a sequence; elsewhere a tokenizer that adds a space to every text is kept from it.

        Raises:
            UserError: The tokenizer cannot keep the piece as it is; or the model has no embedding of a token.
        """
        ids = self._piece(text, start)
        if text and not self._lossless and "\n" in self._marks:  # it may stand between line breaks
            before, after = ("\n" if end.isspace() and not start else "" for end in (text[0], text[-1]))
            self._check_same(before + text + after, [*self._known(before), *ids, *self._inside(after)], text)
        return ids

    def _piece(self, text: str, start: bool = False, last: bool = False, ahead: str = "") -> list[int]:
        """`tokens` of a piece of a row, whose neighbours are known: the text ahead of it; nothing follows the last."""
        if not text:
            return []
        if control := self._control_end.search(ahead):  # it may swallow white space, or a text begins behind it
            own, both = self._encode(control[0]), self._encode(control[0] + text)
            if both[: len(own)] == own:
                return self._with_embeddings(both[len(own) :])
        ids = self._with_embeddings(self._encode(text) if start else self._inside(text))
        if self._lossless:
            return ids
        mark = self._mark_of(text)
        glued = not start and not text[:1].isspace() and mark not in self._telling
        if glued and self._encode(f"a{text}") != [*self._encode("a"), *ids]:
            raise UserError(
                f"the tokenizer of {self.name} reads {_short(text)} like {_short(' ' + text)}: it drops the spaces "
                "between words; begin that text with a space, or use another model"
            )
        mark = "" if start or self._direct or mark is None else mark
        for follower in () if last else FOLLOWERS["space" if text[-1].isspace() else "word"]:
            behind = self._inside(follower)
            if self.text(behind) == follower:
                self._check_same(mark + text + follower, [*self._known(mark), *ids, *behind], text)
        return ids

    def _with_embeddings(self, ids: list[int]) -> list[int]:
        """The ids.

        Raises:
            UserError: The model has no embedding of one of them.
        """
        if self.rows is not None and max(ids, default=0) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.name} gives token {token!r} the id {max(ids)}, and the model has only "
                f"{self.rows} embeddings; resize the model's embeddings and save it again, or leave {token!r} out"
            )
        return ids

    def _known(self, mark: str) -> list[int]:
        return self._marks.get(mark, [])

    def _check_same(self, text: str, ids: list[int], piece: str) -> None:
        """Raise a `UserError` if a text is read as something else than its pieces are."""
        whole = self._encode(text)
        if whole != ids and self._decode(whole) != self._decode(ids):
            raise UserError(
                f"the tokenizer of {self.name} does not keep the white space at the ends of {_short(piece)}: it makes "
                f"{_short(self._decode(whole))} of {_short(text)}, and {_short(self._decode(ids))} of its pieces; "
                "leave that white space out, or use another model"
            )

    def row(self, example: Example, length: int, with_end: bool = False) -> Row:
        """Encode one example around a prompt of ``length`` tokens, with what follows its answer if asked.

        Raises:
            UserError: Nothing precedes the answer, the answer has no tokens, or the tokenizer has no chat template.
        """
        texts = (example.before, example.after, example.answer, example.end, example.chat, example.system)
        key = (*texts, length, with_end)
        if (row := self._rows.get(key)) is None:
            try:
                row = self._row(example, length, with_end)
            except UserError as error:
                raise UserError(f"{example.source}: {error}" if example.source else str(error)) from error
            if len(self._rows) >= ROWS_KEPT:
                self._rows.clear()
            self._rows[key] = row
        return row

    def _row(self, example: Example, length: int, with_end: bool) -> Row:
        before, after, answer = self.texts(example)
        slot = [-1 - p for p in range(length)]
        lead = [] if example.chat else self._with_embeddings(list(self.bos_ids))
        front = self._piece(before, start=True)
        start = not (before or slot)
        back = self._piece(after, start, ahead="" if slot else before)
        context = lead + front + slot + back
        if not context:
            raise UserError("nothing precedes the answer; give the template some text or the prompt a length")
        if answer is None:
            return Row(context, [])
        tokens = self._piece(answer, ahead=after or ("" if slot else before))
        if not tokens:
            raise UserError("the answer is empty")
        row = Row(context, tokens, self._end(example) if with_end else [])
        if not self._lossless:
            ids = [*([] if slot else front), *back, *tokens]
            joined = f"{'' if slot else before}{after}{answer}"
            if with_end and example.end:
                joined, ids = joined + example.end, ids + row.end
            mark = "" if not slot or self._direct else self._mark_of(joined) or ""
            self._check_same(mark + joined, [*self._known(mark), *ids], joined)
        return row

    def warn_of_losses(self, examples: Iterable[Example]) -> None:
        """Log the first row whose text the tokenizer does not read as it is, for each way to do so, and how many do.

        A row may hold a control token, such as the one that ends a turn, or a text that the tokenizer has no tokens
        for. An answer may become another one, as on a tokenizer without capitals.
        """
        found: dict[str, list[str]] = {"control": [], "unknown": [], "answer": []}
        for example in examples:
            where, text = example.source or "an example", f"{example.before}{example.after}{example.answer or ''}"
            for name, value in example.fields.items():
                if (match := self._control.search(str(value))) and str(value).strip() in text:
                    found["control"].append(
                        f"{where}: field {name!r} holds {match[0]!r}, which the tokenizer of {self.name} reads as a "
                        "control token and not as text; change that text unless it is meant"
                    )
            if self._lossless:
                continue
            if self.tokenizer.unk_token_id in self._encode(self._control.sub("", text)):
                found["unknown"].append(
                    f"{where}: the tokenizer of {self.name} has no token for a part of {_short(text)}; change that "
                    "text, or use another model"
                )
            elif example.answer and not example.labels:
                kept = self.text(self._inside(example.answer), special=False)
                if kept.strip() != self._control.sub("", example.answer).strip():
                    found["answer"].append(
                        f"{where}: the tokenizer of {self.name} makes {_short(kept.strip())} of the answer "
                        f"{_short(example.answer.strip())}, so that no generation equals it; change the answer, or use "
                        "another model"
                    )
        for told in found.values():
            if told:
                log.warning("%s%s", told[0], f" (and {len(told) - 1} more like it)" if told[1:] else "")

    def label_tokens(self, example: Example) -> LabelTokens:
        """The token sequences that stand for an example's classes: every verbaliser with a leading space and without.

        Where a sequence of one class begins a sequence of another, a text that begins with ``10`` begins with ``1``
        too, and ``1`` is never the less likely one. All sequences of such classes go on to where the label ends: with
        what `row` scores behind an answer, or with the end token where the template has nothing there.

        Args:
            example: Its labels count, and its end.

        Raises:
            UserError: Two classes are the same tokens, or nothing tells where their labels end.
        """
        labels, key = example.labels, (example.labels, example.end)
        if key not in self._label_tokens:
            owners: dict[tuple[int, ...], int] = {}
            for text, index in written(labels):
                tokens = tuple(self.tokens(text))
                if owners.setdefault(tokens, index) != index:
                    raise UserError(
                        f"labels {labels[owners[tokens]][0]!r} and {labels[index][0]!r} are the same tokens, "
                        f"those of {text!r}; give them different verbalisers"
                    )
            if alike := begin_alike(owners, labels):
                owners = with_ends(owners, labels, tuple(self._label_end(example, alike)))
            self._label_tokens[key] = LabelTokens(tuple(owners), tuple(owners.values()), len(labels))
        return self._label_tokens[key]

    def _label_end(self, example: Example, alike: str) -> list[int]:
        """What follows a label, at best what training teaches; empty where there is neither text nor end token."""
        if end := self._end(example):
            return end
        if end := self._end(replace(example, end=None)):
            log.warning(
                "%s begin alike, and the template has no text after {answer} that training could teach: the model's "
                "end token tells them apart; a template that ends with a text (\\n) is better", alike,
            )  # fmt: skip
        return end

    def _end(self, example: Example) -> list[int]:
        if example.end is not None:
            return self._piece(example.end, last=True)
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else self._with_embeddings([int(eos)])

    def texts(self, example: Example) -> tuple[str, str, str | None]:
        """An example's text in front of the prompt slot, behind it, and its answer; a chat is written out.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        if not example.chat:
            return example.before, example.after, example.answer
        if not self.tokenizer.chat_template:
            raise UserError("chat: true, but this model's tokenizer has no chat template; set chat: false")
        slot = unused_character(f"{example.before}{example.after}{example.system or ''}{self.tokenizer.chat_template}")
        turn = f"{example.before}{slot}{example.after}"
        turns = [{"role": "user", "content": turn}]
        if example.system is not None:
            turns.insert(0, {"role": "system", "content": example.system})
        try:
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            if example.system is not None and self._renders(turns[1:]):
                raise UserError(
                    f"the chat template of {self.name} takes no system turn; leave out data.system"
                ) from error
            raise UserError(
                f"the chat template of {self.name} fails ({' '.join(str(error).split())[:200]}); set chat: false"
            ) from error
        text = str(rendered)
        # Many templates strip the white space around a turn.
        if text.count(slot) != 1 or turn.strip() not in text:
            count = text.count(slot)
            raise UserError(
                f"the chat template of {self.name} {'changes' if count == 1 else f'shows {count} times'} the user's "
                f"turn {_short(turn.replace(slot, ''))}; it must show it once and unchanged: set chat: false"
            )
        if example.system is not None and example.system.strip() not in text:
            raise UserError(
                f"the chat template of {self.name} drops or changes the system turn {_short(example.system)}; "
                "leave out data.system"
            )
        before, _, after = text.partition(slot)
        return before, after, example.answer

    def _renders(self, turns: list[dict[str, str]]) -> bool:
        try:
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):
            return False
        return True


def unused_character(text: str) -> str:
    """A private-use character that a text does not hold."""
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")


def written(labels: Labels) -> list[tuple[str, int]]:
    """Every way to write some classes, with a leading space and without, and the class of each."""
    return [
        (way, index)
        for index, verbalisers in enumerate(labels)
        for text in verbalisers
        for way in (f" {text.strip()}", text.strip())
    ]


def begin_alike(owners: Mapping[Way, int], labels: Labels) -> str | None:
    """The names of two classes of which one's text or tokens are the beginning of the other's, if there are such.

    Args:
        owners: The class of each way to write one.
        labels: The classes.
    """
    for way, owner in owners.items():
        for length in range(1, len(way)):
            if (other := owners.get(way[:length], owner)) != owner:
                return f"labels {labels[other][0]!r} and {labels[owner][0]!r}"
    return None


def with_ends(owners: Mapping[Way, int], labels: Labels, end: Way) -> dict[Way, int]:
    """Ways to write classes that begin alike, each with its end.

    Args:
        owners: The class of each way.
        labels: The classes.
        end: What follows an answer.

    Raises:
        UserError: There is no end, or one class's way is the beginning of another's even so.
    """
    ended = {way + end: owner for way, owner in owners.items()}
    if alike := begin_alike(ended, labels):
        why = "even with the text after {answer}" if end else "and nothing tells where one ends"
        raise UserError(
            f"{alike} begin alike, {why}; end the template with a text that no label has in it, such as \\n"
        )
    return ended


def check_fits(example: Example, total: int, length: int, name: str, context: int) -> None:
    """Raise a `UserError` if ``total`` tokens, ``length`` of them the prompt, are more than a model's context window.

    Args:
        example: What the tokens are of.
        total: How many there are.
        length: How many of them are the prompt's.
        name: The model.
        context: Its window.
    """
    if total > context:
        raise UserError(
            f"{example.source or 'example'}: prompt ({length}), text and answer are {total} tokens, "
            f"more than the context window of {name} ({context}); shorten the prompt or drop the row"
        )
