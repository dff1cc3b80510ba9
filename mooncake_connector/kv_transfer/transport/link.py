"""The initiator's end of a link: several connections that share its writes."""

import contextlib
import logging
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, SourceIdentity
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, Scatter, send

FRAME_BYTES = wire.MAX_FRAME_BYTES
"""Large writes are cut into frames of this size: the grain of fairness."""

STRIPE_BYTES = 1 << 20
"""Writes below this size use one connection."""

INLINE_BYTES = 32 << 10
"""Frames up to this size are sent by the thread that writes, if that takes no waiting."""

SEND_BUFFER_BYTES = 4 << 20

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Write:
    number: int
    on_done: Callable[[str | None], None]
    parts: int
    reason: str | None = None


class _Frame:
    """One frame on its way: its head and, on the tcp path, the source's memory behind it."""

    def __init__(self, write: _Write, key: int, parts: int, plan: CopyPlan, with_src: bool) -> None:
        self.write = write
        self.nbytes = plan.nbytes
        self.begun = False
        self._head = np.frombuffer(wire.frame_head(key, write.number, parts, plan, with_src), np.uint8)
        address, length = _u64(self._head.ctypes.data), _u64(self._head.size)
        if not with_src:
            address, length = np.concatenate((address, plan.src)), np.concatenate((length, plan.length))
        self.data = Scatter(address, length)


class _Lane:
    """One connection: frames to send, and those sent but not acknowledged.

    One thread at a time sends, the one that set `_busy`: the lane's own or, for a small frame on an idle
    lane, the one that offers it, which saves waking another.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.sent: deque[_Frame] = deque()
        self.sock: socket.socket | None = None
        self.load = 0
        self._todo: deque[_Frame] = deque()
        self._changed = threading.Condition()
        self._busy = True
        self._closed = False

    def offer(self, frame: _Frame) -> None:
        """Send a frame now if that takes no waiting, else leave it to the lane's thread."""
        with self._changed:
            if self._busy or self._closed or self._todo or frame.data.left > INLINE_BYTES:
                self._todo.append(frame)
                self._changed.notify()
                return
            self._busy = True
        with contextlib.suppress(OSError):  # the lane's thread will meet it again, and knows what to do
            self._push(frame, MSG_DONTWAIT)
        with self._changed:
            self._busy = False
            if frame.data.left:
                self._todo.appendleft(frame)
            if self._todo or self._closed:
                self._changed.notify()

    def run(self) -> None:
        """The lane's thread: send what was offered until closed.

        Raises:
            OSError: The connection broke.
        """
        while True:
            with self._changed:
                self._busy = False
                self._changed.wait_for(lambda: not self._busy and (self._todo or self._closed))
                if self._closed:
                    return
                frame = self._todo.popleft()
                self._busy = True
            while frame.data.left:
                self._push(frame, 0)

    def close(self) -> None:
        """Wake and end all that waits on this lane."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self.sock is not None:
            wire.hang_up(self.sock)

    def _push(self, frame: _Frame, flags: int) -> None:
        assert self.sock is not None
        if not frame.begun:
            frame.begun = True
            self.sent.append(frame)
        frame.data.advance(send(self.sock.fileno(), frame.data, flags))


class StreamLink:
    """A `Link` over `connections` TCP connections; see `open_link`."""

    def __init__(
        self,
        path: str,
        endpoint: Endpoint,
        *,
        name: str,
        connections: int,
        on_down: Callable[[str], None],
        source: SourceIdentity | None,
    ) -> None:
        if not 1 <= connections <= wire.MAX_CONNECTIONS:
            raise TransportError(f"connections={connections}: take 1 to {wire.MAX_CONNECTIONS}")
        self.path = path
        self._endpoint = endpoint
        self._name = name
        self._on_down = on_down
        self._source = source
        self._id = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._down: str | None = None
        self._writes: dict[int, _Write] = {}
        self._number = 0
        self._lanes = [_Lane(index) for index in range(connections)]
        for lane in self._lanes:
            self._start(self._send, lane, "send")

    def write(self, key: int, plan: CopyPlan, on_done: Callable[[str | None], None]) -> None:
        """Enqueue a write, see `Link.write`. On a link that is down `on_done` runs before this returns."""
        share = -(-plan.nbytes // len(self._lanes))
        size = min(FRAME_BYTES, max(STRIPE_BYTES, share))
        pieces = list(plan.split(size, wire.MAX_FRAME_RANGES))
        with self._lock:
            down = self._down
            self._number += 1
            write = _Write(self._number, on_done, len(pieces))
            if down is None:
                self._writes[write.number] = write
        if down is not None:
            _call(on_done, down)
            return
        for piece in pieces:
            frame = _Frame(write, key, len(pieces), piece, self._source is not None)
            with self._lock:
                lane = min(self._lanes, key=lambda lane: lane.load)
                lane.load += frame.nbytes
            lane.offer(frame)

    def close(self) -> None:
        """Close all connections; writes not yet landed end with a reason. `on_down` is not called."""
        self._fall("the link was closed here", tell=False)

    def _start(self, run: Callable[[_Lane], None], lane: _Lane, what: str) -> threading.Thread:
        thread = threading.Thread(
            target=run, args=(lane,), name=f"mooncake-{what}-{self._name}-{lane.index}", daemon=True
        )
        thread.start()
        return thread

    def _send(self, lane: _Lane) -> None:
        """A lane's sender: connects, then sends frames until the link is down."""
        reader = None
        try:
            self._connect(lane)
            reader = self._start(self._read_acks, lane, "acks")
            lane.run()
        except (OSError, EOFError, TransportError) as broken:
            self._fall(str(broken))
        finally:
            self._fall("a sender thread failed")
            if lane.sock is not None:
                wire.hang_up(lane.sock)
                if reader is not None:
                    reader.join()
                lane.sock.close()

    def _connect(self, lane: _Lane) -> None:
        where = self._endpoint
        try:
            sock = socket.create_connection((where.host, where.port), wire.HANDSHAKE_S)
        except OSError as refused:
            raise TransportError(f"can't connect to {where.host}:{where.port}: {refused}") from refused
        with self._lock:
            lane.sock = sock
            if self._down is not None:
                raise TransportError(self._down)
        wire.tune(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        wire.put(
            sock,
            wire.Hello(
                version=wire.VERSION,
                token=where.token,
                path=self.path,
                link=self._id,
                index=lane.index,
                connections=len(self._lanes),
                source=self._source,
            ),
        )
        reason = wire.get(sock, wire.Welcome).reason
        if reason is not None:
            raise TransportError(reason)
        sock.settimeout(None)

    def _read_acks(self, lane: _Lane) -> None:
        assert lane.sock is not None
        try:
            while True:
                number, reason = wire.get_ack(lane.sock)
                if not lane.sent or lane.sent[0].write.number != number:
                    raise TransportError(f"acknowledgement of write {number}, which is not the next one")
                self._landed(lane, lane.sent.popleft(), reason)
        except (OSError, EOFError, TransportError) as broken:
            self._fall(str(broken))
        finally:
            self._fall("a thread that reads acknowledgements failed")

    def _landed(self, lane: _Lane, frame: _Frame, reason: str | None) -> None:
        write = frame.write
        with self._lock:
            lane.load -= frame.nbytes
            write.parts -= 1
            write.reason = write.reason or reason
            done = not write.parts and self._writes.pop(write.number, None) is not None
        if done:
            _call(write.on_done, write.reason)

    def _fall(self, reason: str, tell: bool = True) -> None:
        """Take the whole link down, once."""
        with self._lock:
            if self._down is not None:
                return
            self._down = reason
            unfinished = list(self._writes.values())
            self._writes.clear()
            for lane in self._lanes:
                lane.close()
        for write in unfinished:
            _call(write.on_done, reason)
        if tell:
            log.info("link %s is down: %s", self._name, reason)
            _call(self._on_down, reason)


def _u64(value: int) -> U64Array:
    return np.array([value], np.uint64)


def _call(listener: Callable[..., None], *args: object) -> None:
    try:
        listener(*args)
    except Exception:
        log.exception("a listener failed; the link goes on")
