"""The rail of cuda_ipc: writes become launches and copies on one stream, whose events end them."""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Ranges, U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.slicing import whole_bytes
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.cuda.driver import (
    Context,
    DeviceBuffer,
    Event,
    Pinned,
    Stream,
    call,
    copy_async,
    copy_batch_async,
)
from mooncake_connector.kv_transfer.transport.cuda.gate import Visitor
from mooncake_connector.kv_transfer.transport.cuda.kernel import Scatter, fill_table, width_of
from mooncake_connector.kv_transfer.transport.cuda.share import Imports

MAX_RANGES = 65536
"""Of one launch."""

USUAL_RANGES = 16384

LAUNCHES = 8
"""Under way on one rail; what is more waits here, in order."""

COPY_ENGINE_BYTES = 1 << 20
"""From this mean length of ranges on copy engines are as fast as the kernel, and leave the multiprocessors
to the model."""

log = logging.getLogger(__name__)

OnDone = Callable[[Failure | None], None]


class CopyPolicy(msgspec.Struct, frozen=True):
    """How ranges are moved.

    Attributes:
        copy: ``kernel``, ``copy_engine``, or ``auto`` by the mean length of the ranges.
        blocks: multiprocessors that the kernel may take.
    """

    copy: str = "auto"
    blocks: int = 12

    def takes_kernel(self, plan: CopyPlan, nbytes: int) -> bool:
        if plan.tile is not None:
            return True  # copy engines know no tiles
        if self.copy == "auto":
            return nbytes < COPY_ENGINE_BYTES * plan.length.size
        return self.copy == "kernel"


class _Launch:
    """What one write needs while it is under way; used again and again. The table grows with its writes."""

    def __init__(self, context: Context, status: int, refused: U64Array) -> None:
        self.context, self.status, self.refused = context, status, refused
        self.event = Event(context)
        self.on_done: OnDone = _nobody
        # Freeing GPU memory waits for the whole device, the model's work included: outgrown tables are kept.
        self._buffers: list[Pinned | DeviceBuffer] = []
        self._grow(USUAL_RANGES)

    def _grow(self, capacity: int) -> None:
        self._capacity, nbytes = capacity, 24 * capacity + 8
        self.host, self.device = Pinned(nbytes, self.context), DeviceBuffer(nbytes, self.context)
        self._buffers += [self.host, self.device]

    def table(self, n: int) -> U64Array:
        """uint64 [3 n + 1] in page-locked memory."""
        if n > self._capacity:
            self._grow(1 << (n - 1).bit_length())
        return self.host.array[: 24 * n + 8].view(np.uint64)

    def close(self) -> None:
        self.event.close()
        for buffer in self._buffers:
            buffer.close()


class CudaRail:
    """A `Rail` that stores into another process's GPU memory on this host. Made by `CudaRails`.

    Writes are enqueued on the rail's stream, behind the events in `CopyPlan.after`; no thread waits for them
    but the rail's own.

    Args:
        name: what it is called in its link.
        local: GPU memory here that may be read.
        imports: the target's memory, closed with the rail.
        visitor: the target's gate, closed with the rail.
        on_broken: called once, with a reason, when the rail has gone down and all its writes have ended.
        on_fenced: called after that, when nothing of them can land any more.

    Raises:
        TransportError: The kernel can't be made.
    """

    path = "cuda_ipc"
    penalty = 1.0
    steady = True

    def __init__(
        self,
        name: str,
        context: Context,
        local: Callable[[], Ranges],
        imports: Imports,
        visitor: Visitor,
        policy: CopyPolicy,
        *,
        speed: float,
        on_broken: Callable[[str], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self.name, self.speed = name, speed
        self._context, self._local, self._imports, self._visitor = context, local, imports, visitor
        self._policy = policy
        self._on_broken, self._on_fenced = on_broken, on_fenced
        self._scatter = Scatter.of(context.device)
        self._stream = Stream(context, urgent=True)
        self._status = Pinned(8 * LAUNCHES, context)
        words = self._status.array.view(np.uint64)
        self._launches = [
            _Launch(context, self._status.address + 8 * i, words[i : i + 1]) for i in range(LAUNCHES)
        ]
        self._lock = threading.Lock()
        self._free = list(self._launches)
        self._waiting: deque[tuple[int, CopyPlan, OnDone]] = deque()
        self._flying: queue.SimpleQueue[_Launch | None] = queue.SimpleQueue()
        self._down: str | None = None
        self._tell = False
        threading.Thread(target=self._run, name=f"mooncake-cuda-{name}", daemon=True).start()

    def write(self, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """Enqueue; see `Rail.write`."""
        with self._lock:
            down = self._down
            if down is None:
                self._waiting.append((key, plan, on_done))
        if down is not None:
            on_done(Failure(down, retry=True))
        else:
            self._pump()

    def fail(self, reason: str) -> None:
        """Break the rail: it launches nothing more. Writes that wait fail; others land or fail first."""
        self._end(reason, tell=True)

    def close(self) -> None:
        """`fail`, but nobody is told except those whose writes had not landed."""
        self._end("the link was closed here", tell=False)

    # ------------------------------------------------------------------ inside

    def _pump(self) -> None:
        """Launch what waits."""
        refused: list[tuple[OnDone, Failure]] = []
        broken = None
        with self._lock:
            while self._waiting and self._free and self._down is None:
                key, plan, on_done = self._waiting.popleft()
                launch = self._free.pop()
                launch.on_done = on_done
                try:
                    failure = self._launch(launch, key, plan)
                except Exception as failed:  # whatever it is, the write must not be left hanging
                    if not isinstance(failed, TransportError):
                        log.exception("%s: the rail is given up", self.name)
                    broken = f"cuda_ipc: {failed}"
                    self._waiting.appendleft((key, plan, on_done))
                    break  # a part of it may be under way: its table must not be written anew
                if failure is None:
                    self._flying.put(launch)
                else:
                    self._free.append(launch)
                    refused.append((on_done, failure))
        for on_done, failure in refused:
            _call(on_done, failure)
        if broken is not None:
            self.fail(broken)

    def _launch(self, launch: _Launch, key: int, plan: CopyPlan) -> Failure | None:
        """Enqueue a write on the stream; why it must not be, if so."""
        if not self._local().cover(*plan.reads()):
            return Failure("cuda_ipc: the source is no registered GPU memory: register it", retry=False)
        try:
            placed = self._imports.place(plan)
        except TransportError as outside:
            return Failure(str(outside), retry=False)
        stream = self._stream.handle
        with self._context:
            for event in plan.after:
                self._stream.wait(event)  # type: ignore[arg-type]
            nbytes = whole_bytes(placed)
            if self._policy.takes_kernel(placed, nbytes):
                entered = self._scattered(launch, key, placed, stream)
            else:
                entered = self._copied(key, placed, stream)
            if not entered:
                return _NOT_GRANTED
            launch.event.record(stream)
        return None

    def _scattered(self, launch: _Launch, key: int, plan: CopyPlan, stream: int) -> bool:
        launch.refused[0] = 0
        gate = self._visitor.kernel(key, launch.status)
        if gate is None:
            return False
        n = plan.length.size
        total = fill_table(launch.table(n), plan.src, plan.dst, plan.length)
        table = launch.device.address
        copy_async(table, launch.host.address, 24 * n + 8, stream)
        width = width_of(plan.src, plan.dst, plan.length, plan.tile)
        blocks = self._policy.blocks
        self._scatter.launch(table, n, total, width, stream, blocks=blocks, tile=plan.tile, gate=gate)
        return True

    def _copied(self, key: int, plan: CopyPlan, stream: int) -> bool:
        if not self._visitor.begin_copy(key):
            return False
        copy_batch_async(plan.dst, plan.src, plan.length, stream)
        call("cuStreamWriteValue64", stream, self._visitor.copy_done, self._visitor.copy_number, 0)
        return True

    def _run(self) -> None:
        """The rail's thread: ends writes in the order of the stream."""
        with self._context:
            while (launch := self._flying.get()) is not None:
                try:
                    launch.event.synchronize()
                except TransportError as failed:
                    self._finish(launch, Failure(f"cuda_ipc: {failed}", retry=True))
                    self.fail(f"cuda_ipc: {failed}")
                    continue
                refused = int(launch.refused[0])
                self._finish(launch, _NOT_GRANTED if refused else None)
            self._shut_down()

    def _finish(self, launch: _Launch, failure: Failure | None) -> None:
        on_done = launch.on_done
        with self._lock:
            launch.refused[0] = 0
            self._free.append(launch)
        _call(on_done, failure)
        if self._waiting:
            self._pump()

    def _end(self, reason: str, *, tell: bool) -> None:
        with self._lock:
            if self._down is not None:
                return
            self._down, self._tell = reason, tell
            waiting, self._waiting = list(self._waiting), deque()
            self._flying.put(None)
        for _, _, on_done in waiting:
            _call(on_done, Failure(reason, retry=True))

    def _shut_down(self) -> None:
        """All launches have ended, or the device is lost."""
        with contextlib.suppress(TransportError):
            self._stream.synchronize()
        assert self._down is not None
        if self._tell:
            log.warning("%s: %s", self.name, self._down)
            self._on_broken(self._down)
        closers = (
            self._visitor.close,
            self._imports.close,
            self._stream.close,
            self._status.close,
            *(launch.close for launch in self._launches),
        )
        for close in closers:
            with contextlib.suppress(TransportError):
                close()
        self._on_fenced()


def _nobody(failure: Failure | None) -> None: ...


_NOT_GRANTED = Failure("cuda_ipc: the target took its grant back", retry=False)


def _call(on_done: OnDone, failure: Failure | None) -> None:
    try:
        on_done(failure)
    except Exception:
        log.exception("a listener failed; the rail goes on")
