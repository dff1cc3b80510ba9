"""GPU memory over sockets: by way of page-locked buffers, which the GPU fills and empties beside the socket.

The initiator gathers a frame while the one before it is being sent. The target receives a part of a frame
while the GPU puts the part before it in its place. A byte has landed once the GPU has it: so long the reply
waits, and a fence of its grant.
"""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Ranges, Region, U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.grants import Grant
from mooncake_connector.kv_transfer.transport.lane import Cuda, Device, Lane, Slot, places_of
from mooncake_connector.kv_transfer.transport.outgoing import Frame, Question
from mooncake_connector.kv_transfer.transport.syscalls import MSG_DONTWAIT, Few, receive
from mooncake_connector.kv_transfer.transport.tcp import Inbox

LOAD_BYTES, LOADS = wire.MAX_FRAME_BYTES, 2
"""A sender's buffers: one is sent, one is filled. What a frame costs besides its bytes wants large frames."""

UNLOAD_BYTES, UNLOADS = 2 << 20, 3
"""A receiver's buffers. Before a frame is answered its last copy is waited for, which wants small ones."""

LOOK_MS = 1
"""How often a receiver to whom nothing comes looks whether its copies are done."""


class Staging:
    """Which memory of this process is a GPU's, and has to be staged. Thread-safe; idle without such memory.

    Args:
        device: the GPUs; the real ones if None.

    Attributes:
        active: there is GPU memory.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device: Device = device or Cuda()
        self._lock = threading.Lock()
        self._regions: list[Region] = []
        self._ranges = _ranges([])
        self._of: dict[str, Ranges] = {}
        self.active = False

    def add(self, region: Region) -> None:
        """Stage what lies in a region, if that is a GPU's."""
        if region.on_gpu:
            with self._lock:
                self._regions.append(region)
                self._look()

    def remove(self, region: Region) -> None:
        """Undo one `add`."""
        with self._lock:
            if region in self._regions:
                self._regions.remove(region)
                self._look()

    def covers(self, address: U64Array) -> bool:
        """Whether any of these addresses (uint64 [n]) is in GPU memory."""
        return self.active and bool(self.on_gpu(address).any())

    def on_gpu(self, address: U64Array) -> NDArray[np.bool_]:
        """Which of these addresses (uint64 [n]) are in GPU memory: [n]."""
        ranges = self._ranges
        if not ranges.start.size:
            return np.zeros(address.size, bool)
        at = np.searchsorted(ranges.start, address, side="right")
        inside: NDArray[np.bool_] = (at > 0) & (address < ranges.end[at - 1])
        return inside

    def reach(self, device: int, address: U64Array, length: U64Array) -> bool:
        """Whether all of these ranges (uint64 [n]) are memory of one device."""
        ranges = self._of.get(f"cuda:{device}")
        return ranges is not None and ranges.cover(address, length)

    def lane(self, address: U64Array, nbytes: int, count: int) -> Lane:
        """So many buffers, for the device that these addresses (uint64 [n]) are of."""
        return Lane(self.device, self, address, nbytes, count)

    def _look(self) -> None:
        of: dict[str, list[Region]] = {}
        for region in self._regions:
            of.setdefault(region.location, []).append(region)
        self._of = {location: _ranges(regions) for location, regions in of.items()}
        self._ranges = _ranges(self._regions)
        self.active = bool(self._regions)


def _ranges(regions: list[Region]) -> Ranges:
    return Ranges.of(
        np.array([region.address for region in regions], np.uint64),
        np.array([region.length for region in regions], np.uint64),
    )


class Loader:
    """The initiator's side of one connection: gathers GPU memory ahead of sending. Of one thread."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._lane: Lane | None = None

    def load(self, entries: Iterable[Frame | Question]) -> None:
        """Begin to gather what will be sent next, as far as there are buffers; in the order of sending.

        Raises:
            TransportError: The GPU refuses.
        """
        for entry in entries:
            if isinstance(entry, Frame) and entry.staged is not None and entry.slot is None:
                if self._lane is None:
                    self._lane = self._staging.lane(entry.staged.src, LOAD_BYTES, LOADS)
                if not self._lane.slots:
                    return
                entry.slot = self._lane.slots.popleft()
                entry.slot.fill(entry.staged)

    def sent(self, entry: Frame | Question) -> None:
        """An entry's bytes have left its buffer."""
        if isinstance(entry, Frame) and entry.slot is not None and self._lane is not None:
            self._lane.slots.append(entry.slot)
            entry.slot = None

    def close(self) -> None:
        """Nothing is sent any more."""
        if self._lane is not None:
            self._lane.close()


class StagedInbox(Inbox):
    """An `Inbox` that lands in GPU memory as well. Of the thread that serves the connection."""

    def __init__(self, sock: socket.socket, staging: Staging) -> None:
        super().__init__(sock)
        self._staging = staging
        self._lane: Lane | None = None
        self._under_way: deque[tuple[Slot, Grant, int]] = deque()
        self._left = 0

    def land(self, frame: wire.Frame, grant: Grant) -> tuple[int, str]:
        """See `Inbox.land`."""
        self.digest = None
        if not self._staging.active:
            return super().land(frame, grant)
        dst, length, _ = frame.columns()
        if not self._staging.covers(dst):
            return super().land(frame, grant)
        self._left = frame.nbytes
        try:
            return self._land(frame, grant, dst, length)
        except TransportError as failed:
            self._settle_all()
            self.drain(self._left)
            return wire.FAILED, f"the target's GPU memory can't be written: {failed}"
        finally:
            self._settle_all()

    def release(self) -> None:
        """See `Inbox.release`."""
        if self._lane is not None:
            self._lane.close()

    def _land(self, frame: wire.Frame, grant: Grant, dst: U64Array, length: U64Array) -> tuple[int, str]:
        """As `land`; whatever is under way when it ends is left to the caller."""
        if self._lane is None:
            self._lane = self._staging.lane(dst, UNLOAD_BYTES, UNLOADS)
        digest = xxhash.xxh3_64() if frame.flags & wire.CHECKED else None
        whole = CopyPlan.of(places_of(length), dst, length)
        way = self._lane.way(whole.dst, whole.length)
        for piece in whole.split(UNLOAD_BYTES):
            self._settle(UNLOADS - 1)
            slot, nbytes = self._lane.slots[0], piece.nbytes
            self._lane.slots.rotate(-1)
            self._receive(slot, nbytes)
            if digest is not None:
                digest.update(slot.array[:nbytes].data)
            if not grant.enter():
                self._settle()
                self.drain(self._left)
                return wire.REFUSED, f"key {frame.key} was revoked"
            try:
                slot.empty(piece, way)
            except BaseException:
                grant.leave(0)
                raise
            self._under_way.append((slot, grant, nbytes))
        self._settle()
        self.digest = digest.intdigest() if digest is not None else None
        return wire.LANDED, ""

    def _receive(self, slot: Slot, nbytes: int) -> None:
        """Receive so many bytes into a buffer."""
        place = Few(slot.address, nbytes)
        while place.left:
            if self._closed:
                raise EOFError("the connection was closed here")
            try:
                got = receive(self._sock.fileno(), place, MSG_DONTWAIT)
            except BlockingIOError:
                self._let_go()
                self._readable.poll(LOOK_MS if self._under_way else None)
                continue
            if not got:
                raise EOFError("the peer closed the connection")
            place.advance(got)
            self._left -= got

    def _settle(self, but: int = 0) -> None:
        """Wait until at most so many copies are under way.

        Raises:
            TransportError: One failed.
        """
        while len(self._under_way) > but:
            slot, grant, nbytes = self._under_way.popleft()
            landed = 0
            try:
                slot.wait()
                landed = nbytes
            finally:
                grant.leave(landed)

    def _let_go(self) -> None:
        """Settle what has been copied: a grant's fence must not wait for what the initiator sends next."""
        while self._under_way and self._under_way[0][0].done():
            self._settle(len(self._under_way) - 1)

    def _settle_all(self) -> None:
        while self._under_way:
            with contextlib.suppress(TransportError):
                self._settle()
