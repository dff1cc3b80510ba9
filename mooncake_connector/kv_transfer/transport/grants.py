"""Permissions to write, and the fence that takes them back."""

import threading
from bisect import bisect_right
from collections import OrderedDict

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport.base import Landed
from mooncake_connector.kv_transfer.transport.wire import Frame


class Grant:
    """One key's permission.

    A receiver thread brackets every system call that writes under the key by `enter` and `leave`. The call
    never waits for the initiator, so `revoke`, which waits for those inside, takes milliseconds.
    """

    def __init__(self, peer: str, ranges: Ranges) -> None:
        self.peer = peer
        self._ranges = ranges
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._revoked = False
        self._nbytes = 0
        self._writes = 0

    def covers(self, frame: Frame) -> bool:
        """Whether all that a frame writes lies inside the granted ranges."""
        if frame.table is not None:
            return self._ranges.cover(frame.table[0], frame.table[1])
        first, length, _ = frame.first
        at = bisect_right(self._ranges.start, first) - 1
        return not frame.ranges or (at >= 0 and first + length <= int(self._ranges.end[at]))

    def enter(self) -> bool:
        """Whether a write may start now; if so, `leave` must follow."""
        with self._lock:
            if self._revoked:
                return False
            self._inside += 1
            return True

    def leave(self, nbytes: int) -> None:
        """The write has ended and landed `nbytes`."""
        with self._lock:
            self._inside -= 1
            self._nbytes += nbytes
            if self._revoked and not self._inside:
                self._changed.notify_all()

    def write_landed(self) -> None:
        """Count a write that landed as a whole."""
        with self._lock:
            self._writes += 1

    def revoke(self) -> Landed:
        """Wait for the writes under way; none starts any more."""
        with self._changed:
            self._revoked = True
            self._changed.wait_for(lambda: not self._inside)
            return Landed(self._nbytes, self._writes)


MAX_REVOKED = 16384
"""Revoked keys that a table remembers."""


class GrantTable:
    """The grants of one process by key. Thread-safe."""

    def __init__(self) -> None:
        self._grants: dict[int, Grant] = {}
        self._revoked: OrderedDict[int, str] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: int, grant: Grant) -> None:
        """Put a grant into force.

        Raises:
            TransportError: The key is in use or out of range.
        """
        if not 0 <= key < 1 << 64:
            raise TransportError(f"key {key} is out of range: take one of 64 bits")
        with self._lock:
            if key in self._grants:
                raise TransportError(f"key {key} is granted already: revoke it first, or take another")
            self._grants[key] = grant
            self._revoked.pop(key, None)

    def find(self, key: int, peer: str) -> tuple[Grant | None, bool]:
        """The grant if this peer has it, else whether it had, and may not yet have heard that it is over."""
        with self._lock:
            grant = self._grants.get(key)
            if grant is not None and grant.peer == peer:
                return grant, True
            return None, self._revoked.get(key) == peer

    def revoke(self, key: int) -> Landed:
        """Take a grant back and wait until no byte can land under it."""
        with self._lock:
            grant = self._grants.get(key)
        if grant is None:
            return Landed(0, 0)
        landed = grant.revoke()
        with self._lock:
            if self._grants.get(key) is grant:
                del self._grants[key]
                self._revoked[key] = grant.peer
                if len(self._revoked) > MAX_REVOKED:
                    self._revoked.popitem(last=False)
        return landed
