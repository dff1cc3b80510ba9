"""One connection of a link, seen from the initiator: what is to be sent, and what waits for its answer."""

import contextlib
import itertools
import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, Failure
from mooncake_connector.kv_transfer.transport.checksum import xxh3
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, Scatter, send

PATHS = ("process_vm", "tcp")
"""The paths that a stream can carry, the preferred first."""

INLINE_BYTES = 32 << 10
"""Frames up to this size are sent by the thread that writes, if that takes no waiting."""

MAX_QUEUED = 4096
"""Frames that may wait in one stream."""

SEND_BUFFER_BYTES = 4 << 20

_RECEIVE_BYTES = 64 << 10
_CHALLENGE_BYTES = 64

log = logging.getLogger(__name__)

OnDone = Callable[[Failure | None], None]
OnAnswer = Callable[[bytes | Failure], None]


class StreamOwner(Protocol):
    """Whom a stream reports to, from transport threads."""

    def stream_up(self, stream: "Stream") -> None:
        """It is connected."""

    def stream_down(self, stream: "Stream", reason: str) -> None:
        """It broke, or could not be made; called once, before its writes end. It carries nothing any more."""

    def unreadable(self, stream: "Stream", reason: str) -> None:
        """Its process_vm rail went down, alone; called before that rail's writes end."""


class StreamRail:
    """A `Rail` over one stream: the target reads the bytes from it, or from the initiator's memory."""

    speed = 0.0
    penalty = 1.0

    def __init__(self, stream: "Stream", path: str) -> None:
        self.name = f"{path}-{stream.index}"
        self.path = path
        self.down: str | None = "not connected yet"
        self._stream = stream

    def write(self, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """See `Rail.write`."""
        self._stream.write(self, key, plan, on_done)


class _Write:
    """One call of `StreamRail.write`."""

    __slots__ = ("failure", "frames", "on_done", "rail")

    def __init__(self, rail: StreamRail, on_done: OnDone, frames: int) -> None:
        self.rail, self.on_done, self.frames = rail, on_done, frames
        self.failure: Failure | None = None

    def end(self, failure: Failure | None) -> None:
        """All is over, unless it was before."""
        if self.frames:
            self.frames = 0
            call(self.on_done, failure)


class _Frame:
    """A frame of a write. It is put together when its turn comes, by the thread that sends it."""

    __slots__ = ("_checked", "_flags", "_head", "_key", "_plan", "data", "nbytes", "number", "write")

    def __init__(
        self, write: _Write, key: int, number: int, plan: CopyPlan, flags: int, checked: bool
    ) -> None:
        self.write, self.number, self.nbytes = write, number, plan.nbytes
        self._key, self._plan, self._flags, self._checked = key, plan, flags, checked
        self.data: Scatter | None = None

    def begin(self) -> Scatter:
        """Its head and, on the tcp path, the source's memory behind it."""
        if self.data is None:
            plan, flags, checksum = self._plan, self._flags, 0
            if self._checked:
                flags, checksum = flags | wire.CHECKED, xxh3(plan.src, plan.length)
            by_reference = self.write.rail.path == "process_vm"
            kind = wire.REFERENCE if by_reference else wire.PAYLOAD
            self._head = np.frombuffer(
                wire.frame_head(kind, self._key, self.number, plan, flags, checksum), np.uint8
            )
            self.data = _behind(self._head, None if by_reference else plan)
        return self.data

    def answered(self, status: int, said: bytes) -> None:
        write = self.write
        if status != wire.LANDED:
            write.failure = Failure(said.decode(errors="replace"), status != wire.REFUSED)
        if write.frames == 1:
            write.end(write.failure)
        elif write.frames:
            write.frames -= 1

    def lost(self, reason: str) -> None:
        self.write.end(Failure(reason, True))


class _Question:
    """A question: sent like a frame, answered in its turn."""

    __slots__ = ("_head", "_on_answer", "data", "nbytes", "number")

    def __init__(self, number: int, topic: str, body: bytes, on_answer: OnAnswer) -> None:
        self.number, self.nbytes = number, len(body)
        self._head = np.frombuffer(wire.question(number, topic, body), np.uint8)
        self.data = _behind(self._head, None)
        self._on_answer: OnAnswer | None = on_answer

    def begin(self) -> Scatter:
        return self.data

    def answered(self, status: int, said: bytes) -> None:
        failed = status != wire.LANDED
        self._end(Failure(said.decode(errors="replace"), status != wire.REFUSED) if failed else said)

    def lost(self, reason: str) -> None:
        self._end(Failure(reason, True))

    def _end(self, answer: bytes | Failure) -> None:
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is not None:
            call(on_answer, answer)


class Stream:
    """One connection, from its making to its end.

    One thread at a time sends, the one that set `_busy`: the stream's own or, for a small frame on an idle
    stream, the one that offers it, which saves waking another.
    """

    def __init__(
        self,
        owner: StreamOwner,
        hello: wire.Hello,
        endpoint: Endpoint,
        paths: tuple[str, ...],
        checksum: bool,
        name: str,
    ) -> None:
        self.index, self.incarnation = hello.index, hello.incarnation
        self.rails = {path: StreamRail(self, path) for path in paths}
        self.sock: socket.socket | None = None
        self._owner, self._endpoint, self._checksum = owner, endpoint, checksum
        # The target believes that this process is at the other end once it has read its challenge from here.
        self._proof = np.zeros(_CHALLENGE_BYTES, np.uint8)
        self._hello = msgspec.structs.replace(hello, challenge_address=self._proof.ctypes.data)
        self._todo: deque[_Frame | _Question] = deque()
        self._sent: deque[_Frame | _Question] = deque()
        self._changed = threading.Condition()
        self._busy = True
        self._down: str | None = None
        self._numbers = itertools.count(1)
        self._said = bytearray()
        self._reading = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"mooncake-send-{name}", daemon=True)

    def start(self) -> None:
        """Connect in the background."""
        self._thread.start()

    def write(self, rail: StreamRail, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """Enqueue a write, see `Rail.write`."""
        pieces = list(plan.split(wire.MAX_FRAME_BYTES, wire.MAX_FRAME_RANGES))
        write, number = _Write(rail, on_done, len(pieces)), next(self._numbers)
        last = len(pieces) - 1
        frames = [
            _Frame(write, key, number, piece, wire.LAST * (at == last), self._checksum)
            for at, piece in enumerate(pieces)
        ]
        with self._changed:
            reason = rail.down or self._full(len(frames))
            now = reason is None and self._offer(frames)
        if reason is not None:
            write.end(Failure(reason, True))
        elif now:
            self._send_now()

    def ask(self, topic: str, body: bytes, on_answer: OnAnswer) -> None:
        """Enqueue a question; `on_answer` is called once.

        Raises:
            TransportError: Topic or body are too long.
        """
        asked = _Question(next(self._numbers), topic, body, on_answer)
        with self._changed:
            reason = self._down or (None if topic in wire.OWN_TOPICS else self._full(1))
            now = reason is None and self._offer([asked])
        if reason is not None:
            asked.lost(reason)
        elif now:
            self._send_now()

    def breaks(self, reason: str) -> None:
        """End it, once: everything not yet answered is lost."""
        with self._changed:
            if self._down is not None:
                return
            self._down = reason
            for rail in self.rails.values():
                rail.down = reason
            lost = [*self._sent, *self._todo]
            self._sent.clear()
            self._todo.clear()
            self._changed.notify()
            sock = self.sock
        if sock is not None:
            wire.hang_up(sock)
        self._owner.stream_down(self, reason)
        for entry in lost:
            entry.lost(reason)

    def watch(self, epoll: select.epoll) -> int:
        """Have an epoll report when `read` is due: the number it reports, -1 if the stream ended before."""
        with self._reading:
            assert self.sock is not None
            fd = self.sock.fileno()
            if fd >= 0:
                epoll.register(fd, select.EPOLLIN)
            return fd

    def revive(self, rail: StreamRail) -> None:
        """A rail that went down alone is good again."""
        with self._changed:
            rail.down = self._down

    def read(self) -> None:
        """Take in what the target has replied; for whoever found the socket readable. Does not block."""
        with self._reading:
            if self.sock is None or self.sock.fileno() < 0:
                return
            try:
                data = self.sock.recv(_RECEIVE_BYTES, MSG_DONTWAIT)
                if not data:
                    raise EOFError("the peer closed the connection")
                self._take(data)
            except BlockingIOError:
                return
            except (OSError, EOFError, TransportError) as broken:
                reason = str(broken)
            else:
                return
        self.breaks(reason)

    def _take(self, data: bytes) -> None:
        """Hand out all replies that are whole.

        Raises:
            TransportError: They answer nothing that was sent, or are malformed.
        """
        said = self._said
        said += data
        at, head = 0, wire.REPLY
        while len(said) - at >= head.size:
            number, status, size = head.unpack_from(said, at)
            if size > wire.MAX_BODY_BYTES or status > wire.UNREADABLE:
                raise TransportError(f"malformed reply: status {status}, {size} bytes")
            end = at + head.size + size
            if len(said) < end:
                break
            self._answered(number, status, bytes(said[at + head.size : end]))
            at = end
        del said[:at]

    def _answered(self, number: int, status: int, said: bytes) -> None:
        with self._changed:
            if self._down is not None:
                return
            if not self._sent or self._sent[0].number != number:
                raise TransportError(f"a reply to frame {number}, which is not the next one")
            entry = self._sent.popleft()
        if status == wire.UNREADABLE and isinstance(entry, _Frame):
            self._lame(entry.write.rail, said.decode(errors="replace"))
        entry.answered(status, said)

    def _lame(self, rail: StreamRail, reason: str) -> None:
        """Take one rail down; the stream goes on."""
        with self._changed:
            if rail.down is not None:
                return
            rail.down = reason
            begun = self._sent[-1] if self._sent else None
            lost = [e for e in (*self._sent, *self._todo) if isinstance(e, _Frame) and e.write.rail is rail]
            self._todo = deque(e for e in self._todo if e is begun or e not in lost)
        self._owner.unreadable(self, reason)
        for entry in lost:
            entry.lost(reason)

    def _full(self, frames: int) -> str | None:
        waiting = len(self._todo) + len(self._sent)
        return (
            f"{waiting} frames wait already: send less at a time" if waiting + frames > MAX_QUEUED else None
        )

    def _offer(self, frames: Sequence[_Frame | _Question]) -> bool:
        """Put frames into the queue: whether the caller is to send the first, by `_send_now`."""
        self._todo.extend(frames)
        if self._busy or len(self._todo) > 1 or frames[0].nbytes > INLINE_BYTES:
            self._changed.notify()
            return False
        self._busy = True
        return True

    def _send_now(self) -> None:
        """Send the first frame of the queue as far as that takes no waiting, the rest is for the thread."""
        entry = self._next()
        data = None
        if entry is not None:
            data = entry.begin()
            with contextlib.suppress(OSError):  # the thread will meet it again, and knows what to do
                self._push(data, MSG_DONTWAIT)
        with self._changed:
            self._busy = False
            if entry is not None and data is not None and data.left:
                self._todo.appendleft(entry)
            if self._todo or self._down is not None:
                self._changed.notify()

    def _next(self) -> _Frame | _Question | None:
        """The next frame, counted as sent from here on."""
        with self._changed:
            if self._down is not None or not self._todo:
                return None
            entry = self._todo.popleft()
            if not self._sent or self._sent[-1] is not entry:  # the head of it may be sent already
                self._sent.append(entry)
            return entry

    def _push(self, data: Scatter, flags: int) -> None:
        assert self.sock is not None
        data.advance(send(self.sock.fileno(), data, flags))

    def _run(self) -> None:
        """The stream's thread: connects, then sends until the end."""
        reason = "a sender thread failed"
        try:
            self._connect()
            self._owner.stream_up(self)
            while True:
                with self._changed:
                    self._busy = False
                    self._changed.wait_for(lambda: not self._busy and (self._todo or self._down is not None))
                    self._busy = True
                if (entry := self._next()) is None:
                    return
                data = entry.begin()
                while data.left:
                    self._push(data, 0)
        except (OSError, EOFError, TransportError) as broken:
            reason = str(broken)
        finally:
            self.breaks(reason)
            with self._reading:
                if self.sock is not None:
                    self.sock.close()

    def _connect(self) -> None:
        where = self._endpoint
        try:
            sock = socket.create_connection((where.host, where.port), wire.HANDSHAKE_S)
        except OSError as refused:
            raise TransportError(f"can't connect to {where.host}:{where.port}: {refused}") from refused
        with self._changed:
            self.sock = sock
            if self._down is not None:
                raise TransportError(self._down)
        wire.tune(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        welcome = self._greet(sock)
        sock.settimeout(None)
        with self._changed:
            for path, rail in self.rails.items():
                rail.down = self._down or (welcome.unreadable if path == "process_vm" else None)

    def _greet(self, sock: socket.socket) -> wire.Welcome:
        """The handshake.

        Raises:
            TransportError: The target refused.
        """
        wire.put(sock, self._hello)
        welcome = wire.get(sock, wire.Welcome)
        if challenge := welcome.challenge[:_CHALLENGE_BYTES]:
            self._proof[: len(challenge)] = np.frombuffer(challenge, np.uint8)
            wire.put(sock, wire.Ready())
            welcome = wire.get(sock, wire.Welcome)
        if welcome.refusal is not None:
            raise TransportError(welcome.refusal)
        return welcome


def _behind(head: NDArray[np.uint8], plan: CopyPlan | None) -> Scatter:
    """A frame's head, and the source's memory behind it."""
    address, length = np.array([head.ctypes.data], np.uint64), np.array([head.size], np.uint64)
    if plan is not None:
        address, length = np.concatenate((address, plan.src)), np.concatenate((length, plan.length))
    return Scatter(address, length)


def call(listener: Callable[..., None], *args: object) -> None:
    """Call an owner's function; what it raises is its own affair."""
    try:
        listener(*args)
    except Exception:
        log.exception("a listener failed; the link goes on")
