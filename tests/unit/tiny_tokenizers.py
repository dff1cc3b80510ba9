"""Tokenizers of several kinds, trained on the spot in a fraction of a second."""

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = (
    "the quick brown fox jumps over the lazy dog. prefill decode cache block transfer. ",
    "Hello, world! 12345 user system assistant   what's the answer?\n\n    return x == 1\n\tpass\n",
    "Straße Ωμέγα 你好世界 🙂 naïve café ½ — “quotes” … <|not a token|> <im_start>",
)
MARKS = ("<|im_start|>", "<|im_end|>", "<|im_start|>x", "<tool_call>", "</tool_call>")


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(
        found, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )


def prepending() -> Tokenizer:
    """As Llama 2 had it: a normalizer puts a mark before every piece."""
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    return _trained(found, trainer)


def metaspace(scheme: str) -> Tokenizer:
    """As SentencePiece: a mark before every word, before the first piece or before every one."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return _trained(found, trainer)


def word_piece() -> Tokenizer:
    """As BERT: white space does not count, and case neither."""
    found = Tokenizer(models.WordPiece(unk_token="<unk>"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return _trained(found, trainer)


def greedy_marks() -> Tokenizer:
    """Added tokens that swallow white space on either side, and one looked for after normalization."""
    found = byte_level()
    found.add_special_tokens([AddedToken("<left>", lstrip=True, normalized=False)])
    found.add_special_tokens([AddedToken("<right>", rstrip=True, normalized=False)])
    found.add_tokens([AddedToken("Straße", normalized=True)])
    return found


def whole_words() -> Tokenizer:
    """An added token that counts only as a whole word: where a text ends matters to it."""
    found = byte_level()
    found.add_tokens([AddedToken("fox", single_word=True, normalized=False)])
    return found


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "prepending": prepending,
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"),
    "word_piece": word_piece,
    "greedy_marks": greedy_marks,
    "whole_words": whole_words,
}


KINDS = tuple(_KINDS)


def make(kind: str) -> Tokenizer:
    """One of that kind, equal to the others of it: training alone does not come out the same twice."""
    return Tokenizer.from_str(_saved(kind))


@functools.cache
def _saved(kind: str) -> str:
    return _KINDS[kind]().to_str()


def _trained(found: Tokenizer, trainer: Any) -> Tokenizer:
    found.train_from_iterator([text * 3 for text in CORPUS], trainer)
    found.add_special_tokens([AddedToken(mark, normalized=False) for mark in ("<s>", "</s>", *MARKS)])
    ends = [(name, found.token_to_id(name)) for name in ("<s>", "</s>")]
    found.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return found
