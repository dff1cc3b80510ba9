"""The initiator's end of a link: its connections, and the fences owed for those that broke."""

import contextlib
import logging
import os
import secrets
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

import msgspec

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Endpoint, Failure, LinkEvents, Mark, SourceIdentity
from mooncake_connector.kv_transfer.transport.outgoing import OnAnswer, call
from mooncake_connector.kv_transfer.transport.process_vm import identity
from mooncake_connector.kv_transfer.transport.staging import Staging
from mooncake_connector.kv_transfer.transport.stream import PATHS, Stream

log = logging.getLogger(__name__)


class _Phase(Enum):
    CONNECTING = auto()
    UP = auto()
    FENCING = auto()  # broken; the target has not yet confirmed that nothing lands over it any more
    DOWN = auto()


class _Slot:
    """One of a link's connections through all its incarnations.

    Attributes:
        open: names of its rails that can be used.
        owed: names of its rails that went down and were not reported as fenced.
        due: it is being fenced, and until then (monotonic clock) the target has time to confirm.
        wanted: it is to be made anew once fenced.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.phase = _Phase.CONNECTING
        self.open: set[str] = set()
        self.owed: set[str] = set()
        self.due: float | None = None
        self.wanted = False


class StreamLink:
    """A `Link` over TCP connections, each with a ``tcp`` rail, and a ``process_vm`` one if that is possible.

    All state is the link's own thread's, which also reads what the target replies and tells the events.

    Args:
        endpoint: from the target's `admit`.
        name: names the link in threads and logs.
        connections: TCP connections, each served by a thread at the target.
        paths: of `PATHS`, those wanted; without any the connections serve for questions only.
        source: whose memory process_vm reads; this process's if None.
        checksum: have the target compare a checksum of each frame with what has landed, before it says so.
        staging: knows the memory of GPUs; None: there is none.

    Raises:
        TransportError: `connections` is out of range, or a path is not of a stream.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        connections: int,
        paths: tuple[str, ...],
        source: SourceIdentity | None = None,
        events: LinkEvents,
        checksum: bool = False,
        staging: Staging | None = None,
    ) -> None:
        if not 1 <= connections <= wire.MAX_CONNECTIONS:
            raise TransportError(f"connections={connections}: take 1 to {wire.MAX_CONNECTIONS}")
        if not set(paths) <= set(PATHS):
            raise TransportError(f"paths={paths}: a stream carries {', '.join(PATHS)}")
        self._endpoint, self._name, self._events = endpoint, name, events
        self._paths, self._checksum, self._staging = paths, checksum, staging
        self._hello = wire.Hello(
            version=wire.VERSION,
            token=endpoint.token,
            link=secrets.token_bytes(16),
            index=0,
            connections=connections,
            source=(source or identity()) if "process_vm" in paths else None,
        )
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._readable: dict[int, Stream] = {}
        self._ended = False
        self._slots = [_Slot(self._made(index, 0)) for index in range(connections)]
        for slot in self._slots:
            slot.stream.start()
        threading.Thread(target=self._run, name=f"mooncake-link-{name}", daemon=True).start()

    # ------------------------------------------------------------------ any thread

    def restore(self, rail: str) -> None:
        """See `Link.restore`."""
        self._post(partial(self._restore, self._slot_of(rail), rail))

    def abandon(self, rail: str, reason: str) -> None:
        """See `Link.abandon`. All rails of one connection stand and fall together."""
        slot = self._slot_of(rail)
        self._post(lambda: slot.stream.breaks(reason))

    def marks(self) -> tuple[Mark, ...]:
        """None: what a stream wrote the target itself wrote."""
        return ()

    def ask(self, topic: str, body: bytes, on_answer: OnAnswer) -> None:
        """See `Link.ask`; the answer comes on the link's thread.

        Raises:
            TransportError: Topic or body are too long.
        """
        for slot in self._slots:
            if slot.phase is _Phase.UP:
                slot.stream.ask(topic, body, on_answer)
                return
        call(on_answer, Failure("no connection of the link is up", True))

    def close(self) -> None:
        """See `Link.close`; the writes end on the link's thread."""
        self._post(partial(self._end, "the link was closed here"))

    def stream_up(self, stream: Stream) -> None:
        """For `Stream`."""
        self._post(partial(self._up, stream))

    def stream_down(self, stream: Stream, reason: str) -> None:
        """For `Stream`."""
        self._post(partial(self._down, stream, reason))

    def unreadable(self, stream: Stream, reason: str) -> None:
        """For `Stream`."""
        self._post(partial(self._lame, stream, reason))

    def stuck(self, stream: Stream, reason: str) -> None:
        """For `Stream`."""
        self._post(lambda: stream.breaks(reason))

    def _post(self, what: Callable[[], None]) -> None:
        self._calls.append(what)
        with contextlib.suppress(OSError):  # the link has ended
            os.eventfd_write(self._wake, 1)

    def _slot_of(self, rail: str) -> _Slot:
        path, _, index = rail.rpartition("-")
        if path not in self._paths or not index.isdecimal() or int(index) >= len(self._slots):
            raise TransportError(f"rail {rail!r} is unknown")
        return self._slots[int(index)]

    # ------------------------------------------------------------------ the link's thread

    def _run(self) -> None:
        while not self._ended:
            dues = [slot.due for slot in self._slots if slot.due is not None]
            now = time.monotonic()
            if dues and now > min(dues):
                self._end(f"the target did not confirm a fence within {wire.SILENCE_S} s", tell=True)
                break
            for fd, _ in self._epoll.poll(max(min(dues) - now, 0.001) if dues else None):
                if fd == self._wake:
                    os.eventfd_read(fd)
                elif (stream := self._readable.get(fd)) is not None:
                    stream.read()
            while self._calls and not self._ended:
                self._calls.popleft()()
        self._epoll.close()
        os.close(self._wake)

    def _made(self, index: int, incarnation: int) -> Stream:
        hello = msgspec.structs.replace(self._hello, index=index, incarnation=incarnation)
        name = f"{self._name}-{index}"
        return Stream(self, hello, self._endpoint, self._paths, self._checksum, name, self._staging)

    def _up(self, stream: Stream) -> None:
        slot = self._slots[stream.index]
        if slot.stream is not stream or slot.phase is not _Phase.CONNECTING:
            return
        slot.phase = _Phase.UP
        self._readable[stream.watch(self._epoll)] = stream
        for rail in stream.rails.values():
            if rail.down is None:
                slot.open.add(rail.name)
                call(self._events.rail_up, rail)
            else:
                call(self._events.rail_down, rail.name, rail.down)
                call(self._events.rail_fenced, rail.name)
        self._settle("")

    def _down(self, stream: Stream, reason: str) -> None:
        slot = self._slots[stream.index]
        log.info("link %s: connection %d is down: %s", self._name, stream.index, reason)
        for fd in [fd for fd, other in self._readable.items() if other is stream]:
            del self._readable[fd]
            with contextlib.suppress(OSError):  # closed already
                self._epoll.unregister(fd)
        names = {rail.name for rail in stream.rails.values()}
        down = names if slot.phase is _Phase.CONNECTING else slot.open
        slot.owed |= down
        slot.phase, slot.open = _Phase.FENCING, set()
        for name in sorted(down):
            call(self._events.rail_down, name, reason)
        self._settle(reason)

    def _lame(self, stream: Stream, reason: str) -> None:
        """The target can't read this process's memory any more: one rail is down, its connection is not."""
        slot = self._slots[stream.index]
        name = stream.rails["process_vm"].name
        if slot.stream is not stream or name not in slot.open:
            return
        slot.open.discard(name)
        slot.owed.add(name)
        call(self._events.rail_down, name, reason)

        def answered(answer: bytes | Failure) -> None:
            if not isinstance(answer, Failure) and name in slot.owed:
                slot.owed.discard(name)
                stream.rails["process_vm"].fenced.set()
                call(self._events.rail_fenced, name)

        # Frames are answered in order: after this one nothing of that rail is under way.
        stream.ask(wire.ECHO, b"", answered)

    def _settle(self, reason: str) -> None:
        """Ask for the fences that are owed, over whichever connection lives."""
        alive = [slot for slot in self._slots if slot.phase is _Phase.UP]
        if not alive:
            if not any(slot.phase is _Phase.CONNECTING for slot in self._slots):
                self._end(reason, tell=True)
            return
        for slot in self._slots:
            if slot.phase is _Phase.FENCING and slot.due is None:
                slot.due = time.monotonic() + wire.SILENCE_S
                body = wire.FENCED.pack(slot.stream.index, slot.stream.incarnation)
                alive[0].stream.ask(wire.FENCE, body, partial(self._fence_answered, slot))

    def _fence_answered(self, slot: _Slot, answer: bytes | Failure) -> None:
        self._post(partial(self._fenced, slot, answer))  # a broken stream answers on any thread

    def _fenced(self, slot: _Slot, answer: bytes | Failure) -> None:
        slot.due = None
        if isinstance(answer, Failure):
            if answer.retry:
                self._settle(answer.reason)
            else:
                self._end(answer.reason, tell=True)
            return
        slot.phase = _Phase.DOWN
        for rail in slot.stream.rails.values():
            rail.fenced.set()
        owed, slot.owed = slot.owed, set()
        for name in sorted(owed):
            call(self._events.rail_fenced, name)
        if slot.wanted:
            self._reconnect(slot)

    def _restore(self, slot: _Slot, name: str) -> None:
        if slot.phase is _Phase.DOWN:
            self._reconnect(slot)
        elif slot.phase is _Phase.FENCING:
            slot.wanted = True
        elif slot.phase is _Phase.UP and name not in slot.open:
            stream = slot.stream
            stream.ask(
                wire.PROBE, b"", lambda answer: self._post(partial(self._probed, slot, stream, name, answer))
            )

    def _reconnect(self, slot: _Slot) -> None:
        slot.wanted = False
        slot.phase = _Phase.CONNECTING
        slot.stream = self._made(slot.stream.index, slot.stream.incarnation + 1)
        slot.stream.start()

    def _probed(self, slot: _Slot, stream: Stream, name: str, answer: bytes | Failure) -> None:
        if slot.stream is not stream or slot.phase is not _Phase.UP or name in slot.open:
            return
        rail = next(rail for rail in stream.rails.values() if rail.name == name)
        if isinstance(answer, Failure):
            call(self._events.rail_down, name, answer.reason)
            call(self._events.rail_fenced, name)
            return
        stream.revive(rail)
        slot.open.add(name)
        call(self._events.rail_up, rail)

    def _end(self, reason: str, tell: bool = False) -> None:
        """Take the whole link down."""
        self._ended = True
        for slot in self._slots:
            slot.phase = _Phase.DOWN
            slot.stream.breaks(reason)
            for rail in slot.stream.rails.values():
                rail.fenced.set()
        if tell:
            log.info("link %s is down: %s", self._name, reason)
            call(self._events.link_down, reason)
