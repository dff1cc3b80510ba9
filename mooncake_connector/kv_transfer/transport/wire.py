"""What travels on a link's connections.

Once: `Hello` from the initiator, `Welcome` back, each msgpack behind a magic and a length. If the welcome has
a challenge the initiator stores that in its memory, says `Ready`, and a second `Welcome` tells whether the
target could read it there. Then frames from the initiator, each answered in order on the same connection:

    frame  magic 4s | kind u8 | flags u8 | 0 u16 | ranges u32 | bytes u32
           | key u64 | number u64 | checksum u64
           | dst u64 | length u64 | src u64        of the first range
           | dst u64 [ranges - 1] | length u64 [ranges - 1] | src u64 [ranges - 1]        of the others
           | payload of so many bytes, if the kind is PAYLOAD
    reply  number u64 | status u32 | size u32 | text (UTF-8) or answer of that size

`src` is meant for REFERENCE only, where the target reads the payload from the initiator's memory. In a
QUESTION `ranges` is the length of the topic and `bytes` that of the body, which both follow the 64 bytes of
the head. A write larger than a frame is several frames, one after another on one connection, of one number;
the last is marked LAST. AWAITED: somebody looks for the reply and may send the next such frame at once.
Integers are little endian.
"""

import socket
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import SourceIdentity
from mooncake_connector.kv_transfer.transport.syscalls import Cursor, Few, Scatter

VERSION = 2
MAX_FRAME_BYTES = 8 << 20
MAX_FRAME_RANGES = 4096
MAX_CONNECTIONS = 64
MAX_TOPIC_BYTES = 64
MAX_BODY_BYTES = 256 << 10
CHALLENGE_BYTES = 32
HANDSHAKE_S = 5.0
SILENCE_S = 10

PAYLOAD, REFERENCE, QUESTION = range(3)
"""Kinds of frames."""

LAST, CHECKED, AWAITED = 1, 2, 4
"""Flags of a frame: it ends its write; `checksum` is to be compared."""

LANDED, REFUSED, FAILED, UNREADABLE = range(4)
"""Statuses of a reply: all landed, or answered; not allowed; not done, try elsewhere; not by REFERENCE."""

FENCE, ECHO, PROBE = ".fence", ".echo", ".probe"
OWN_TOPICS = (FENCE, ECHO, PROBE)
"""Topics that the streams serve themselves."""

FENCED = struct.Struct("<II")
"""Body of FENCE: index of the connection, and the incarnation up to which nothing may land any more."""

_MAX_MESSAGE_BYTES = 4096
_MAX_REASON_BYTES = 1024
_MESSAGE = struct.Struct("<4sI")
_FRAME = struct.Struct("<4sBBHIIQQQQQQ")
REPLY = struct.Struct("<QII")
HEAD_BYTES = _FRAME.size
_HELLO_MAGIC, _FRAME_MAGIC = b"MKVh", b"MKVf"


_Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Hello(msgspec.Struct, frozen=True):
    """First message of each connection of a link.

    Attributes:
        link: random bytes that the link's connections have in common.
        index: which of `connections` this one is.
        incarnation: how often this one was made anew.
        source: whose memory the target may read, if process_vm is wanted.
        challenge_address: where in that memory the initiator will store the target's challenge.
        mailbox_address: where the initiator may leave a frame (`mailbox`); 0 if it never will.
    """

    version: int
    token: bytes
    link: bytes
    index: int
    connections: int
    incarnation: int = 0
    source: SourceIdentity | None = None
    challenge_address: _Address = 0
    mailbox_address: _Address = 0


class Welcome(msgspec.Struct, frozen=True):
    """Answer to `Hello` and `Ready`.

    Attributes:
        refusal: why the connection is not admitted; None if it is.
        unreadable: why the target can't read the initiator's memory; None if it can, or has not tried yet.
        challenge: what the initiator shall store; empty if there is no more to prove.
    """

    refusal: str | None = None
    unreadable: str | None = None
    challenge: bytes = b""


class Ready(msgspec.Struct, frozen=True):
    """The challenge is in place."""


class Frame(NamedTuple):
    """A frame before its payload.

    Attributes:
        ranges: how many; for a QUESTION the length of the topic.
        first: of the first range, dst, length and src.
        table: uint64 [3, ranges], dst, length and src of all; None if there is one only, or none.
    """

    kind: int
    flags: int
    ranges: int
    nbytes: int
    key: int
    number: int
    checksum: int
    first: tuple[int, int, int]
    table: U64Array | None

    @property
    def place(self) -> Cursor:
        """Where its bytes go."""
        return self._cursor(0)

    @property
    def origin(self) -> Cursor:
        """Where they are in the initiator's memory."""
        return self._cursor(2)

    def columns(self) -> U64Array:
        """uint64 [3, ranges]: dst, length and src of all."""
        if self.table is not None:
            return self.table
        return np.array([self.first], np.uint64).T[:, : self.ranges]

    def _cursor(self, column: int) -> Cursor:
        if self.table is not None:
            return Scatter(self.table[column], self.table[1])
        return Few(self.first[column], self.first[1]) if self.ranges else Few()


Message = TypeVar("Message", Hello, Welcome, Ready)

# Made once, at import: two threads that make msgspec look at a type for the first time can crash it.
_DECODERS: dict[type, Any] = {kind: msgspec.msgpack.Decoder(kind) for kind in (Hello, Welcome, Ready)}


def tune(sock: socket.socket) -> None:
    """Small frames leave at once, and a peer that says or takes nothing for `SILENCE_S` is given up."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)


def widen(sock: socket.socket, option: int, nbytes: int) -> None:
    """Set a socket's buffer (SO_SNDBUF, SO_RCVBUF), unless the system allows less than that.

    Linux cuts what is asked for down to net.core.[rw]mem_max, and from then on the buffer does not grow. By
    itself it grows to net.ipv4.tcp_[rw]mem, which on a machine as it comes is a multiple of that.
    """
    name = "wmem_max" if option == socket.SO_SNDBUF else "rmem_max"
    try:
        allowed = int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        allowed = 0
    if 0 < nbytes <= allowed:
        sock.setsockopt(socket.SOL_SOCKET, option, nbytes)


def hang_up(sock: socket.socket) -> None:
    """Wake every thread that waits on this socket; closing it is left to the thread that owns it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # never connected, or already shut down: nobody waits on it


def put(sock: socket.socket, message: Hello | Welcome | Ready) -> None:
    """Send a handshake message."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(_MESSAGE.pack(_HELLO_MAGIC, len(body)) + body)


def get(sock: socket.socket, kind: type[Message]) -> Message:
    """Receive a handshake message.

    Raises:
        TransportError: What came is no such message.
        EOFError: The peer closed the connection.
    """
    magic, size = _MESSAGE.unpack(exactly(sock, _MESSAGE.size))
    if magic != _HELLO_MAGIC or size > _MAX_MESSAGE_BYTES:
        raise TransportError(
            "the peer doesn't speak this protocol: check that the port is mooncake_connector's"
        )
    try:
        message: Message = _DECODERS[kind].decode(exactly(sock, size))
    except msgspec.MsgspecError as bad:
        raise TransportError(
            f"the peer's {kind.__name__} is malformed: {bad}; use one version on both"
        ) from bad
    return message


def greet(sock: socket.socket, hello: Hello, proof: NDArray[np.uint8]) -> Welcome:
    """The initiator's part of the handshake.

    Args:
        proof: uint8 [CHALLENGE_BYTES] at the address that `hello` names.

    Raises:
        TransportError: The target refused, or doesn't speak this protocol.
        EOFError: It hung up.
    """
    put(sock, hello)
    welcome = get(sock, Welcome)
    if len(welcome.challenge) == CHALLENGE_BYTES:
        proof[:] = np.frombuffer(welcome.challenge, np.uint8)
        put(sock, Ready())
        welcome = get(sock, Welcome)
    if welcome.refusal is not None:
        raise TransportError(welcome.refusal)
    return welcome


def frame_head(
    kind: int, key: int, number: int, plan: CopyPlan, flags: int = LAST, checksum: int = 0
) -> bytes:
    """The part of a PAYLOAD or REFERENCE frame before its payload."""
    ranges = plan.length.size
    first = (int(plan.dst[0]), int(plan.length[0]), int(plan.src[0])) if ranges else (0, 0, 0)
    nbytes = plan.nbytes if ranges > 1 else first[1]
    head = _FRAME.pack(_FRAME_MAGIC, kind, flags, 0, ranges, nbytes, key, number, checksum, *first)
    if ranges < 2:
        return head
    return b"".join((head, plan.dst[1:].tobytes(), plan.length[1:].tobytes(), plan.src[1:].tobytes()))


def question(number: int, topic: str, body: bytes) -> bytes:
    """A whole QUESTION frame.

    Raises:
        TransportError: Topic or body are too long.
    """
    name = topic.encode()
    if len(name) > MAX_TOPIC_BYTES or len(body) > MAX_BODY_BYTES:
        raise TransportError(
            f"a question on {topic[:MAX_TOPIC_BYTES]!r} of {len(body)} bytes: send at most {MAX_BODY_BYTES}"
        )
    head = _FRAME.pack(_FRAME_MAGIC, QUESTION, LAST, 0, len(name), len(body), 0, number, 0, 0, 0, 0)
    return b"".join((head, name, body))


def get_frame(sock: socket.socket) -> Frame:
    """Receive a frame up to its payload; nothing is allocated before its sizes were checked.

    Raises:
        TransportError: The frame is malformed: the stream can't be trusted any further.
        EOFError: The peer closed the connection.
    """
    frame = parse_head(exactly(sock, HEAD_BYTES))
    if frame.ranges < 2 or frame.kind == QUESTION:
        return frame
    n = frame.ranges
    table = np.empty((3, n), np.uint64)
    table[:, 0] = frame.first
    table[:, 1:] = np.frombuffer(exactly(sock, 24 * (n - 1)), np.uint64).reshape(3, n - 1)
    length = table[1]
    # Each length is bounded before the sum is taken, so that the sum can't wrap around.
    if not 0 < length.min() <= length.max() <= frame.nbytes or int(length.sum()) != frame.nbytes:
        raise TransportError(f"malformed frame: the {n} lengths don't add up to {frame.nbytes} bytes")
    return frame._replace(table=table)


def parse_head(data: bytes | bytearray) -> Frame:
    """The fixed part of a frame.

    Raises:
        TransportError: It is malformed.
    """
    magic, kind, flags, _, n, nbytes, key, number, checksum, *first = _FRAME.unpack(data)
    if magic != _FRAME_MAGIC:
        raise TransportError(f"malformed frame: magic {magic!r}")
    most = (MAX_TOPIC_BYTES, MAX_BODY_BYTES) if kind == QUESTION else (MAX_FRAME_RANGES, MAX_FRAME_BYTES)
    if kind > QUESTION or n > most[0] or nbytes > most[1]:
        raise TransportError(f"malformed frame: kind {kind}, {n} ranges, {nbytes} bytes")
    if kind != QUESTION and ((n == 1 and not 0 < nbytes == first[1]) or (not n and nbytes)):
        raise TransportError(f"malformed frame: the {n} lengths don't add up to {nbytes} bytes")
    return Frame(kind, flags, n, nbytes, key, number, checksum, tuple(first), None)


def put_reply(sock: socket.socket, number: int, status: int, said: bytes = b"") -> None:
    """Answer one frame; a reason may be cut short."""
    if status != LANDED:
        said = said[:_MAX_REASON_BYTES]
    sock.sendall(REPLY.pack(number, status, len(said)) + said)


def exactly(sock: socket.socket, nbytes: int) -> bytearray:
    """Receive so many bytes.

    Raises:
        EOFError: The peer closed the connection.
    """
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view, 0, socket.MSG_WAITALL)
        if not got:
            raise EOFError("the peer closed the connection")
        view = view[got:]
    return data
