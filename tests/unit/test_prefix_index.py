"""The index against a model that keeps a set of keys for each instance."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex

NAMES = [f"engine-{i}" for i in range(5)]
names = st.sampled_from(NAMES)


def longest(held: set[int], keys: Sequence[int]) -> int:
    count = 0
    while count < len(keys) and keys[count] in held:
        count += 1
    return count


class AgainstSets(RuleBasedStateMachine):
    """Instances come, go, and change what they hold."""

    prompts = Bundle("prompts")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(2)
        self.model: dict[str, set[int]] = {}
        self.asked: list[list[int]] = [[]]

    @rule(target=prompts, tokens=st.lists(st.integers(0, 1), max_size=12))
    def prompt(self, tokens):
        keys = self.index.keys(tokens)
        self.asked.append(keys)
        return keys

    @rule(name=names)
    def join(self, name):
        self.index.join(name)
        self.model.setdefault(name, set())

    @rule(name=names)
    def leave(self, name):
        self.index.leave(name)
        self.model.pop(name, None)

    @rule(name=names, keys=prompts, start=st.integers(0, 3))
    def store(self, name, keys, start):
        if name in self.model:
            self.index.store(name, keys[start:])
            self.model[name].update(keys[start:])

    @rule(name=names, keys=prompts, start=st.integers(0, 3))
    def remove(self, name, keys, start):
        if name in self.model:
            self.index.remove(name, keys[start:])
            self.model[name].difference_update(keys[start:])

    @rule(name=names)
    def clear(self, name):
        if name in self.model:
            self.index.clear(name)
            self.model[name].clear()

    @invariant()
    def equals_the_model(self):
        for keys in self.asked:
            expected = {name: longest(held, keys) for name, held in self.model.items()}
            assert self.index.match(keys) == {name: n for name, n in expected.items() if n}
        assert {name: self.index.held(name) for name in NAMES} == {
            name: len(self.model.get(name, ())) for name in NAMES
        }
        assert len(self.index) == len(set().union(*self.model.values()))


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_prefixes_that_end_anywhere_in_a_long_prompt():
    index = PrefixIndex(16)
    keys = index.keys(range(100_000))
    lengths = {f"e{i}": n for i, n in enumerate([1, 255, 256, 257, 511, 512, 1000, 6249, 6250] * 10)}
    for name, n in lengths.items():
        index.join(name)
        index.store(name, keys[:n])
        index.store(name, keys[n + 1 :])  # a hole
    assert index.match(keys) == lengths
    assert index.match(index.keys(range(1, 100_001))) == {}


def test_the_place_of_one_that_left_is_clean():
    index = PrefixIndex(4)
    keys = index.keys(range(16))
    for name in ("a", "b"):
        index.join(name)
        index.store(name, keys)
    index.leave("a")
    index.join("c")
    assert index.match(keys) == {"b": 4}
    index.store("c", keys[:1])
    assert index.match(keys) == {"b": 4, "c": 1}


def test_who_has_not_joined_is_an_error():
    index = PrefixIndex(4)
    for call in (index.store, index.remove, index.remember):
        with pytest.raises(KeyError):
            call("nobody", [1])
    with pytest.raises(KeyError):
        index.clear("nobody")
    index.leave("nobody")
    with pytest.raises(ValueError):
        PrefixIndex(0)


def test_an_estimate_keeps_what_was_routed_last():
    index = PrefixIndex(1)
    index.join("e")
    first, second, third = (index.keys(range(i, i + 4)) for i in (0, 10, 20))
    index.remember("e", first, limit=8)
    index.remember("e", second, limit=8)
    index.remember("e", first[:2], limit=8)
    assert index.match(first) == index.match(second) == {"e": 4}
    index.remember("e", third, limit=8)
    # The tail of the first, then that of the second, as engines let go of the end of a prompt first.
    assert (index.match(first), index.match(second), index.match(third)) == ({"e": 2}, {"e": 2}, {"e": 4})
    assert index.held("e") == 8
    index.remember("e", index.keys(range(30, 50)), limit=8)
    assert index.match(index.keys(range(30, 50))) == {"e": 8}
    index.clear("e")
    index.remember("e", first, limit=8)
    assert (index.held("e"), index.match(first)) == (4, {"e": 4})
