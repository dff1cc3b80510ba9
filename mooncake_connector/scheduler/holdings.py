"""Keeps the prefix index: by what engines say of their caches, or by what was routed to silent ones."""

from collections.abc import Sequence

from mooncake_connector.scheduler.base import Placement
from mooncake_connector.scheduler.pool import Instance
from mooncake_connector.scheduler.prefix_index import PrefixIndex

# Blocks that an engine is taken to hold if it did not say how much KV it has.
UNKNOWN_BLOCKS = 1 << 14


class Holdings:
    """What each engine of the pools holds.

    An engine that goes away for a moment keeps its cache; one that was started anew has an empty one.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._identities: dict[str, tuple[str, str | int]] = {}
        self._limits: dict[str, int] = {}

    def follow(self, instance: Instance) -> None:
        """An engine came, went, or came anew."""
        info, name = instance.info, instance.url
        if not instance.up or info is None or self._identities.get(name) == info.identity:
            return
        self._index.leave(name)
        if not len(self._index):
            self._index.block_size = info.block_size
        self._index.join(name)
        self._identities[name] = info.identity
        self._limits[name] = info.kv_tokens // self._index.block_size or UNKNOWN_BLOCKS

    def routed(self, placement: Placement, keys: Sequence[int]) -> None:
        """A request with these keys was placed."""
        for name in (placement.prefill, placement.decode):
            if name and name in self._limits and keys:
                self._index.remember(name, keys, limit=self._limits[name])
