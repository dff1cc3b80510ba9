"""The target's end of all cuda_ipc rails: shares its memory, keeps the gates, knows who is still inside."""

import hmac
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import Mark, Serve
from mooncake_connector.kv_transfer.transport.cuda import cards
from mooncake_connector.kv_transfer.transport.cuda.gate import Gate, Inside
from mooncake_connector.kv_transfer.transport.cuda.share import Exports
from mooncake_connector.kv_transfer.transport.process_vm import identity

SOONEST_S, LATEST_S = 50e-6, 5e-3
"""Pauses between two looks at who is inside: a kernel takes microseconds to milliseconds."""

STUCK_S = 5.0
"""After this long inside, an initiator is stopped in the one place where the gate can't help: say so."""

log = logging.getLogger(__name__)


class _Peer:
    """One initiator: its gate, and its process, once that has opened a rail."""

    def __init__(self, token: bytes) -> None:
        self.token = token
        self.gate = Gate()
        self.pidfd: int | None = None
        self.pid = 0

    def dead(self) -> bool:
        """Whether no process can write through this gate: none has come, or it has ended."""
        return self.pidfd is None or bool(select.select([self.pidfd], [], [], 0)[0])

    def close(self) -> None:
        self.gate.close()
        if self.pidfd is not None:
            os.close(self.pidfd)


class _Leaving(NamedTuple):
    """Somebody waits for those inside to leave."""

    peer: _Peer
    inside: Inside
    since: float
    then: Callable[[], None]


class CudaTarget:
    """What an `Inbound` wants of one-sided transports. Thread-safe.

    Args:
        exports: this process's GPU memory.
        serve: registers a handler of questions that peers ask over their streams.
    """

    path = "cuda_ipc"

    def __init__(self, exports: Exports, serve: Serve) -> None:
        self._exports = exports
        self._lock = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[_Leaving] = []
        self._watching = False
        self._closed = False
        serve(cards.OPEN, self._open)

    def admit(self, peer: str, token: bytes) -> None:
        """Serve this peer's link that has `token`; an earlier one must have been fenced."""
        with self._lock:
            self._peers[peer] = _Peer(token)

    def grant(self, key: int, peer: str) -> None:
        """Let writes under `key` in, if the peer's link is admitted here."""
        with self._lock:
            if (known := self._peers.get(peer)) is not None:
                known.gate.open(key)

    def revoke(self, key: int, peer: str) -> None:
        """Take a grant back whose writes have all ended."""
        with self._lock:
            if (known := self._peers.get(peer)) is not None:
                known.gate.shut(key)

    def fence(self, key: int, peer: str, on_fenced: Callable[[], None]) -> bool:
        """Take a grant back; call back once nothing lands under it any more. True: it will."""
        with self._lock:
            if (known := self._peers.get(peer)) is None:
                return False
            known.gate.shut(key)
            self._await(known, on_fenced)
        return True

    def fence_peer(self, peer: str, on_fenced: Callable[[], None]) -> None:
        """Shut the peer's gate for good; call back once nothing of it lands any more."""
        with self._lock:
            known = self._peers.pop(peer, None)
            if known is not None:
                known.gate.shut_all()
                self._await(known, lambda: self._gone(known, on_fenced))
        if known is None:
            on_fenced()

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Calls back at once: there are no marks of this transport."""
        on_seen()

    def close(self) -> None:
        """Shut all gates and wait for those inside, for a moment."""
        with self._lock:
            peers = list(self._peers)
        left = threading.Semaphore(0)
        for peer in peers:
            self.fence_peer(peer, left.release)
        for _ in peers:
            left.acquire(timeout=1.0)

    # ------------------------------------------------------------------ inside

    def _open(self, peer: str, body: bytes) -> bytes:
        asked = cards.decode_open(body)
        if asked.host_id != identity().host_id:
            raise TransportError("cuda_ipc: the peer runs on another host or in another pid namespace")
        allocations = self._exports.allocations()
        if not allocations:
            raise TransportError("cuda_ipc: the target has no GPU memory")
        with self._lock:
            known = self._peers.get(peer)
            if known is None or not hmac.compare_digest(known.token, asked.token):
                raise TransportError("cuda_ipc: this link is not admitted any more: connect anew")
            if known.pidfd is None:
                try:
                    known.pidfd, known.pid = os.pidfd_open(asked.pid), asked.pid
                except (OSError, OverflowError) as gone:
                    raise TransportError(f"cuda_ipc: process {asked.pid}: {gone}") from gone
            elif known.pid != asked.pid:
                raise TransportError("cuda_ipc: another process has opened this link's rail")
            return cards.encode(cards.Opened(os.getpid(), known.gate.fd, allocations))

    def _gone(self, peer: _Peer, on_fenced: Callable[[], None]) -> None:
        peer.close()
        on_fenced()

    def _await(self, peer: _Peer, then: Callable[[], None]) -> None:
        self._leaving.append(_Leaving(peer, peer.gate.inside(), time.monotonic(), then))
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="mooncake-cuda-fences", daemon=True).start()
        self._lock.notify()

    def _watch(self) -> None:
        pause = SOONEST_S
        while True:
            with self._lock:
                while not self._leaving:
                    pause = SOONEST_S
                    self._lock.wait()
                left = [one for one in self._leaving if one.inside.left() or one.peer.dead()]
                self._leaving = [one for one in self._leaving if one not in left]
                self._warn()
            for one in left:
                try:
                    one.then()
                except Exception:
                    log.exception("a listener failed; fences go on")
            pause = SOONEST_S if left else min(2 * pause, LATEST_S)
            time.sleep(pause)

    def _warn(self) -> None:
        for i, one in enumerate(self._leaving):
            if time.monotonic() - one.since > STUCK_S:
                log.warning(
                    "process %d has been writing into KV blocks that were taken back for %.0f s: they stay "
                    "reserved until it goes on or ends",
                    one.peer.pid,
                    STUCK_S,
                )
                self._leaving[i] = one._replace(since=time.monotonic())
