"""What travels on a link's connections.

Once: `Hello` from the initiator, `Welcome` back, each msgpack behind a magic and a length.
Then frames from the initiator, each acknowledged in order on the same connection:

    frame  magic 4s | ranges u32 | key u64 | write u64 | parts u32 | bytes u32
           dst u64 [ranges] | length u64 [ranges] | tcp: the bytes; process_vm: src u64 [ranges]
    ack    write u64 | length of reason u32 | reason (UTF-8, empty if every byte landed)

A write of `parts` frames may be spread over the connections. Integers are little endian.
"""

import socket
import struct
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import SourceIdentity

VERSION = 1
MAX_FRAME_BYTES = 8 << 20
MAX_FRAME_RANGES = 4096
MAX_CONNECTIONS = 64
HANDSHAKE_S = 5.0

_MAX_MESSAGE_BYTES = 4096
_MAX_REASON_BYTES = 1024
_MESSAGE = struct.Struct("<4sI")
_FRAME = struct.Struct("<4sIQQII")
_ACK = struct.Struct("<QI")
_HELLO_MAGIC, _FRAME_MAGIC = b"MKVh", b"MKVf"


class Hello(msgspec.Struct, frozen=True):
    """First message of each connection of a link.

    Attributes:
        link: random bytes that the link's connections have in common.
        index: which of `connections` this one is.
        source: for process_vm, whose memory the target shall read.
    """

    version: int
    token: bytes
    path: str
    link: bytes
    index: int
    connections: int
    source: SourceIdentity | None = None


class Welcome(msgspec.Struct, frozen=True):
    """Answer to `Hello`: no reason if the connection is admitted."""

    reason: str | None = None


class FrameHead(NamedTuple):
    """A frame without its payload; `src` is there for process_vm only."""

    key: int
    write: int
    parts: int
    nbytes: int
    dst: U64Array
    length: U64Array
    src: U64Array | None


Message = TypeVar("Message", Hello, Welcome)


def tune(sock: socket.socket) -> None:
    """Small frames leave at once, and a host that vanished is noticed within about 10 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def hang_up(sock: socket.socket) -> None:
    """Wake every thread that waits on this socket; closing it is left to the thread that owns it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # never connected, or already shut down: nobody waits on it


def put(sock: socket.socket, message: Hello | Welcome) -> None:
    """Send a handshake message."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(_MESSAGE.pack(_HELLO_MAGIC, len(body)) + body)


def get(sock: socket.socket, kind: type[Message]) -> Message:
    """Receive a handshake message.

    Raises:
        TransportError: What came is no such message.
        EOFError: The peer closed the connection.
    """
    magic, size = _MESSAGE.unpack(_exactly(sock, _MESSAGE.size))
    if magic != _HELLO_MAGIC or size > _MAX_MESSAGE_BYTES:
        raise TransportError(
            "the peer doesn't speak this protocol: check that the port is mooncake_connector's"
        )
    try:
        return msgspec.msgpack.decode(_exactly(sock, size), type=kind)
    except msgspec.MsgspecError as bad:
        raise TransportError(
            f"the peer's {kind.__name__} is malformed: {bad}; use one version on both"
        ) from bad


def frame_head(key: int, write: int, parts: int, plan: CopyPlan, with_src: bool) -> bytes:
    """The part of a frame before its payload."""
    head = _FRAME.pack(_FRAME_MAGIC, plan.length.size, key, write, parts, plan.nbytes)
    return b"".join(
        (head, plan.dst.tobytes(), plan.length.tobytes(), plan.src.tobytes() if with_src else b"")
    )


def get_frame(sock: socket.socket, with_src: bool) -> FrameHead:
    """Receive a frame up to its payload; nothing is allocated before its sizes were checked.

    Raises:
        TransportError: The frame is malformed: the stream can't be trusted any further.
        EOFError: The peer closed the connection.
    """
    magic, n, key, write, parts, nbytes = _FRAME.unpack(_exactly(sock, _FRAME.size))
    if magic != _FRAME_MAGIC or n > MAX_FRAME_RANGES or nbytes > MAX_FRAME_BYTES or not parts:
        raise TransportError(f"malformed frame: magic {magic!r}, {n} ranges, {nbytes} bytes, {parts} parts")
    columns = 3 if with_src else 2
    table = np.frombuffer(_exactly(sock, 8 * n * columns), np.uint64).reshape(columns, n)
    dst, length = table[0], table[1]
    # Each length is bounded before the sum is taken, so that the sum can't wrap around.
    if (n and not 0 < length.min() <= length.max() <= nbytes) or int(length.sum()) != nbytes:
        raise TransportError(f"malformed frame: the {n} lengths don't add up to {nbytes} bytes")
    return FrameHead(key, write, parts, nbytes, dst, length, table[2] if with_src else None)


def put_ack(sock: socket.socket, write: int, reason: str | None) -> None:
    """Acknowledge one frame."""
    text = (reason or "").encode()[:_MAX_REASON_BYTES]
    sock.sendall(_ACK.pack(write, len(text)) + text)


def get_ack(sock: socket.socket) -> tuple[int, str | None]:
    """Receive an acknowledgement: (write, reason).

    Raises:
        TransportError: It is malformed.
        EOFError: The peer closed the connection.
    """
    write, size = _ACK.unpack(_exactly(sock, _ACK.size))
    if size > _MAX_REASON_BYTES:
        raise TransportError(f"malformed acknowledgement: a reason of {size} bytes")
    return write, _exactly(sock, size).decode(errors="replace") if size else None


def _exactly(sock: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view, 0, socket.MSG_WAITALL)
        if not got:
            raise EOFError("the peer closed the connection")
        view = view[got:]
    return data
