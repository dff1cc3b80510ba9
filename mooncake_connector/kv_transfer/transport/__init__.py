"""Transports: how bytes get from an initiator's memory into a target's. `base` has the contract."""

import threading
from collections.abc import Callable
from functools import partial

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import (
    Endpoint,
    Failure,
    Landed,
    Mark,
    Rail,
    SourceIdentity,
    Target,
)
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.process_vm import allow_reader, identity, readable
from mooncake_connector.kv_transfer.transport.receiver import Receiver
from mooncake_connector.kv_transfer.transport.stream import PATHS

__all__ = [
    "PATHS",
    "Endpoint",
    "Failure",
    "Landed",
    "Link",
    "Mark",
    "OneLink",
    "Rail",
    "Receiver",
    "SourceIdentity",
    "StreamLink",
    "Target",
    "allow_reader",
    "identity",
    "open_link",
    "readable",
]

_PIECE_BYTES = 8 << 20
_STRIPE_BYTES = 1 << 20

OnDone = Callable[[str | None], None]


class OneLink:
    """A `StreamLink` without a dispatcher: stripes writes over all connections, and ends with the first.

    Only until `WorkerAgent` goes by `TransferEngine`.
    """

    def __init__(
        self, path: str, endpoint: Endpoint, name: str, connections: int, on_down: Callable[[str], None]
    ):
        self.path = path
        self._connections, self._on_down = connections, on_down
        self._lock = threading.Lock()
        self._rails: list[Rail] = []
        self._load: list[int] = []
        self._waiting: list[tuple[int, CopyPlan, OnDone]] = []
        self._down: str | None = None
        self._link: StreamLink | None = None  # events may come before it is there
        self._link = StreamLink(endpoint, name=name, connections=connections, paths=(path,), events=self)

    def write(self, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """Move `plan`'s bytes; `on_done(None)` once they have landed, or with a reason."""
        with self._lock:
            down = self._down
            if down is None and len(self._rails) < self._connections:
                self._waiting.append((key, plan, on_done))
                return
        if down is not None:
            on_done(down)
            return
        share = -(-plan.nbytes // self._connections)
        pieces = list(plan.split(min(_PIECE_BYTES, max(_STRIPE_BYTES, share)), 4096))
        left, failed = len(pieces), None

        def ended(rail: int, nbytes: int, failure: Failure | None) -> None:
            nonlocal left, failed
            with self._lock:
                self._load[rail] -= nbytes
                left -= 1
                failed = failed or failure
                over = not left
            if over:
                on_done(failed.reason if failed is not None else None)

        for piece in pieces:
            nbytes = piece.nbytes
            with self._lock:
                rail = min(range(self._connections), key=self._load.__getitem__)
                self._load[rail] += nbytes
            self._rails[rail].write(key, piece, partial(ended, rail, nbytes))

    def close(self) -> None:
        """Close all connections; writes not yet landed end with a reason."""
        self._fall("the link was closed here")

    def rail_up(self, rail: Rail) -> None:
        with self._lock:
            self._rails.append(rail)
            self._load.append(0)
            if len(self._rails) < self._connections:
                return
            waiting, self._waiting = self._waiting, []
        for write in waiting:
            self.write(*write)

    def rail_down(self, name: str, reason: str) -> None:
        if self._fall(reason):
            self._on_down(reason)

    def rail_fenced(self, name: str) -> None:
        pass

    def link_down(self, reason: str) -> None:
        self.rail_down("", reason)

    def _fall(self, reason: str) -> bool:
        with self._lock:
            if self._down is not None:
                return False
            self._down = reason
            waiting, self._waiting = self._waiting, []
        if self._link is not None:
            self._link.close()
        for _, _, on_done in waiting:
            on_done(reason)
        return True


def open_link(
    path: str, endpoint: Endpoint, *, name: str, connections: int = 2, on_down: Callable[[str], None]
) -> OneLink:
    """Open a link to a target: returns at once, connects in the background, takes writes right away.

    Args:
        path: one of `PATHS`.
        endpoint: from the target's `admit`; good for one link.
        name: names the link in threads and logs.
        connections: TCP connections to share the writes, each served by a thread at the target.
        on_down: called once with the reason, from a transport thread, when the link could not be made, the
            target refused it, died or hung up. Not called for the link's own `close`.

    Raises:
        TransportError: The path is unknown, or `connections` out of range.
    """
    if path not in PATHS:
        raise TransportError(f"path {path!r} is unknown: take one of {', '.join(PATHS)}")
    return OneLink(path, endpoint, name, connections, on_down)


Link = OneLink
