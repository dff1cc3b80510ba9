"""A GPU made of host memory which sockets can't touch: at its address they find no access."""

import contextlib
import ctypes
import mmap
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region, U64Array

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)


class FakeGpu:
    """A `Device` with memory of its own.

    Args:
        copy_s: how long a batch of copies takes.

    Attributes:
        region: its memory.
        memory: uint8 [nbytes], the same as nobody but the device can reach it.
        open: while it is not set, copies wait.
        fails: copies are refused from now on.
        alive: buffers, streams and events that were not closed.
        batches: batches of copies so far, by their number of ranges.
        launches: likewise, of the kernel.
        compiles: the kernel can be had.
    """

    device = 0

    def __init__(self, nbytes: int, copy_s: float = 0.0) -> None:
        fd = os.memfd_create("gpu")
        os.ftruncate(fd, nbytes)
        self.memory = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
        self.region = Region(_libc.mmap(None, nbytes, _PROT_NONE, mmap.MAP_SHARED, fd, 0), nbytes, "cuda:0")
        os.close(fd)
        self.open = threading.Event()
        self.open.set()
        self.copy_s = copy_s
        self.fails = False
        self.alive: set[object] = set()
        self.batches: list[int] = []
        self.launches: list[int] = []
        self.compiles = True
        self._context = threading.local()

    @contextlib.contextmanager
    def context_at(self, address: int) -> Iterator[object]:
        if not 0 <= address - self.region.address < self.region.length:
            raise TransportError("no memory of this GPU")
        self._context.current = True
        yield self
        self._context.current = False

    def Stream(self, context: object) -> "FakeStream":
        return FakeStream(self)

    def Event(self, context: object) -> "FakeEvent":
        return FakeEvent(self)

    def Pinned(self, nbytes: int, context: object) -> "FakePinned":
        return FakePinned(self, nbytes)

    def DeviceBuffer(self, nbytes: int, context: object) -> "FakePinned":
        return FakePinned(self, nbytes)

    def copy_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Of tables, at once: the fake reads them when the kernel is launched, not when it runs."""
        ctypes.memmove(dst, src, nbytes)

    def kernel(self, context: object) -> "FakeGpu":
        if not self.compiles:
            raise TransportError("no compiler")
        return self

    def launch(self, table: int, n: int, total: int, width: int, stream: int, *, blocks: int) -> None:
        assert self._context.current
        if self.fails:
            raise TransportError("cuLaunchKernel: planted")
        self.launches.append(n)
        words = np.ctypeslib.as_array((ctypes.c_uint64 * (3 * n)).from_address(table)).reshape(3, n)
        src, dst, end = words.copy()
        length = np.diff(end, prepend=np.uint64(0))
        assert int(end[-1]) == total
        assert not int(np.bitwise_or.reduce(src | dst | length)) % width
        both = self._inside(src) & self._inside(dst)
        for place in np.where(self._inside(src), dst, src)[~both]:  # the other end is page-locked
            assert any(thing.holds(int(place)) for thing in self.alive if isinstance(thing, FakePinned))
        assert (self._inside(src) | self._inside(dst)).all()
        self._enqueue(dst, src, length, stream)

    def copy_batch_async(self, dst: U64Array, src: U64Array, length: U64Array, stream: int) -> None:
        assert self._context.current
        if self.fails:
            raise TransportError("cuMemcpyBatchAsync: planted")
        self.batches.append(dst.size)
        assert (self._inside(src) | self._inside(dst)).all()
        self._enqueue(dst, src, length, stream)

    def _enqueue(self, dst: U64Array, src: U64Array, length: U64Array, stream: int) -> None:
        ranges = list(zip(self._here(dst), self._here(src), length.tolist(), strict=True))
        FakeStream.by_handle[stream].put(lambda: self._copy(ranges))

    def _copy(self, ranges: list[tuple[int, int, int]]) -> None:
        self.open.wait()
        time.sleep(self.copy_s)
        for dst, src, nbytes in ranges:
            ctypes.memmove(dst, src, nbytes)

    def _inside(self, address: U64Array) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        return address - np.uint64(self.region.address) < np.uint64(self.region.length)  # wraps around

    def _here(self, address: U64Array) -> list[int]:
        here = address - np.uint64(self.region.address) + np.uint64(self.memory.ctypes.data)
        return np.where(self._inside(address), here, address).tolist()


class _Thing:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        gpu.alive.add(self)

    def close(self) -> None:
        self.gpu.alive.remove(self)


class FakePinned(_Thing):
    def __init__(self, gpu: FakeGpu, nbytes: int) -> None:
        super().__init__(gpu)
        self.array = np.zeros(nbytes, np.uint8)
        self.address: int = self.array.ctypes.data

    def holds(self, address: int) -> bool:
        return 0 <= address - self.address < self.array.size


class FakeEvent(_Thing):
    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(gpu)
        self.happened = threading.Event()
        self.handle = id(self)

    def record(self, stream: int) -> None:
        happened = self.happened = threading.Event()
        FakeStream.by_handle[stream].put(happened.set)

    def query(self) -> bool:
        return self.happened.is_set()

    def synchronize(self) -> None:
        assert self.happened.wait(20), "the copy never ended"


class FakeStream(_Thing):
    by_handle: dict[int, "FakeStream"] = {}  # noqa: RUF012

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(gpu)
        self.handle = id(self)
        self.by_handle[self.handle] = self
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put = self._todo.put
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self, event: FakeEvent) -> None:
        self.put(event.happened.wait)

    def synchronize(self) -> None:
        done = threading.Event()
        self.put(done.set)
        assert done.wait(20), "the stream never ended"

    def close(self) -> None:
        super().close()
        self.put(None)

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            work()
