"""Keys of blocks: chained, salted, the same however they are made."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.block_keys import (
    MULTIPLIER,
    chain,
    contents,
    extend,
    keys,
    root,
    salt_of,
)

tokens = st.lists(st.integers(0, 5), max_size=40)
sizes = st.integers(1, 8)


@given(tokens, sizes, st.integers(0, 2**64 - 1))
def test_a_key_for_each_whole_block_as_the_chain_says(prompt, size, salt):
    found = keys(prompt, size, salt)
    assert len(found) == len(prompt) // size
    expected, key = [], root(salt)
    for content in contents(prompt, size).tolist():
        key = (key * MULTIPLIER + content) % 2**64
        expected.append(key)
    assert found == expected


@given(tokens, tokens, sizes)
def test_equal_exactly_as_far_as_the_prompts_are(one, other, size):
    same = 0
    while one[: (same + 1) * size] == other[: (same + 1) * size] and (same + 1) * size <= min(
        len(one), len(other)
    ):
        same += 1
    pairs = list(zip(keys(one, size), keys(other, size), strict=False))
    assert [a == b for a, b in pairs] == [at < same for at in range(len(pairs))]


@given(tokens, sizes, st.integers(0, 5), st.sampled_from([0, 7]))
def test_going_on_from_a_block_is_as_from_the_start(prompt, size, at, salt):
    whole = keys(prompt, size, salt)
    parents = [root(salt), *whole]
    at = min(at, len(whole))
    assert extend(parents[at], prompt[at * size :], size) == whole[at:]


@given(tokens, sizes)
def test_a_list_and_arrays_of_any_kind_give_the_same(prompt, size):
    expected = keys(prompt, size)
    for kind in (np.uint16, np.uint32, np.int64, np.uint64):
        assert keys(np.array(prompt, dtype=kind), size) == expected


def test_no_two_of_many_blocks_share_a_key():
    rng = random.Random(1)
    noise = [rng.randrange(3) for _ in range(64_000)]  # poor in tokens, rich in blocks
    steps = list(range(64_000))
    repeated = [[token] * 64_000 for token in (0, 1, 7)]
    found = [key for prompt in (noise, steps, *repeated) for key in keys(prompt, 16)]
    assert len(set(found)) == len(found) == 20_000


def test_salts_keep_prompts_apart():
    prompt = list(range(64))
    salts = [0, salt_of("adapter"), salt_of("", "adapter"), salt_of("adap", "ter"), salt_of("b")]
    found = [key for salt in salts for key in keys(prompt, 16, salt)]
    assert len(set(found)) == len(found) == 4 * len(salts)
    assert salt_of("adapter") == salts[1]
    assert salt_of("", "") == 0


def test_negative_tokens_are_refused():
    with pytest.raises(OverflowError):
        keys([-1] * 16, 16)


def test_no_blocks_no_keys():
    assert keys([], 16) == keys([1] * 15, 16) == chain(5, contents([], 4)) == []
