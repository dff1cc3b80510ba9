"""Names for KV blocks by what they hold: equal for equal prefixes, whichever engine computed them.

A block's key depends on its tokens, on all tokens before it, and on a salt. Engines chain their hashes in the
same way (vLLM: `hash_block_tokens`), but each with its own function and seed, so theirs can't be compared.

    g_k = mix(W . tokens of block k)        H_k = H_(k-1) * M + g_k  (mod 2**64)

The chain is linear, so that a long prompt's keys are one cumulative sum. Two prompts collide by chance with
2**-64; who makes prompts collide on purpose misleads no more than the choice of an engine for them.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[int] | NDArray[np.integer]
Words = NDArray[np.uint64]

MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(MULTIPLIER, -1, 2**64)
_MASK = 2**64 - 1
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31))
_FACTORS = tuple(np.uint64(n) for n in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def keys(tokens: Tokens, block_size: int, salt: int = 0) -> list[int]:
    """Keys of the whole blocks of a prompt, one after the other; what is left over has none.

    Args:
        tokens: token ids, not negative. An array of unsigned integers is quickest.
        block_size: tokens per block.
        salt: of `salt_of`, for KV that depends on more than the tokens.
    """
    return extend(root(salt), tokens, block_size)


def extend(parent: int, tokens: Tokens, block_size: int) -> list[int]:
    """Keys of the whole blocks that follow the block `parent` (or a `root`)."""
    return chain(parent, contents(tokens, block_size))


def root(salt: int = 0) -> int:
    """What the first block of a prompt follows."""
    return int(_mixed(np.array([salt & _MASK], dtype=np.uint64))[0])


def salt_of(*parts: str) -> int:
    """The salt of KV that depends on `parts` (a LoRA adapter's name, a cache salt); 0 if all are empty."""
    if not any(parts):
        return 0
    told = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(blake2b(told.encode(), digest_size=8).digest(), "big") or 1


def contents(tokens: Tokens, block_size: int) -> Words:
    """What each whole block holds as one number, whatever comes before it; [blocks]."""
    count = len(tokens) // block_size
    whole = _words(tokens)[: count * block_size].reshape(count, block_size)
    return _mixed(whole @ _weights(block_size))


def chain(parent: int, blocks: Words) -> list[int]:
    """Keys of blocks of these `contents` that follow `parent` one after the other."""
    powers = np.cumprod(np.full(len(blocks), MULTIPLIER, dtype=np.uint64))
    inverses = np.cumprod(np.full(len(blocks), _INVERSE, dtype=np.uint64))
    sums = np.cumsum(blocks * inverses, dtype=np.uint64) + np.uint64(parent)
    found: list[int] = (sums * powers).tolist()
    return found


def _words(tokens: Tokens) -> Words:
    if isinstance(tokens, np.ndarray):
        return tokens.astype(np.uint64, copy=False)
    # Three times as quick as numpy's own conversion of a list.
    return np.frombuffer(array("L", tokens), dtype=np.dtype("L")).astype(np.uint64, copy=False)


def _mixed(words: Words) -> Words:
    """Each word's bits spread over all 64 (a step of splitmix64, a bijection). Zero does not stay zero."""
    words = words + np.uint64(MULTIPLIER)
    words = (words ^ (words >> _SHIFTS[0])) * _FACTORS[0]
    words = (words ^ (words >> _SHIFTS[1])) * _FACTORS[1]
    return words ^ (words >> _SHIFTS[2])


@lru_cache
def _weights(block_size: int) -> Words:
    weights = _mixed(np.arange(1, block_size + 1, dtype=np.uint64) * np.uint64(MULTIPLIER))
    weights |= np.uint64(1)
    weights.setflags(write=False)
    return weights
