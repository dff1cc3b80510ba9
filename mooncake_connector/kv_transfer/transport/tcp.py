"""The tcp path at the target: the payload follows its frame, from the socket straight into granted memory."""

import select
import socket

from mooncake_connector.kv_transfer.transport.grants import Grant
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, Scatter, receive
from mooncake_connector.kv_transfer.transport.wire import FrameHead

_SCRATCH_BYTES = 256 << 10


class Inbox:
    """One connection's payloads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._scratch: memoryview | None = None
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def land(self, frame: FrameHead, grant: Grant) -> str | None:
        """Receive a frame's bytes into place: None, or why they were thrown away.

        Raises:
            EOFError: The peer closed the connection.
            OSError: The connection broke.
        """
        place = Scatter(frame.dst, frame.length)
        while place.left:
            self._readable.poll()
            if not grant.enter():
                self.drain(place.left)
                return f"key {frame.key} was revoked"
            got = 0
            try:
                got = receive(self._sock.fileno(), place, MSG_DONTWAIT)
            except BlockingIOError:
                continue
            finally:
                grant.leave(got)
            if not got:
                raise EOFError("the peer closed the connection")
            place.advance(got)
        return None

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
