"""Text to token ids and back. Only this module calls the tokenizer of the language model for pieces of text.

A row is a list of integers: token ids, and ``-1 - p`` for position ``p`` of the prompt. The parts around the prompt
slot are tokenised separately, in the same way for every method, so that soft prompts, hard prompts and fixed texts are
compared on the same tokens.

Many tokenizers change the start of a text (they add or drop a space). A piece inside a text is therefore tokenised and
decoded after a mark: a short text whose tokens are then removed.
"""

from __future__ import annotations

import functools
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

ROWS_KEPT = 10_000  # size of the cache of encoded rows, a few kilobytes each
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning; one of them marks the prompt slot in a chat
# Texts to put before a piece for its tokenisation, in order of preference; a mark must not merge with the piece.
MARKS = {"space": ("a", ".", "1", "\n"), "word": ("\n", "1", ".", "|")}
FOLLOWERS = {"space": ("a", ".", "1", " a"), "word": (" a", "\n", ".", "|")}
# A tokenizer is lossless if encoding and decoding return these texts unchanged.
PROBES = (" a", "a ", "\na", "a\n", "  a  b", "\n\na\n\n", "A a", "a\tb", "a , b .", "\ufb01 e\u0301")


@dataclass(frozen=True, slots=True)
class Row:
    """One example as token ids.

    Attributes:
        context: Token ids that the LM is conditioned on, with prompt positions as ``-1 - p``.
        answer: Token ids of the answer; empty without a reference.
        end: Token ids of the text after the answer, if they are scored.
    """

    context: list[int]
    answer: list[int]
    end: list[int] = field(default_factory=list)

    def around_slot(self) -> tuple[list[int], list[int]]:
        """The context before and after the prompt slot; without a slot, all of it is before."""
        spots = [index for index, token in enumerate(self.context) if token < 0]
        if not spots:
            return self.context, []
        return self.context[: spots[0]], self.context[spots[-1] + 1 :]


Labels: TypeAlias = tuple[tuple[str, ...], ...]
Way = TypeVar("Way", str, tuple[int, ...])


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """The token sequences of the classes.

    Attributes:
        tokens: The sequences, with an end if one label is a prefix of another; see `Encoder.label_tokens`.
        owners: The index of the class of each sequence.
        classes: ``Y``, the number of classes.
    """

    tokens: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    classes: int


class Encoder:
    """Encodes examples as rows, and decodes tokens.

    Args:
        tokenizer: The tokenizer of the LM.
        name: Name of the model in error messages.
        rows: Number of embeddings of the model; ``None`` if unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the model", rows: int | None = None) -> None:
        """Probe how the tokenizer changes the start of a text, and whether it is lossless."""
        self.tokenizer = tokenizer
        self.name = name
        self.rows = rows
        plain = self._encode("a")
        full = tokenizer.encode("a", add_special_tokens=True)
        # The tokens that start a sequence (BOS), without an end-of-sequence token after the text.
        self.bos_ids: list[int] = full[: full.index(plain[0])] if plain and plain[0] in full else []
        marks = {mark: self._encode(mark) for mark in itertools.chain(*MARKS.values())}
        self._marks = {
            mark: ids
            for mark, ids in marks.items()
            if tokenizer.unk_token_id not in ids and self._decode(ids).lstrip(" ") == mark
        }
        # Marks after which a word has different tokens with and without a leading space.
        self._telling = {mark for mark in self._marks if self._encode(f"{mark}a") != self._encode(f"{mark} a")}
        self._direct = all(self._encode(text) == self._behind_mark(text) for text in ("a", "1", " a", "\na"))
        self._decoded_behind: list[int] = []
        inside = self._inside(" a")
        if self._decode(inside) != " a" and "a" in self._marks:
            self._decoded_behind = self._marks["a"]
        controls = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest = sorted(controls, key=len, reverse=True)
        # Control tokens, and control tokens at the end of a text with the white space that they strip.
        self._control = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._control_end = re.compile(
            "|".join(re.escape(text) + r"\s*" * controls[text].rstrip + r"\Z" for text in longest) or "(?!)"
        )
        # Tokens that were added to the vocabulary may strip the white space around them.
        greedy = [token for token in tokenizer.added_tokens_decoder.values() if token.lstrip or token.rstrip]
        self._lossless = all(self.text(self._inside(text)) == text for text in PROBES)
        self._lossless = self._lossless and all(token.special for token in greedy)
        if not self._lossless and "\n" not in self.text(self._inside("a\na")):
            log.warning("the tokenizer of %s drops line breaks, so a stop such as \\n never matches an answer", name)
        self._rows: dict[tuple[object, ...], Row] = {}  # all epochs have the same examples
        self._label_tokens: dict[tuple[Labels, str | None, bool], LabelTokens] = {}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: Sequence[int], special: bool = True) -> str:
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(decoded)

    def marks(self) -> dict[str, list[str]]:
        """The marks for a piece inside a text, by the kind of its first character, in order of preference."""
        return {kind: [] if self._direct else self._ordered(kind) for kind in MARKS}

    def _ordered(self, kind: str) -> list[str]:
        """The marks that this tokenizer keeps unchanged; those first that separate a word from a word with a space."""
        return sorted((mark for mark in MARKS[kind] if mark in self._marks), key=lambda mark: mark not in self._telling)

    def _mark_of(self, text: str) -> str | None:
        """The first mark that does not merge with a piece of text; ``None`` if all do."""
        for mark in self._ordered("space" if text[:1].isspace() else "word"):
            own = self._marks[mark]
            if self._encode(mark + text)[: len(own)] == own:
                return mark
        return None

    def _behind_mark(self, text: str) -> list[int]:
        """Tokenise a piece after a mark and remove the tokens of the mark; without a mark if none fits."""
        mark = self._mark_of(text)
        return self._encode(text) if mark is None else self._encode(mark + text)[len(self._marks[mark]) :]

    def _inside(self, text: str) -> list[int]:
        """Tokenise a piece inside a text, without checks."""
        return self._encode(text) if self._direct or not text else self._behind_mark(text)

    def text(self, ids: Sequence[int], special: bool = True) -> str:
        """Decode token ids as they read inside a text, with their leading space.

        Args:
            ids: The token ids.
            special: Whether to include special tokens.
        """
        if not self._decoded_behind:
            return self._decode(ids, special)
        head, whole = self._decode(self._decoded_behind, special), self._decode([*self._decoded_behind, *ids], special)
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids, special)

    def round_trips(self, ids: Sequence[int]) -> bool:
        """Whether decoding and encoding tokens returns the same tokens."""
        return self.tokenizer.unk_token_id not in ids and self._inside(self.text(ids)) == list(ids)

    def tokens(self, text: str, start: bool = False) -> list[int]:
        """Tokenise a piece of text, without special tokens.

        Args:
            text: The piece, with the white space that belongs to it.
            start: Whether the piece starts a sequence. Otherwise, a tokenizer that adds a space to every text does not
                add one here.

        Raises:
            UserError: The tokenizer changes the piece, or the model has no embedding for a token.
        """
        ids = self._piece(text, start)
        if text and not self._lossless and "\n" in self._marks:  # the neighbours may be line breaks
            before, after = ("\n" if end.isspace() and not start else "" for end in (text[0], text[-1]))
            self._check_same(before + text + after, [*self._known(before), *ids, *self._inside(after)], text)
        return ids

    def _piece(self, text: str, start: bool = False, last: bool = False, ahead: str = "") -> list[int]:
        """Tokenise a piece of a row, given the text ahead of it and whether it is the last piece; see `tokens`."""
        if not text:
            return []
        if control := self._control_end.search(ahead):  # it may strip white space, or start a new text
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
                "between words; start the text with a space, or use another model"
            )
        mark = "" if start or self._direct or mark is None else mark
        for follower in () if last else FOLLOWERS["space" if text[-1].isspace() else "word"]:
            behind = self._inside(follower)
            if self.text(behind) == follower:
                self._check_same(mark + text + follower, [*self._known(mark), *ids, *behind], text)
        return ids

    def _with_embeddings(self, ids: list[int]) -> list[int]:
        """Return the ids after a check.

        Raises:
            UserError: The model has no embedding for one of them.
        """
        if self.rows is not None and max(ids, default=0) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.name} gives token {token!r} the id {max(ids)}, but the model has only "
                f"{self.rows} embeddings; resize the embeddings and save the model again, or leave {token!r} out"
            )
        return ids

    def _known(self, mark: str) -> list[int]:
        return self._marks.get(mark, [])

    def _check_same(self, text: str, ids: list[int], piece: str) -> None:
        """Raise a `UserError` if the tokens of a text differ from those of its pieces."""
        whole = self._encode(text)
        if whole != ids and self._decode(whole) != self._decode(ids):
            raise UserError(
                f"the tokenizer of {self.name} does not keep the white space at the ends of {_short(piece)}: it turns "
                f"{_short(text)} into {_short(self._decode(whole))}, and its pieces into {_short(self._decode(ids))}; "
                "remove the white space, or use another model"
            )

    def row(self, example: Example, length: int, with_end: bool = False) -> Row:
        """Encode one example around a prompt of ``length`` tokens.

        Args:
            example: The example.
            length: Tokens of the prompt.
            with_end: Whether to include the text after the answer.

        Raises:
            UserError: The answer has no context or no tokens, or the tokenizer has no chat template.
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
        bos_ids = [] if example.chat else self._with_embeddings(list(self.bos_ids))
        front = self._piece(before, start=True)
        start = not (before or slot)
        back = self._piece(after, start, ahead="" if slot else before)
        context = bos_ids + front + slot + back
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
        """Log texts that the tokenizer changes: for each kind of change the first row, and the number of rows.

        The kinds are a control token in a row (such as the one that ends a turn), text without tokens, and an answer
        that becomes another one (for example with a lower-case tokenizer).
        """
        found: dict[str, list[str]] = {"control": [], "unknown": [], "answer": []}
        for example in examples:
            where, text = example.source or "an example", f"{example.before}{example.after}{example.answer or ''}"
            for name, value in example.fields.items():
                if (match := self._control.search(str(value))) and str(value).strip() in text:
                    found["control"].append(
                        f"{where}: field {name!r} contains {match[0]!r}, which the tokenizer of {self.name} reads as a "
                        "control token and not as text; change the text unless this is intended"
                    )
            if self._lossless:
                continue
            if self.tokenizer.unk_token_id in self._encode(self._control.sub("", text)):
                found["unknown"].append(
                    f"{where}: the tokenizer of {self.name} has no token for a part of {_short(text)}; change the "
                    "text, or use another model"
                )
            elif example.answer and not example.labels:
                kept = self.text(self._inside(example.answer), special=False)
                if kept.strip() != self._control.sub("", example.answer).strip():
                    found["answer"].append(
                        f"{where}: the tokenizer of {self.name} turns the answer {_short(example.answer.strip())} into "
                        f"{_short(kept.strip())}, so no generation can match it; change the answer, or use another "
                        "model"
                    )
        for messages in found.values():
            if messages:
                log.warning("%s%s", messages[0], f" (and {len(messages) - 1} more like it)" if messages[1:] else "")

    def label_tokens(self, example: Example) -> LabelTokens:
        """Return the token sequences of an example's classes: each verbaliser with and without a leading space.

        If a sequence of one class is a prefix of a sequence of another (``1`` and ``10``), the shorter one would never
        be less likely. In this case all sequences include the end of the label: the tokens that `row` scores after an
        answer, or the end token if the template has no text there.

        Args:
            example: An example; only its labels, its end and whether it is a chat matter.

        Raises:
            UserError: Two classes have the same tokens, or nothing marks the end of their labels.
        """
        labels, key = example.labels, (example.labels, example.end, example.chat)
        if key not in self._label_tokens:
            owners: dict[tuple[int, ...], int] = {}
            for text, index in written(labels):
                tokens = tuple(self.tokens(text))
                if owners.setdefault(tokens, index) != index:
                    raise UserError(
                        f"labels {labels[owners[tokens]][0]!r} and {labels[index][0]!r} have the same tokens, "
                        f"those of {text!r}; give them different verbalisers"
                    )
            if alike := begin_alike(owners, labels):
                owners = with_ends(owners, labels, tuple(self._label_end(example, alike)))
            self._label_tokens[key] = LabelTokens(tuple(owners), tuple(owners.values()), len(labels))
        return self._label_tokens[key]

    def _label_end(self, example: Example, alike: str) -> list[int]:
        """Token ids of the end of a label: the end that training teaches, else the end token, else nothing."""
        if end := self._end(example):
            return end
        if end := self._end(replace(example, end=None)):
            log.warning(
                "%s begin alike, and the template has no text after {answer}, so the end token of the model "
                "distinguishes them; prefer a template that ends with a text (\\n)",
                alike,
            )
        return end

    def _end(self, example: Example) -> list[int]:
        if example.end is not None:
            return self._piece(example.end, last=True)
        end = self.end_token(example.chat)
        return [] if end is None else self._with_embeddings([end])

    def end_token(self, chat: bool) -> int | None:
        """Return the token that ends a text, or in a chat the model's turn; ``None`` if there is none."""
        eos = self.tokenizer.eos_token_id
        end = self.turn_end if chat and self.turn_end is not None else eos
        return None if end is None else int(end)

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The control token that the chat template writes after the model's turn; ``None`` if it writes none there.

        It may differ from the end token: Gemma's turns end with ``<end_of_turn>``, Phi-3's with ``<|end|>``.
        """
        if not self.tokenizer.chat_template:
            return None
        answer = unused_character(str(self.tokenizer.chat_template))
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        try:
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            return None
        _, found, behind = str(rendered).rpartition(answer)
        control = self._control.match(behind)
        if not found or control is None:
            return None
        end = self.tokenizer.convert_tokens_to_ids(control[0])
        assert isinstance(end, int)
        return end

    def texts(self, example: Example) -> tuple[str, str, str | None]:
        """Return an example's text before the prompt slot, the text after it, and the answer; render a chat.

        Raises:
            UserError: The tokenizer has no chat template, or the chat template changes the text.
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
                    f"the chat template of {self.name} does not support a system turn; remove data.system"
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
                f"turn {_short(turn.replace(slot, ''))}; it must show the turn once and unchanged; set chat: false"
            )
        if example.system is not None and example.system.strip() not in text:
            raise UserError(
                f"the chat template of {self.name} drops or changes the system turn {_short(example.system)}; "
                "remove data.system"
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
    """Return a private-use character that a text does not contain."""
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")


def written(labels: Labels) -> list[tuple[str, int]]:
    """Return each verbaliser with and without a leading space, and the index of its class."""
    return [
        (way, index)
        for index, verbalisers in enumerate(labels)
        for text in verbalisers
        for way in (f" {text.strip()}", text.strip())
    ]


def begin_alike(owners: Mapping[Way, int], labels: Labels) -> str | None:
    """Name two classes of which one's text or tokens are a prefix of the other's; ``None`` if there are none.

    Args:
        owners: The class of each text or token sequence.
        labels: The classes.
    """
    for way, owner in owners.items():
        for length in range(1, len(way)):
            if (other := owners.get(way[:length], owner)) != owner:
                return f"labels {labels[other][0]!r} and {labels[owner][0]!r}"
    return None


def with_ends(owners: Mapping[Way, int], labels: Labels, end: Way) -> dict[Way, int]:
    """Append the end to the texts or token sequences of classes that begin alike.

    Args:
        owners: The class of each text or token sequence.
        labels: The classes.
        end: The text or tokens after an answer.

    Raises:
        UserError: There is no end, or one class is still a prefix of another.
    """
    ended = {way + end: owner for way, owner in owners.items()}
    if alike := begin_alike(ended, labels):
        why = "even with the text after {answer}" if end else "and nothing marks the end of a label"
        raise UserError(f"{alike} begin alike, {why}; end the template with a text that no label contains, such as \\n")
    return ended


def check_fits(example: Example, total: int, length: int, name: str, context: int) -> None:
    """Raise a `UserError` if an example does not fit into the context window of a model.

    Args:
        example: The example.
        total: Tokens of the row, including the prompt.
        length: Tokens of the prompt.
        name: Name of the model.
        context: Context window of the model in tokens.
    """
    if total > context:
        raise UserError(
            f"{example.source or 'example'}: prompt ({length}), text and answer are {total} tokens, "
            f"more than the context window of {name} ({context}); shorten the prompt or drop the row"
        )
