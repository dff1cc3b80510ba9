"""A target's half of a transfer engine: who may write where, and the fences that end it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport.base import Endpoint, Landed, Mark
from mooncake_connector.kv_transfer.transport.receiver import Receiver

logger = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""How long a fence waits for the initiator's word before it ends the link, which costs all who use it."""


class OneSided(Protocol):
    """The target's end of transports whose hardware writes without asking (rdma)."""

    def admit(self, peer: str, token: bytes) -> None:
        """Let the link of that token have rails, and no earlier link of this peer."""

    def fence_peer(self, peer: str) -> None:
        """Destroy all rails of this peer, for good: when it returns, no write of it can land any more."""

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Call back, from any thread, once so many of each rail's writes have been seen to land."""

    def close(self) -> None:
        """Destroy everything."""


class _Fence(NamedTuple):
    peer: str
    due: float
    on_fenced: Callable[[], None]


class Inbound:
    """Grants, and what became of them, over all transports of this process. Thread-safe.

    Args:
        receiver: of streams. Its `on_link_down` must call `link_down` here.
        one_sided: rdma, where there is any.
        wake: called with the time when `next_tick` may have come nearer.
        on_link_broken: called with the peer and a reason when a fence had to end its link.
    """

    def __init__(
        self,
        receiver: Receiver,
        one_sided: OneSided | None,
        *,
        wake: Callable[[float], None],
        on_link_broken: Callable[[str, str], None],
    ) -> None:
        self._receiver, self._one_sided = receiver, one_sided
        self._wake, self._on_link_broken = wake, on_link_broken
        self._lock = threading.Lock()
        self._owner: dict[int, str] = {}
        self._fences: dict[int, _Fence] = {}
        self._writers: set[str] = set()

    def admit(self, peer: str, *, one_sided: bool) -> Endpoint:
        """A fresh endpoint for one link from `peer`; an earlier link of this peer ends.

        Args:
            one_sided: the link may open rails whose hardware writes without asking.
        """
        self.link_down(peer)
        endpoint = self._receiver.admit(peer)
        if one_sided and self._one_sided is not None:
            self._one_sided.admit(peer, endpoint.token)
            with self._lock:
                self._writers.add(peer)
        return endpoint

    def may_write(self, peer: str) -> bool:
        """Whether this peer may have rails that write by themselves."""
        return peer in self._writers

    def grant(self, key: int, peer: str, ranges: Ranges) -> None:
        """Allow `peer` to write into `ranges` under `key` until revoked."""
        self._receiver.grant(key, peer, ranges)
        with self._lock:
            self._owner[key] = peer

    def revoke(self, key: int) -> Landed:
        """Take a grant back whose writes have all ended, as the initiator said or a fence made sure."""
        with self._lock:
            self._owner.pop(key, None)
            self._fences.pop(key, None)
        return self._receiver.revoke(key)

    def revoke_all(self, peer: str) -> None:
        """Take back every grant of a peer whose link has ended."""
        with self._lock:
            keys = [key for key, owner in self._owner.items() if owner == peer]
        for key in keys:
            self.revoke(key)

    def fence(self, key: int, on_fenced: Callable[[], None], patience: float = PATIENCE_S) -> None:
        """Make late writes under `key` impossible, then call back, unless `revoke` comes first.

        What streams carry is fenced at once. A link with rails that write by themselves is ended after
        `patience` seconds, rails and all: until then the initiator may say that it has stopped, which spares
        it. A silent initiator could otherwise open new rails later and go on where it was stopped.
        """
        self._receiver.revoke(key)
        with self._lock:
            peer = self._owner.get(key)
            waits = peer in self._writers
            if peer is not None and waits:
                self._fences[key] = _Fence(peer, time.monotonic() + patience, on_fenced)
        if waits:
            self._wake(time.monotonic() + patience)
        else:
            on_fenced()

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Call back once everything that these marks count is in place."""
        if marks and self._one_sided is not None:
            self._one_sided.await_marks(peer, marks, on_seen)
        else:
            on_seen()

    def drop(self, peer: str) -> None:
        """End the peer's link; nothing that it wrote by itself can land any more. Its grants stay."""
        self._receiver.drop(peer)
        self.link_down(peer)

    def link_down(self, peer: str) -> None:
        """A peer's last stream ended: its one-sided rails end as well."""
        with self._lock:
            writer = peer in self._writers
            self._writers.discard(peer)
        if writer and self._one_sided is not None:
            self._one_sided.fence_peer(peer)
        self._fenced([key for key, fence in self._pending() if fence.peer == peer])

    def next_tick(self) -> float | None:
        """When `tick` is due next (monotonic clock), if ever."""
        return min((fence.due for _, fence in self._pending()), default=None)

    def tick(self, now: float) -> None:
        """End the links of initiators that did not answer in time."""
        for peer in {fence.peer for _, fence in self._pending() if now >= fence.due}:
            reason = "it has not said in time that it stopped writing"
            logger.warning("the link of %s is ended: %s", peer, reason)
            self.drop(peer)
            self._on_link_broken(peer, reason)

    def close(self) -> None:
        """Stop listening, close every connection and rail."""
        self._receiver.close()
        if self._one_sided is not None:
            self._one_sided.close()

    def _pending(self) -> list[tuple[int, _Fence]]:
        with self._lock:
            return list(self._fences.items())

    def _fenced(self, keys: Sequence[int]) -> None:
        for key in keys:
            with self._lock:
                fence = self._fences.pop(key, None)
            if fence is not None:
                fence.on_fenced()
