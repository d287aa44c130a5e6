"""Tokenizers of many kinds, trained on a few sentences: what each does to the start of a text, to spaces and lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_prompts.lm import FrozenLM, LMConfig

SENTENCES = [
    "Here are two words: hot and cold, in and out, day and night.",
    "Answer the question, please. Question: what is the opposite of hot? Answer: cold",
    "The cat sat on the mat. A word begins with a space; the opposite of a word is a word.",
    "Q: hot\nA: cold\n\nQ: day\nA: night\n  and so on, 1 2 3 4 5 6 7 8 9 0 | x y z",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
METASPACE = ("always", "first", "never")


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    unknown = "<unk>" if tokenizer.token_to_id("<unk>") is not None else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def byte_level(
    normalizer: normalizers.Normalizer | None = None, add_prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return finished(tokenizer)


def sentencepiece(prepend: str | None = None, split: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2's kind: words begin with a space, every text does, and decoding drops that space.

    Args:
        prepend: Where the pre-tokenizer puts a space; ``None`` for a normaliser that does so, as Llama 2 has it.
        split: Whether words are cut apart before merging.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    end: list[decoders.Decoder] = []
    if prepend is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to train words; taken out below
        end = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=split)
        end = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend, split=split)]
    tokenizer.decoder = decoders.Sequence(end)
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in SENTENCES], trainer)
    if prepend is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIAL]  # bytes are none
    return finished(Tokenizer.from_str(json.dumps(parts)))


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: line breaks are spaces, and several spaces are one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return finished(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: there are no spaces in its tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return finished(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """One token for each word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return finished(tokenizer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, prefix space": lambda: byte_level(add_prefix_space=True),
    "llama 2": sentencepiece,
    **{f"metaspace {scheme}": lambda scheme=scheme: sentencepiece(scheme) for scheme in METASPACE},  # type: ignore[misc]
    "metaspace always, whole": lambda: sentencepiece("always", split=False),
    "strips": lambda: byte_level(normalizers.Strip()),
    "strips the left": lambda: byte_level(normalizers.Strip(left=True, right=False)),
    "merges line breaks": lambda: byte_level(normalizers.Replace(Regex("\n+"), "\n")),
    "drops line breaks": lambda: byte_level(normalizers.Replace("\n", "")),
    "lowercase": lambda: byte_level(normalizers.Lowercase()),
    "nfkc": lambda: byte_level(normalizers.NFKC()),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "words": words,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def save_model(folder: Path, kind: str, shape: str) -> str:
    """A tiny model with such a tokenizer, in a folder."""
    tokenizer = tokenizer_of(kind)
    FrozenLM.load(LMConfig(f"{shape},vocab_size={max(257, len(tokenizer))}")).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Adds a space to the start of every text, a BOS before it and an EOS after it, as Llama 2's kind can."""
    words = ["<unk>", "<s>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyzHA", "▁hot", "▁and", "▁cold"]
    merges = [("▁", "h"), ("▁h", "o"), ("▁ho", "t")]
    vocab = {word: index for index, word in enumerate([*words, "▁h", "▁ho"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
