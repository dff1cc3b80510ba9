"""A target's half of a transfer engine: who may write where, and the fences that end it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple, Protocol

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport.base import Endpoint, Landed, Mark
from mooncake_connector.kv_transfer.transport.receiver import Receiver

logger = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""How long a fence waits for the initiator's word before it ends the link, which costs all who use it."""


class OneSided(Protocol):
    """The target's end of a transport whose hardware writes without asking (rdma, cuda_ipc)."""

    @property
    def path(self) -> str:
        """Of the transport."""

    def admit(self, peer: str, token: bytes) -> None:
        """Let the link of that token have rails, and no earlier link of this peer."""

    def grant(self, key: int, peer: str) -> None:
        """Let writes of `peer` under `key` in, where the transport can tell them apart."""

    def revoke(self, key: int, peer: str) -> None:
        """Take a grant back whose writes have all ended."""

    def fence(self, key: int, peer: str, on_fenced: Callable[[], None]) -> bool:
        """Take a grant back; call back, from any thread, once no write can land under it.

        False, and no call, if the transport can only fence a whole link.
        """

    def fence_peer(self, peer: str, on_fenced: Callable[[], None]) -> None:
        """End all rails of this peer, for good; call back, from any thread, once no write of it can land."""

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Call back, from any thread, once so many of each rail's writes have been seen to land."""

    def close(self) -> None:
        """End everything."""


class _Fence(NamedTuple):
    peer: str
    due: float
    on_fenced: Callable[[], None]


class _Countdown:
    """Calls `then` when `one` was called so often."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._count, self._then, self._lock = count, then, threading.Lock()

    def one(self) -> None:
        with self._lock:
            self._count -= 1
            done = self._count == 0
        if done:
            self._then()


class Inbound:
    """Grants, and what became of them, over all transports of this process. Thread-safe.

    Args:
        receiver: of streams. Its `on_link_down` must call `link_down` here.
        one_sided: the transports beside streams that this process has.
        wake: called with the time when `next_tick` may have come nearer.
        on_link_broken: called with the peer and a reason when a fence had to end its link.

    Attributes:
        one_sided: as given; more may be added before anybody is admitted.
    """

    def __init__(
        self,
        receiver: Receiver,
        one_sided: Sequence[OneSided],
        *,
        wake: Callable[[float], None],
        on_link_broken: Callable[[str, str], None],
    ) -> None:
        self._receiver, self.one_sided = receiver, list(one_sided)
        self._wake, self._on_link_broken = wake, on_link_broken
        self._lock = threading.Lock()
        self._owner: dict[int, str] = {}
        self._fences: dict[int, _Fence] = {}
        self._writers: dict[str, tuple[OneSided, ...]] = {}
        self._ending: dict[str, int] = {}

    def admit(self, peer: str, *, paths: Sequence[str]) -> Endpoint:
        """A fresh endpoint for one link from `peer`; an earlier link of this peer ends.

        Args:
            paths: those that the link may have rails of.
        """
        self.link_down(peer)
        endpoint = self._receiver.admit(peer)
        writers = tuple(transport for transport in self.one_sided if transport.path in paths)
        for transport in writers:
            transport.admit(peer, endpoint.token)
        if writers:
            with self._lock:
                self._writers[peer] = writers
        return endpoint

    def may_write(self, peer: str) -> bool:
        """Whether this peer may have rails that write by themselves."""
        return peer in self._writers

    def grant(self, key: int, peer: str, ranges: Ranges) -> None:
        """Allow `peer` to write into `ranges` under `key` until revoked."""
        self._receiver.grant(key, peer, ranges)
        with self._lock:
            self._owner[key] = peer
            writers = self._writers.get(peer, ())
        for transport in writers:
            transport.grant(key, peer)

    def revoke(self, key: int) -> Landed:
        """Take a grant back whose writes have all ended, as the initiator said or a fence made sure."""
        with self._lock:
            peer = self._owner.pop(key, "")
            self._fences.pop(key, None)
            writers = self._writers.get(peer, ())
        for transport in writers:
            transport.revoke(key, peer)
        return self._receiver.revoke(key)

    def revoke_all(self, peer: str) -> None:
        """Take back every grant of a peer whose link has ended."""
        with self._lock:
            keys = [key for key, owner in self._owner.items() if owner == peer]
        for key in keys:
            self.revoke(key)

    def fence(self, key: int, on_fenced: Callable[[], None], patience: float = PATIENCE_S) -> None:
        """Make late writes under `key` impossible, then call back, unless `revoke` comes first.

        What streams carry is fenced at once, what passes a gate in milliseconds. A link with rails that know
        no grants (rdma) is ended after `patience` seconds, rails and all: until then the initiator may say
        that it has stopped, which spares it. A silent initiator could otherwise open new rails later and go
        on where it was stopped.
        """
        self._receiver.revoke(key)
        with self._lock:
            peer = self._owner.get(key, "")
            writers = self._writers.get(peer, ())
            if writers or peer in self._ending:
                self._fences[key] = _Fence(peer, inf, on_fenced)
                on_fenced = _nothing
        on_fenced()
        countdown = _Countdown(len(writers), lambda: self._fenced([key]))
        slow = [transport for transport in writers if not transport.fence(key, peer, countdown.one)]
        if not slow:
            return
        due = time.monotonic() + patience
        with self._lock:
            if (fence := self._fences.get(key)) is not None:
                self._fences[key] = fence._replace(due=due)
        self._wake(due)

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Call back once everything that these marks count is in place."""
        for transport in self.one_sided:
            if marks and transport.path == "rdma":
                transport.await_marks(peer, marks, on_seen)
                return
        on_seen()

    def drop(self, peer: str, then: Callable[[], None] | None = None) -> None:
        """End the peer's link; `then` is called once nothing of it can land any more. Its grants stay."""
        self._receiver.drop(peer)
        self.link_down(peer, then)

    def link_down(self, peer: str, then: Callable[[], None] | None = None) -> None:
        """A peer's last stream ended: its one-sided rails end as well; `then` as for `drop`."""
        with self._lock:
            writers = self._writers.pop(peer, ())
            if writers:
                self._ending[peer] = self._ending.get(peer, 0) + 1
        countdown = _Countdown(max(len(writers), 1), lambda: self._ended(peer, bool(writers), then))
        if not writers:
            countdown.one()
        for transport in writers:
            transport.fence_peer(peer, countdown.one)

    def next_tick(self) -> float | None:
        """When `tick` is due next (monotonic clock), if ever."""
        due = min((fence.due for _, fence in self._pending()), default=inf)
        return None if due == inf else due

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
        for transport in self.one_sided:
            transport.close()

    def _pending(self) -> list[tuple[int, _Fence]]:
        with self._lock:
            return list(self._fences.items())

    def _ended(self, peer: str, had_writers: bool, then: Callable[[], None] | None) -> None:
        """Nothing lands any more over a link that has ended."""
        with self._lock:
            if had_writers:
                self._ending[peer] -= 1
                if not self._ending[peer]:
                    del self._ending[peer]
            keys = [key for key, fence in self._fences.items() if fence.peer == peer]
            ended = peer not in self._ending
        if ended:
            self._fenced(keys)
        if then is not None:
            then()

    def _fenced(self, keys: Sequence[int]) -> None:
        for key in keys:
            with self._lock:
                fence = self._fences.pop(key, None)
            if fence is not None:
                fence.on_fenced()


def _nothing() -> None: ...
