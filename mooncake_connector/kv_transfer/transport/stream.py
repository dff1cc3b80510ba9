"""One connection of a link, seen from the initiator: what is to be sent, and what waits for its answer."""

import contextlib
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, Failure
from mooncake_connector.kv_transfer.transport.mailbox import LOOK_S
from mooncake_connector.kv_transfer.transport.outgoing import Frame, OnAnswer, OnDone, Question, Result, Write
from mooncake_connector.kv_transfer.transport.staging import LOAD_BYTES, LOADS, Loader, Staging
from mooncake_connector.kv_transfer.transport.stream_rail import StreamRail
from mooncake_connector.kv_transfer.transport.sync_write import SMALL_BYTES, SyncWriter
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, Cursor, send

PATHS = ("process_vm", "tcp")
"""The paths that a stream can carry, the preferred first."""

MAX_QUEUED = 4096
"""Frames that may wait in one stream."""

SEND_BUFFER_BYTES = 4 << 20

_RECEIVE_BYTES = 64 << 10


class StreamOwner(Protocol):
    """Whom a stream reports to, from transport threads."""

    def stream_up(self, stream: "Stream") -> None:
        """It is connected."""

    def stream_down(self, stream: "Stream", reason: str) -> None:
        """It broke, or could not be made; called once, before its writes end. It carries nothing any more."""

    def unreadable(self, stream: "Stream", reason: str) -> None:
        """Its process_vm rail went down, alone; called before that rail's writes end."""

    def stuck(self, stream: "Stream", reason: str) -> None:
        """Somebody who waits for it asks that it be broken, on another thread."""


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
        staging: Staging | None = None,
    ) -> None:
        self.index, self.incarnation = hello.index, hello.incarnation
        self.rails = {path: StreamRail(self, path) for path in paths}
        self.sock: socket.socket | None = None
        self.owner, self.sync = owner, SyncWriter(self)
        self._endpoint, self._checksum = endpoint, checksum
        self._staging = staging or Staging()
        # The target believes that this process is at the other end once it has read its challenge from here.
        self._proof = np.zeros(wire.CHALLENGE_BYTES, np.uint8)
        self._hello = msgspec.structs.replace(
            hello,
            challenge_address=self._proof.ctypes.data,
            mailbox_address=self.sync.mailbox_address,
        )
        self._todo, self._sent = deque[Frame | Question](), deque[Frame | Question]()
        self._changed = threading.Condition(threading.RLock())
        self._busy = True
        self._down: str | None = None
        self._numbers, self._said = itertools.count(1), bytearray()
        self._reading = threading.Lock()
        self._watched: tuple[select.epoll, int] | None = None
        self._thread = threading.Thread(target=self._run, name=f"mooncake-send-{name}", daemon=True)

    def start(self) -> None:
        """Connect in the background."""
        self._thread.start()

    def write(self, rail: StreamRail, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """Enqueue a write, see `Rail.write`."""
        staged = self._staging.active and self.stages(rail, plan)
        most = LOAD_BYTES if staged else wire.MAX_FRAME_BYTES
        small = plan.length.size == 1 and int(plan.length[0]) <= most
        pieces = [plan] if small else list(plan.split(most, wire.MAX_FRAME_RANGES))
        write, number = Write(rail.path, on_done, len(pieces)), next(self._numbers)
        last = len(pieces) - 1
        frames = [
            Frame(write, key, number, piece, wire.LAST * (at == last), self._checksum, staged)
            for at, piece in enumerate(pieces)
        ]
        with self._changed:
            reason = rail.down or self._full(len(frames))
            now = reason is None and self._offer(frames)
        if reason is not None:
            write.end(Failure(reason, True))
        elif now:
            self._send_now()

    def stages(self, rail: StreamRail, plan: CopyPlan) -> bool:
        """Whether a plan's source has to be staged, which takes waiting."""
        return rail.path == "tcp" and self._staging.covers(plan.src)

    def piece(self, rail: StreamRail, key: int, plan: CopyPlan, on_done: OnDone) -> Frame:
        """A write of one frame, not enqueued."""
        write = Write(rail.path, on_done, 1)
        return Frame(write, key, next(self._numbers), plan, wire.LAST | wire.AWAITED, self._checksum)

    def idle(self, rail: StreamRail) -> bool:
        """Whether a rail is up, with nothing on this stream under way."""
        with self._changed:
            return rail.down is None and not (self._busy or self._todo or self._sent)

    def send_by_hand(self, rail: StreamRail, frame: Frame, result: Result, seconds: float) -> bool:
        """Send a frame on an idle stream, and stay until its reply has come: whether it was sent.

        The owner's thread is not woken for the reply: that would cost more than all the rest.

        Args:
            seconds: after which the reply is left to the owner's thread.
        """
        if self._watched is None or not self._reading.acquire(blocking=False):
            return False
        epoll, fd = self._watched
        sent = False
        try:
            epoll.modify(fd, 0)
            try:
                with self._changed:
                    sent = self.idle(rail) and self._offer([frame])
                if sent:
                    self._send_now()
                    self._look(fd, result, time.perf_counter() + seconds)
            finally:
                epoll.modify(fd, select.EPOLLIN)
        except (OSError, EOFError, TransportError, ValueError) as broken:  # ValueError: the link has ended
            self.owner.stuck(self, str(broken))
        finally:
            self._reading.release()
        return sent

    def _look(self, fd: int, result: Result, deadline: float) -> None:
        """Look for replies, and soon wait for them, until a certain one has come."""
        asleep = time.perf_counter() + LOOK_S
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not result.done and (now := time.perf_counter()) < deadline:
            if now > asleep:
                poll.poll(max(1, 1000 * (deadline - now)))
            else:
                os.sched_yield()  # a target that was woken on this CPU could not run else
            with contextlib.suppress(BlockingIOError):
                self._receive()

    def ask(self, topic: str, body: bytes, on_answer: OnAnswer) -> None:
        """Enqueue a question; `on_answer` is called once.

        Raises:
            TransportError: Topic or body are too long.
        """
        asked = Question(next(self._numbers), topic, body, on_answer)
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
                rail.fenced.clear()
            lost = [*self._sent, *self._todo]
            self._sent.clear()
            self._todo.clear()
            self._changed.notify()
            sock = self.sock
        if sock is not None:
            wire.hang_up(sock)
        self.owner.stream_down(self, reason)
        for entry in lost:
            entry.lost(reason)

    def watch(self, epoll: select.epoll) -> int:
        """Have an epoll report when `read` is due: the number it reports, -1 if the stream ended before."""
        with self._reading:
            assert self.sock is not None
            fd = self.sock.fileno()
            if fd >= 0:
                epoll.register(fd, select.EPOLLIN)
                self._watched = epoll, fd
            return fd

    def revive(self, rail: StreamRail) -> None:
        """A rail that went down alone is good again."""
        with self._changed:
            rail.down = self._down

    def read(self) -> None:
        """Take in what the target has replied; for whoever found the socket readable. Does not block."""
        if not self._reading.acquire(blocking=False):
            return  # somebody else is at it
        try:
            if self.sock is not None and self.sock.fileno() >= 0:
                self._receive()
            return
        except BlockingIOError:
            return
        except (OSError, EOFError, TransportError) as broken:
            reason = str(broken)
        finally:
            self._reading.release()
        self.breaks(reason)

    def _receive(self) -> None:
        """Hand out all replies that have come as a whole.

        Raises:
            BlockingIOError: Nothing has come.
            EOFError, OSError: The connection has ended.
            TransportError: They answer nothing that was sent, or are malformed.
        """
        assert self.sock is not None
        data = self.sock.recv(_RECEIVE_BYTES, MSG_DONTWAIT)
        if not data:
            raise EOFError("the peer closed the connection")
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
        if status == wire.UNREADABLE and isinstance(entry, Frame):
            self._lame(self.rails[entry.write.path], said.decode(errors="replace"))
        entry.answered(status, said)

    def _lame(self, rail: StreamRail, reason: str) -> None:
        """Take one rail down; the stream goes on."""
        with self._changed:
            if rail.down is not None:
                return
            rail.down = reason
            rail.fenced.clear()
            begun = self._sent[-1] if self._sent else None
            lost = [
                e for e in (*self._sent, *self._todo) if isinstance(e, Frame) and e.write.path == rail.path
            ]
            self._todo = deque(e for e in self._todo if e is begun or e not in lost)
        self.owner.unreadable(self, reason)
        for entry in lost:
            entry.lost(reason)

    def _full(self, frames: int) -> str | None:
        waiting = len(self._todo) + len(self._sent)
        return (
            f"{waiting} frames wait already: send less at a time" if waiting + frames > MAX_QUEUED else None
        )

    def _offer(self, frames: Sequence[Frame | Question]) -> bool:
        """Put frames into the queue: whether the caller is to send the first, by `_send_now`."""
        self._todo.extend(frames)
        first = frames[0]
        waits = first.nbytes > SMALL_BYTES or first.staged is not None
        if self._busy or len(self._todo) > 1 or waits:
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

    def _next(self) -> Frame | Question | None:
        """The next frame, counted as sent from here on."""
        with self._changed:
            if self._down is not None or not self._todo:
                return None
            entry = self._todo.popleft()
            if not self._sent or self._sent[-1] is not entry:  # the head of it may be sent already
                self._sent.append(entry)
            return entry

    def _push(self, data: Cursor, flags: int) -> None:
        assert self.sock is not None
        data.advance(send(self.sock.fileno(), data, flags))

    def _run(self) -> None:
        """The stream's thread: connects, then sends until the end."""
        reason, loader = "a sender thread failed", Loader(self._staging)
        try:
            self._connect()
            self.owner.stream_up(self)
            while True:
                with self._changed:
                    self._busy = False
                    self._changed.wait_for(lambda: not self._busy and (self._todo or self._down is not None))
                    self._busy = True
                if (entry := self._next()) is None:
                    return
                if staging := self._staging.active:
                    with self._changed:
                        ahead = [entry, *itertools.islice(self._todo, LOADS)]
                    loader.load(ahead)
                data = entry.begin()
                while data.left:
                    self._push(data, 0)
                if staging:
                    loader.sent(entry)
        except (OSError, EOFError, TransportError) as broken:
            reason = str(broken)
        finally:
            self.breaks(reason)
            loader.close()
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
        wire.widen(sock, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        welcome = wire.greet(sock, self._hello, self._proof)
        sock.settimeout(None)
        with self._changed:
            for path, rail in self.rails.items():
                rail.down = self._down or (welcome.unreadable if path == "process_vm" else None)
