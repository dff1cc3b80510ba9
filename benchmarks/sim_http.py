"""As much of an HTTP/1.1 server as simulated engines need, at a few microseconds a message."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

END = b"data: [DONE]\n\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)

Serve = Callable[["Http", bytes, str, bytes], None]


class Http(asyncio.Protocol):
    """One connection: requests with a content-length, one after the other, answers whole or chunked.

    Args:
        serve: called with each request: this connection, method, path, body.

    Attributes:
        closed: the client went away.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._parts: list[bytes] = []
        self._size = 0
        self._needed = 0
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.write = transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size < self._needed:
            return
        whole = b"".join(self._parts) if len(self._parts) > 1 else data
        while whole:
            head = whole.find(b"\r\n\r\n")
            if head < 0:
                break
            line = whole[: whole.index(b"\r\n")]
            if not line.endswith(b" HTTP/1.1"):  # sglang-router tries HTTP/2 first
                self.send(json_answer({}, 400))
                self._transport.close()
                return
            end = head + 4 + _length(whole[:head])
            if len(whole) < end:
                self._needed = end
                break
            method, path, _ = line.split(b" ", 2)
            self._needed = 0
            self._serve(self, method, path.decode(), whole[head + 4 : end])
            whole = whole[end:]
        self._parts, self._size = [whole] if whole else [], len(whole)

    def send(self, answer: bytes) -> None:
        """A whole answer, head and body."""
        if not self.closed:
            self.write(answer)

    def begin_stream(self) -> None:
        self.send(STREAM_HEAD)

    def end_stream(self, last: bytes) -> None:
        """The last event, and the end."""
        self.send(last + chunk(END) + b"0\r\n\r\n")


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


def chunk(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(event: bytes) -> bytes:
    """A chunk with one server-sent event."""
    return chunk(b"data: %b\n\n" % event)


def json_answer(found: Any, status: int = 200) -> bytes:
    """A whole answer."""
    body = msgspec.json.encode(found)
    head = (
        b"HTTP/1.1 %d %b\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % (status, b"OK" if status == 200 else b"Error", len(body)) + body
