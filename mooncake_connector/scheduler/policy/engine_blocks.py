"""What one engine says of its cache (vLLM's KV events), in the index's keys.

Engines name blocks by hashes of their own, so an event's token ids are hashed anew. Only what is certain
counts: a block is left out, with all that follow it, if the block before it is not known (events were
missed), or if its hash depends on what nobody outside can tell (images, embeddings).

An engine's blocks may be larger than the index's, by a whole factor. The index then counts the parts of a
block that two prompts share, which the engine can't use: less than one of its blocks too many.

Of several KV cache groups (models that mix kinds of attention) the first full-attention group that reports
counts, as it alone keeps the whole prefix. Windowed layers need their last window besides, so the engine may
use less than a match says, never more. Models without full attention report nothing that counts.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from mooncake_connector.scheduler.policy import block_keys
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex

log = logging.getLogger(__name__)

Hash = int | bytes

_FULL = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
_MEDIA = frozenset({None, "GPU"})
_MASK = 2**64 - 1


class BlockStored(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Blocks are in the cache, one after the other. Names and meanings are vLLM's.

    Attributes:
        block_hashes: the engine's own.
        parent_block_hash: of the block before the first; None: they begin a prompt.
        token_ids: of all of them.
        block_size: tokens per block.
        medium: tier; ``GPU`` is the engine's own cache, on CPU engines too.
        extra_keys: for each block what its hash depends on beside tokens: the adapter's name, (image, offset)
            pairs, a cache salt (first block), digests of embeddings.
        group_idx: KV cache group.
        kv_cache_spec_kind: the group's kind of attention.
        locality: ``REMOTE`` if it is another's.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Blocks are no longer in the cache; attributes as of `BlockStored`."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Event]


class _BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: list[Event]


class _Unread(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]


class _UnreadMap(msgspec.Struct):
    ts: float
    events: list[msgspec.Raw]


_batch = msgspec.msgpack.Decoder(_Batch)
_batch_map = msgspec.msgpack.Decoder(_BatchMap)
_unread = msgspec.msgpack.Decoder(_Unread)
_unread_map = msgspec.msgpack.Decoder(_UnreadMap)
_event = msgspec.msgpack.Decoder(Event)
_tag = msgspec.msgpack.Decoder(dict[str, Any])


def decode(payload: bytes) -> tuple[float, Sequence[Event]]:
    """One published batch: the engine's clock at its making, and the events of kinds that are known.

    Batches are arrays or, in earlier versions of vLLM, maps.

    Raises:
        msgspec.DecodeError: it is none.
    """
    is_array = payload[:1] != b"" and payload[0] & 0xF0 == 0x90
    try:
        batch = _batch.decode(payload) if is_array else _batch_map.decode(payload)
        return batch.ts, batch.events
    except msgspec.ValidationError:
        unread = _unread.decode(payload) if is_array else _unread_map.decode(payload)
        return unread.ts, list(_known(unread.events))


def _known(events: Sequence[msgspec.Raw]) -> Iterator[Event]:
    kinds = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    for raw in events:
        if _tag.decode(raw).get("type") in kinds:
            yield _event.decode(raw)


class EngineBlocks:
    """One engine's cache as its events tell it, kept in the index under `name`, which joins.

    An engine may hold a block's content several times (prompts computed side by side): it is there until the
    last copy is removed. A request's ``kv_cache_report_mode=full`` makes vLLM report blocks again that are
    there; they can't be told from copies.

    Attributes:
        name: the instance.
        dropped: blocks left out, as the module says, or because their size is no multiple of the index's.
    """

    def __init__(self, index: PrefixIndex, name: str) -> None:
        self.name = name
        self.dropped = 0
        self._index = index
        self._keys: dict[Hash, int] = {}  # of the last of our blocks in the engine's
        # The others in it, where its blocks are larger than ours, and in how many they are.
        self._before: dict[Hash, list[int]] = {}
        self._shared: Counter[int] = Counter()
        self._copies: dict[Hash, int] = {}  # beyond the first
        self._group: int | None = None
        self._odd_sizes: set[int] = set()
        index.join(name)

    def clear(self) -> None:
        """Nothing is known any more, of which group counts neither: it may be another engine's turn."""
        self._group = None
        self._empty()

    def apply(self, events: Sequence[Event]) -> None:
        """Take in what happened, in its order.

        Raises:
            OverflowError: a token id is negative.
        """
        stored = [event for event in events if type(event) is BlockStored and self._counts(event)]
        tokens = [token for event in stored for token in event.token_ids]
        size = self._index.block_size
        contents = block_keys.contents(tokens, size).tolist() if tokens else []
        counted, at = iter(stored), 0
        expected = next(counted, None)
        for event in events:
            if event is expected:
                count = len(expected.token_ids) // size
                self._store(expected, contents[at : at + count])
                at += count
                expected = next(counted, None)
            elif type(event) is BlockRemoved:
                self._remove(event)
            elif type(event) is AllBlocksCleared:
                self._empty()

    def _empty(self) -> None:
        self._keys.clear()
        self._before.clear()
        self._shared.clear()
        self._copies.clear()
        self._index.clear(self.name)

    def _counts(self, event: BlockStored) -> bool:
        """Whether it is of the group that counts, and whole blocks of ours."""
        if event.kv_cache_spec_kind not in _FULL or event.medium not in _MEDIA or event.locality == "REMOTE":
            return False
        if self._group is None:
            self._group = event.group_idx
        if event.group_idx != self._group:
            return False
        fits = event.block_size > 0 and event.block_size % self._index.block_size == 0
        if fits and len(event.token_ids) == len(event.block_hashes) * event.block_size:
            return True
        self.dropped += len(event.block_hashes)
        if not fits and event.block_size not in self._odd_sizes:
            self._odd_sizes.add(event.block_size)
            log.warning(
                "%s caches blocks of %d tokens, the prefix index those of %d: they can't be counted",
                self.name,
                event.block_size,
                self._index.block_size,
            )
        return False

    def _store(self, event: BlockStored, contents: Sequence[int]) -> None:
        usable = len(event.block_hashes)
        if event.extra_keys or event.lora_name or event.lora_id is not None:
            usable, salt = _told(event)
            key = block_keys.root(salt)
        else:
            key = self._root
        if event.parent_block_hash is not None:
            parent = self._keys.get(event.parent_block_hash)
            if parent is None:
                self.dropped += len(event.block_hashes)
                return
            key = parent
        self.dropped += len(event.block_hashes) - usable
        each = event.block_size // self._index.block_size
        keys = []
        for content in contents[: usable * each]:
            key = (key * block_keys.MULTIPLIER + content) & _MASK
            keys.append(key)
        for at, hash in enumerate(event.block_hashes[:usable]):
            if hash in self._keys:
                self._copies[hash] = self._copies.get(hash, 0) + 1
                continue
            self._keys[hash] = keys[at * each + each - 1]
            if each > 1:
                self._before[hash] = keys[at * each : at * each + each - 1]
                self._shared.update(self._before[hash])
        self._index.store(self.name, keys)

    def _remove(self, event: BlockRemoved) -> None:
        if event.group_idx != self._group or event.medium not in _MEDIA or event.locality == "REMOTE":
            return
        gone = []
        for hash in event.block_hashes:
            if copies := self._copies.get(hash):
                if copies == 1:
                    del self._copies[hash]
                else:
                    self._copies[hash] = copies - 1
            elif (key := self._keys.pop(hash, None)) is not None:
                gone.append(key)
                for part in self._before.pop(hash, ()):
                    self._shared[part] -= 1
                    if not self._shared[part]:
                        del self._shared[part]
                        gone.append(part)
        if gone:
            self._index.remove(self.name, gone)

    _root = block_keys.root()


def _told(event: BlockStored) -> tuple[int, int]:
    """How many of its blocks depend on tokens, an adapter's name and a cache salt alone; their salt."""
    if event.lora_id is not None and not event.lora_name:
        return 0, 0
    adapter = event.lora_name or ""
    cache_salt = ""
    for at, extra in enumerate(event.extra_keys or ()):
        rest = list(extra or ())
        if adapter and rest[:1] == [adapter]:
            rest = rest[1:]
        if rest and at == 0 and event.parent_block_hash is None and len(rest) == 1 and type(rest[0]) is str:
            cache_salt = rest[0]
        elif rest:
            return at, block_keys.salt_of(adapter, cache_salt)
    return len(event.block_hashes), block_keys.salt_of(adapter, cache_salt)
