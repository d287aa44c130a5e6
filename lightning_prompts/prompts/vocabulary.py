"""The tokens that a prompt may contain."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lightning_prompts.lm import FrozenLM

# Words and parts of words with or without a leading space, and common punctuation.
READABLE = re.compile(r" ?[A-Za-z]+|[ ]?[.,:;!?'\"()-]")


def control_tokens(lm: FrozenLM) -> list[int]:
    """Return the control tokens: end tokens, turns of a chat, file separators."""
    added = [token for token, what in lm.tokenizer.added_tokens_decoder.items() if what.special]
    return sorted(token for token in {*lm.tokenizer.all_special_ids, *added} if token < lm.vocabulary)


def allowed_tokens(lm: FrozenLM, readable: bool = False) -> Tensor:
    """Return a mask of the tokens of the tokenizer, without control tokens.

    Args:
        lm: The frozen language model.
        readable: Whether to allow only words of ASCII letters and punctuation.

    Returns:
        Boolean mask ``[V]``.
    """
    allowed_ids = torch.zeros(lm.vocabulary, dtype=torch.bool, device="cpu")
    known = [token for token in sorted(lm.tokenizer.get_vocab().values()) if token < lm.vocabulary]
    allowed_ids[known] = True
    allowed_ids[control_tokens(lm)] = False
    if readable:
        allowed_ids[[token for token in known if not READABLE.fullmatch(lm.text([token]))]] = False
    return allowed_ids.to(lm.device)
