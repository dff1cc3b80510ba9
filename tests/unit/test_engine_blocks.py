"""An engine's events, translated: against an engine that caches as vLLM's block pool does."""

import random
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy import block_keys
from mooncake_connector.scheduler.policy.block_keys import salt_of
from mooncake_connector.scheduler.policy.engine_blocks import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineBlocks,
    decode,
)
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex


def engine_hash(tokens, extras=()):
    """Of the block that ends these tokens, as a number or as bytes."""
    digest = blake2b(f"{tokens} {extras}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") if digest[0] % 2 else digest * 4


def stored(prompt, size, first=0, last=None, *, extras=None, **fields):
    """The event of a prompt's blocks `first` to `last`."""
    last = len(prompt) // size if last is None else last
    told = tuple(map(repr, extras or ()))
    hashes = [engine_hash(tuple(prompt[: (at + 1) * size]), told[: at + 1]) for at in range(last)]
    return BlockStored(
        block_hashes=hashes[first:],
        parent_block_hash=hashes[first - 1] if first else None,
        token_ids=list(prompt[first * size : last * size]),
        block_size=size,
        extra_keys=extras[first:last] if extras else None,
        **fields,
    )


@dataclass
class Engine:
    """A pool of blocks: what a prompt lacks is stored, unreferenced blocks go the oldest first."""

    size: int
    room: int
    pool: list[tuple[int, ...]] = field(default_factory=list)  # prefixes, the oldest first; twice: two copies

    def serve(self, prompt, *, side_by_side=False):
        """The events of one prompt; `side_by_side`: it was computed while another of its kind was."""
        count = len(prompt) // self.size
        prefixes = [tuple(prompt[: (at + 1) * self.size]) for at in range(count)]
        hit = 0
        while not side_by_side and hit < count and prefixes[hit] in self.pool:
            hit += 1
        events = [
            BlockRemoved(block_hashes=[engine_hash(self.pool.pop(0))])
            for _ in range(max(0, len(self.pool) + count - hit - self.room))
        ]
        # Blocks in use are not evicted: what was hit is as if it was used again.
        for prefix in prefixes[:hit]:
            if prefix not in self.pool:
                return events
        if hit < count:
            events.append(stored(prompt, self.size, hit))
        self.pool += reversed(prefixes[hit:])
        return events

    def holds(self, prompt, part):
        """How many parts of that many tokens begin the prompt and lie in cached blocks."""
        cached = {q[:end] for q in self.pool for end in range(len(q) - self.size + part, len(q) + 1, part)}
        count = 0
        while (count + 1) * part <= len(prompt) and tuple(prompt[: (count + 1) * part]) in cached:
            count += 1
        return count


prompts = st.lists(st.integers(0, 1), min_size=4, max_size=24)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.booleans(), st.booleans()), max_size=14),
    st.sampled_from([(2, 2), (2, 4), (1, 4)]),
    st.integers(12, 20),
)
def test_the_index_holds_what_the_engine_holds(requests, sizes, room):
    ours, theirs = sizes
    engine, index = Engine(theirs, room), PrefixIndex(ours)
    blocks = EngineBlocks(index, "e")
    waiting = []
    for prompt, side_by_side, published in requests:
        waiting += engine.serve(prompt, side_by_side=side_by_side)
        if not published:
            continue
        blocks.apply(waiting)
        waiting = []
        for asked, _, _ in requests:
            assert index.match(index.keys(asked)).get("e", 0) == engine.holds(asked, ours)
    blocks.apply([*waiting, AllBlocksCleared()])
    assert index.held("e") == len(index) == 0
    assert blocks.dropped == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(prompts, max_size=20), st.data())
def test_missed_events_make_no_false_keys(requests, data):
    """Whatever is missed, a key is of a prefix that was computed."""
    engine, index = Engine(2, 16), PrefixIndex(2)
    blocks = EngineBlocks(index, "e")
    for prompt in requests:
        events = engine.serve(prompt)
        if data.draw(st.booleans()):
            blocks.apply(events)
    real = {key for prompt in requests for key in index.keys(prompt)}
    assert set(index._holders) <= real


def test_a_block_after_an_unknown_one_is_left_out():
    index = PrefixIndex(4)
    blocks = EngineBlocks(index, "e")
    prompt = list(range(32))
    blocks.apply([stored(prompt, 4, 2), stored(prompt, 4, 0, 1), stored(prompt, 4, 3, 5)])
    assert index.match(index.keys(prompt)) == {"e": 1}
    assert blocks.dropped == 6 + 2


def test_adapters_and_cache_salts_are_kept_apart():
    index = PrefixIndex(4)
    blocks = EngineBlocks(index, "e")
    prompt = list(range(16))
    salted = [["secret"], None, None, None]
    blocks.apply([stored(prompt, 4, extras=salted)])
    adapter = [["a"]] * 4
    blocks.apply([stored(prompt, 4, 0, 3, extras=adapter, lora_name="a", lora_id=1)])
    both = [["b", "secret"], ["b"], ["b"], ["b"]]
    blocks.apply([stored(prompt, 4, 0, 2, extras=both, lora_name="b", lora_id=2)])
    found = {
        salts: dict(index.match(index.keys(prompt, salt_of(*salts)))).get("e", 0)
        for salts in [("", ""), ("", "secret"), ("a", ""), ("a", "secret"), ("b", ""), ("b", "secret")]
    }
    expected = {("", "secret"): 4, ("a", ""): 3, ("b", "secret"): 2}
    assert found == {salts: expected.get(salts, 0) for salts in found}
    assert blocks.dropped == 0
    # The adapter's next block goes on from its own.
    blocks.apply([stored(prompt, 4, 3, extras=adapter, lora_name="a", lora_id=1)])
    assert index.match(index.keys(prompt, salt_of("a", ""))) == {"e": 4}


@pytest.mark.parametrize("odd", [[["image", 3]], [b"digest"], ["not the first"]])
def test_what_depends_on_more_than_tokens_is_left_out_with_all_after_it(odd):
    index = PrefixIndex(4)
    blocks = EngineBlocks(index, "e")
    prompt = list(range(24))
    extras = [None, None, odd, None, None, None]
    blocks.apply([stored(prompt, 4, 0, 4, extras=extras)])
    blocks.apply([stored(prompt, 4, 4, extras=extras)])
    assert index.match(index.keys(prompt)) == {"e": 2}
    assert (index.held("e"), blocks.dropped) == (2, 4)
    one = stored(prompt, 4, 0, 1, lora_id=7)
    blocks.apply([one])
    assert blocks.dropped == 5, "an adapter without a name is no salt"


def test_only_the_engines_own_whole_prefix_counts():
    index = PrefixIndex(4)
    blocks = EngineBlocks(index, "e")
    prompt = list(range(16))
    others = [
        stored(prompt, 4, group_idx=0, kv_cache_spec_kind="sliding_window"),
        stored(prompt, 4, group_idx=2, medium="CPU"),
        stored(prompt, 4, group_idx=2, locality="REMOTE"),
    ]
    blocks.apply(others)
    assert index.held("e") == 0
    full = [
        stored(prompt, 4, 0, 3, group_idx=g, kv_cache_spec_kind="full_attention", medium="GPU")
        for g in (1, 2)
    ]
    blocks.apply(full)
    hashes = full[0].block_hashes
    elsewhere = [
        BlockRemoved(block_hashes=hashes, group_idx=0),
        BlockRemoved(block_hashes=hashes, group_idx=2),
        BlockRemoved(block_hashes=hashes, group_idx=1, medium="CPU"),
    ]
    blocks.apply(elsewhere)
    assert index.match(index.keys(prompt)) == {"e": 3}
    blocks.apply([AllBlocksCleared(), full[0], BlockRemoved(block_hashes=hashes[2:], group_idx=1)])
    assert index.match(index.keys(prompt)) == {"e": 2}


def test_blocks_of_another_size_are_left_out():
    index = PrefixIndex(16)
    blocks = EngineBlocks(index, "e")
    prompt = list(range(96))
    blocks.apply([stored(prompt, 24), stored(prompt, 8)])
    cut = stored(prompt, 16)
    blocks.apply([msgspec.structs.replace(cut, token_ids=cut.token_ids[:-1])])
    assert (index.held("e"), blocks.dropped) == (0, 4 + 12 + 6)


@pytest.mark.parametrize("is_array", [True, False])
def test_batches_of_all_versions(is_array):
    """Arrays and maps; fields and kinds of events that are not known yet."""
    event = stored(list(range(8)), 4, group_idx=0)
    plain = {"type": "BlockStored", **{name: getattr(event, name) for name in event.__struct_fields__}}
    later = {"type": "BlockStored", **plain, "session_id": "s", "what_is_this": [1, {"a": 2}]}
    removed = {"type": "BlockRemoved", "block_hashes": [1, b"2"], "medium": "GPU"}
    unknown = {"type": "BlockPraised", "block_hashes": 7}
    cleared = {"type": "AllBlocksCleared"}

    def payload(*events):
        parts = {"ts": 1.5, "events": list(events), "data_parallel_rank": 0}
        return msgspec.msgpack.encode(list(parts.values()) if is_array else parts)

    known = [event, BlockRemoved(block_hashes=[1, b"2"], medium="GPU"), AllBlocksCleared()]
    assert decode(payload(later, removed, cleared)) == (1.5, known)
    assert decode(payload(later, unknown, removed, cleared)) == (1.5, known)
    with pytest.raises(msgspec.DecodeError):
        decode(payload({**plain, "token_ids": "abc"}))
    with pytest.raises(msgspec.DecodeError):
        decode(b"")


def test_keys_of_events_are_those_of_prompts():
    index = PrefixIndex(16)
    blocks = EngineBlocks(index, "e")
    rng = random.Random(3)
    prompt = [rng.randrange(150_000) for _ in range(1000)]
    blocks.apply([stored(prompt, 16, at, at + 1) for at in range(62)])
    assert list(index._holders) == block_keys.keys(prompt, 16)
