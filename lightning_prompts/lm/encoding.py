"""Text to token ids. Only the language model owns a tokenizer, so this is the one place where text is cut into tokens.

A row is a list of integers: a token id, or ``-1 - p`` for position ``p`` of the prompt. The parts around the prompt
slot are tokenised one by one, the same way for every method, so that a soft prompt, a hard prompt and a fixed text are
compared on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from lightning_prompts.errors import UserError
from lightning_prompts.types import Example

SLOT = "\ue000"  # private-use character that marks the prompt slot inside a rendered chat


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


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """Classes as token sequences.

    Attributes:
        tokens: The sequences.
        owners: The class of each, an index.
        classes: ``Y``, how many there are.
    """

    tokens: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    classes: int


class Encoder:
    """Turns examples into rows.

    Args:
        tokenizer: The LM's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out what the tokenizer puts ahead of a text, and whether it adds a space to a text's start."""
        self.tokenizer = tokenizer
        plain = tokenizer.encode("a", add_special_tokens=False)
        full = tokenizer.encode("a", add_special_tokens=True)
        # The tokens that start a sequence (BOS); an end-of-sequence token after the text must not be copied.
        self.lead: list[int] = full[: full.index(plain[0])] if plain and plain[0] in full else []
        first = tokenizer.convert_ids_to_tokens(plain)[0] if plain else ""
        self._adds_space = str(first).startswith("▁")
        self._label_tokens: dict[Labels, LabelTokens] = {}

    def tokens(self, text: str, start: bool = False) -> list[int]:
        """Token ids of a piece of text, without special tokens.

        Args:
            text: The piece, with the white space that belongs to it.
            start: Whether it starts a sequence; elsewhere a tokenizer that adds a space to every text is kept from it.
        """
        if not text:
            return []
        if start or not self._adds_space:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        mark = self.tokenizer.encode("\n", add_special_tokens=False)
        return list(self.tokenizer.encode("\n" + text, add_special_tokens=False))[len(mark) :]

    def row(self, example: Example, length: int, with_end: bool = False) -> Row:
        """Encode one example around a prompt of ``length`` tokens, with what follows its answer if asked.

        Raises:
            UserError: Nothing precedes the answer, the answer has no tokens, or the tokenizer has no chat template.
        """
        before, after, answer = self.texts(example)
        slot = [-1 - p for p in range(length)]
        head = ([] if example.chat else list(self.lead)) + self.tokens(before, start=True)
        context = head + slot + self.tokens(after, start=not head and not slot)
        where = f"{example.source}: " if example.source else ""
        if not context:
            raise UserError(f"{where}nothing precedes the answer; give the template some text or the prompt a length")
        if answer is None:
            return Row(context, [])
        tokens = self.tokens(answer)
        if not tokens:
            raise UserError(f"{where}the answer is empty")
        return Row(context, tokens, self._end(example) if with_end else [])

    def label_tokens(self, labels: Labels) -> LabelTokens:
        """The token sequences that stand for classes: every verbaliser with a leading space and without, each once.

        Raises:
            UserError: Two classes are the same tokens.
        """
        if labels not in self._label_tokens:
            owners: dict[tuple[int, ...], int] = {}
            for text, index in written(labels):
                tokens = tuple(self.tokens(text))
                if owners.setdefault(tokens, index) != index:
                    raise UserError(
                        f"labels {labels[owners[tokens]][0]!r} and {labels[index][0]!r} are the same tokens, "
                        f"those of {text!r}; give them different verbalisers"
                    )
            self._label_tokens[labels] = LabelTokens(tuple(owners), tuple(owners.values()), len(labels))
        return self._label_tokens[labels]

    def _end(self, example: Example) -> list[int]:
        if example.end is not None:
            return self.tokens(example.end)
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def texts(self, example: Example) -> tuple[str, str, str | None]:
        """An example's text in front of the prompt slot, behind it, and its answer; a chat is written out.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        if not example.chat:
            return example.before, example.after, example.answer
        if not self.tokenizer.chat_template:
            raise UserError("chat: true, but this model's tokenizer has no chat template; set chat: false")
        turns = [{"role": "user", "content": f"{example.before}{SLOT}{example.after}"}]
        if example.system is not None:
            turns.insert(0, {"role": "system", "content": example.system})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, _, after = str(text).partition(SLOT)
        return before, after, example.answer


def written(labels: Labels) -> list[tuple[str, int]]:
    """Every way to write some classes, with a leading space and without, and the class of each."""
    return [
        (way, index)
        for index, verbalisers in enumerate(labels)
        for text in verbalisers
        for way in (f" {text.strip()}", text.strip())
    ]


def shared_prefix(rows: Sequence[Row], shared_prompt: bool) -> list[int]:
    """The longest run of tokens that all rows start with.

    At least one token of context is left to each row, since its last hidden state predicts the answer's first token.

    Args:
        rows: The batch.
        shared_prompt: Whether the prompt's positions hold the same vectors in every row.
    """
    contexts = [row.context for row in rows]
    # What the first and the last in alphabetical order share, all share.
    first, other = min(contexts), max(contexts)
    limit = min(map(len, contexts)) - 1
    for index in range(limit):
        if (first[index] < 0 and not shared_prompt) or first[index] != other[index]:
            return first[:index]
    return first[:limit]


def share(
    rows: Sequence[Row], feeds: Sequence[list[int]], groups: Sequence[int], shared_prompt: bool
) -> list[list[list[int]]]:
    """Cut rows into levels of segments, so that what rows share is there once.

    Args:
        rows: ``B`` rows, those of a group next to each other.
        feeds: The tokens of each row that are run, its context first.
        groups: Rows in a group at each level, each a divisor of the one before; the first is mostly ``B``.
        shared_prompt: See `shared_prefix`.

    Returns:
        The segments of each shared level, and last what is left of each row.
    """
    levels = []
    depth, size = [0], len(rows)
    for group in groups:
        parents = [depth[start // size] for start in range(0, len(rows), group)]
        prefixes = [shared_prefix(rows[start : start + group], shared_prompt) for start in range(0, len(rows), group)]
        levels.append([prefix[start:] for prefix, start in zip(prefixes, parents, strict=True)])
        depth, size = [len(prefix) for prefix in prefixes], group
    return [*levels, [feed[depth[index // size] :] for index, feed in enumerate(feeds)]]


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
