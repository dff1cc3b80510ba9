"""The tcp path at the target: the payload follows its frame, from the socket straight into granted memory.

For memory of GPUs see `staging`.
"""

import select
import socket

from mooncake_connector.kv_transfer.transport.grants import Grant
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, receive
from mooncake_connector.kv_transfer.transport.wire import LANDED, REFUSED, Frame

_SCRATCH_BYTES = 256 << 10


class Inbox:
    """One connection's payloads.

    Attributes:
        digest: checksum of what was landed last, if that is not to be taken from where it has landed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.digest: int | None = None
        self._sock = sock
        self._scratch: memoryview | None = None
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._closed = False

    def close(self) -> None:
        """Land nothing any more, even if it has arrived; from any thread."""
        self._closed = True

    def release(self) -> None:
        """Give back what it holds; for the thread that serves the connection, when that has ended."""

    def readable(self) -> bool:
        """Whether something has come, or the connection has ended."""
        return bool(self._readable.poll(0))

    def land(self, frame: Frame, grant: Grant) -> tuple[int, str]:
        """Receive a frame's bytes into place: a reply's status, and why they were thrown away.

        Raises:
            EOFError: The peer closed the connection.
            OSError: The connection broke.
        """
        place = frame.place
        while place.left:
            if self._closed:
                raise EOFError("the connection was closed here")
            if not grant.enter():
                self.drain(place.left)
                return REFUSED, f"key {frame.key} was revoked"
            got = 0
            try:
                got = receive(self._sock.fileno(), place, MSG_DONTWAIT)
                if not got:
                    raise EOFError("the peer closed the connection")
            except BlockingIOError:
                pass
            finally:
                grant.leave(got)
            if not got:
                self._readable.poll()
            place.advance(got)
        return LANDED, ""

    def drain(self, nbytes: int) -> None:
        """Throw `nbytes` away.

        Raises:
            EOFError: The peer closed the connection.
            OSError: The connection broke.
        """
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while nbytes:
            got = self._sock.recv_into(self._scratch[: min(nbytes, _SCRATCH_BYTES)])
            if not got:
                raise EOFError("the peer closed the connection")
            nbytes -= got
