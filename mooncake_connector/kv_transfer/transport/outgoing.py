"""What an initiator puts on a stream, and how each of it ends."""

import logging
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.checksum import xxh3
from mooncake_connector.kv_transfer.transport.syscalls import Cursor, Few, Scatter

if TYPE_CHECKING:
    from mooncake_connector.kv_transfer.transport.lane import Slot

log = logging.getLogger(__name__)

OnDone = Callable[[Failure | None], None]
OnAnswer = Callable[[bytes | Failure], None]


class Result:
    """An `on_done` or `on_answer` to wait for."""

    __slots__ = ("_open", "outcome")

    def __init__(self) -> None:
        self.outcome: bytes | Failure | None = None
        self._open = threading.Lock()
        self._open.acquire()

    def __call__(self, outcome: bytes | Failure | None) -> None:
        self.outcome = outcome
        self._open.release()

    @property
    def done(self) -> bool:
        return not self._open.locked()

    def wait(self, seconds: float) -> bool:
        return self._open.acquire(timeout=seconds)


class Write:
    """One call of `StreamRail.write`."""

    __slots__ = ("failure", "frames", "on_done", "path")

    def __init__(self, path: str, on_done: OnDone, frames: int) -> None:
        self.path, self.on_done, self.frames = path, on_done, frames
        self.failure: Failure | None = None

    def end(self, failure: Failure | None) -> None:
        """All is over, unless it was before."""
        if self.frames:
            self.frames = 0
            call(self.on_done, failure)


class Frame:
    """A frame of a write. It is put together when its turn comes, by the thread that sends it.

    Attributes:
        staged: its plan, if the source is to be gathered in a buffer before.
        slot: that buffer, while it is in use.
    """

    __slots__ = (
        "_checked", "_flags", "_head", "_key", "_plan", "data", "nbytes", "number", "slot", "staged", "write",
    )  # fmt: skip

    def __init__(
        self,
        write: Write,
        key: int,
        number: int,
        plan: CopyPlan,
        flags: int,
        checked: bool,
        staged: bool = False,
    ) -> None:
        self.write, self.number = write, number
        self.nbytes = plan.nbytes if plan.length.size != 1 else int(plan.length[0])
        self._key, self._plan, self._flags, self._checked = key, plan, flags, checked
        self.staged = plan if staged else None
        self.slot: Slot | None = None
        self.data: Cursor | None = None

    def head(self) -> bytes:
        """All of it but the payload."""
        plan, flags, checksum = self._plan, self._flags, 0
        if self._checked:
            flags, checksum = flags | wire.CHECKED, xxh3(*self._source())
        kind = wire.REFERENCE if self.write.path == "process_vm" else wire.PAYLOAD
        return wire.frame_head(kind, self._key, self.number, plan, flags, checksum)

    def begin(self) -> Cursor:
        """Its head and, on the tcp path, the source's memory behind it.

        Raises:
            TransportError: A GPU failed to give the source.
        """
        if self.data is None:
            if self.slot is not None:
                self.slot.wait()
            self._head = array("B", self.head())
            if self.write.path == "tcp":
                src, length = self._source()
                self.data = _behind(self._head, src, length)
            else:
                self.data = _behind(self._head)
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

    def _source(self) -> tuple[U64Array, U64Array]:
        """Address and length of what is to be sent: uint64 [n]."""
        if self.slot is None:
            return self._plan.src, self._plan.length
        return np.array([self.slot.address], np.uint64), np.array([self.nbytes], np.uint64)


class Question:
    """A question: sent like a frame, answered in its turn."""

    __slots__ = ("_head", "_on_answer", "data", "nbytes", "number")

    staged: ClassVar[None] = None

    def __init__(self, number: int, topic: str, body: bytes, on_answer: OnAnswer) -> None:
        self.number, self.nbytes = number, len(body)
        self._head = array("B", wire.question(number, topic, body))
        self.data = _behind(self._head)
        self._on_answer: OnAnswer | None = on_answer

    def begin(self) -> Cursor:
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


def _behind(head: "array[int]", src: U64Array | None = None, length: U64Array | None = None) -> Cursor:
    """A frame's head, and the source's memory behind it."""
    address, size = head.buffer_info()
    if src is None or length is None or not length.size:
        return Few(address, size)
    if length.size == 1:
        return Few(address, size, int(src[0]), int(length[0]))
    first = np.array([[address], [size]], np.uint64)
    return Scatter(np.append(first[0], src), np.append(first[1], length))


def call(listener: Callable[..., None], *args: object) -> None:
    """Call an owner's function; what it raises is its own affair."""
    try:
        listener(*args)
    except Exception:
        log.exception("a listener failed; the link goes on")
