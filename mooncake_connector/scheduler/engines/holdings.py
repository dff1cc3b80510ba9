"""Keeps the prefix index: by what engines say of their caches, or by what was routed to silent ones."""

import asyncio
from collections.abc import Sequence

from mooncake_connector.scheduler.engines.base import KvEventSource
from mooncake_connector.scheduler.engines.kv_events import KvEventSubscriber
from mooncake_connector.scheduler.engines.pool import Instance
from mooncake_connector.scheduler.policy.base import Placement
from mooncake_connector.scheduler.policy.engine_blocks import EngineBlocks
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex

# Blocks that an engine is taken to hold if it did not say how much KV it has.
UNKNOWN_BLOCKS = 1 << 14


class Holdings:
    """What each engine of the pools holds.

    An engine that goes away for a moment keeps its cache; one that was started anew has an empty one. The
    first engine's block size is the index's.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._identities: dict[str, tuple[str, str | int]] = {}
        self._limits: dict[str, int] = {}
        self._sources: dict[str, KvEventSource] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}

    def follow(self, instance: Instance) -> None:
        """An engine came, went, came anew, or was removed for good."""
        info, name = instance.info, instance.url
        if instance.removed:
            self._forget(name)
            return
        if not instance.up or info is None or self._identities.get(name) == info.identity:
            return
        if not self._identities:
            self._index.block_size = info.block_size
        blocks = info.kv_tokens // self._index.block_size or UNKNOWN_BLOCKS
        limit = blocks if info.prefix_caching else 0
        if info.kv_events and info.kv_events == self._sources.get(name):
            self._identities[name], self._limits[name] = info.identity, limit
            return  # who listens there sees the new start by itself
        self._forget(name)
        self._identities[name], self._limits[name] = info.identity, limit
        self._index.join(name)
        if info.kv_events:
            self._sources[name] = info.kv_events
            self._listening[name] = asyncio.create_task(self._listen(name, info.kv_events))

    def routed(self, placement: Placement, keys: Sequence[int]) -> None:
        """A request with these keys was placed: who says nothing of its cache will hold them."""
        for name in (placement.prefill, placement.decode):
            if name in self._limits and name not in self._sources and keys:
                self._index.remember(name, keys, limit=self._limits[name])

    async def close(self) -> None:
        """Listen to nobody any more."""
        listening = list(self._listening.values())
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)

    def _forget(self, name: str) -> None:
        if listening := self._listening.pop(name, None):
            listening.cancel()
        self._index.leave(name)
        for of_each in (self._identities, self._limits, self._sources):
            of_each.pop(name, None)

    async def _listen(self, name: str, source: KvEventSource) -> None:
        async with KvEventSubscriber(EngineBlocks(self._index, name), source):
            await asyncio.Event().wait()
