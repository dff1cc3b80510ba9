"""Page-locked buffers of one connection, and what moves bytes between them and a GPU's memory."""

import contextlib
import ctypes
import logging
from collections import deque
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.cuda import driver
from mooncake_connector.kv_transfer.transport.cuda.kernel import Scatter, fill_table, width_of

KERNEL_RANGES = 16
"""More than so many ranges go by the kernel: copy engines cost the submitting thread 1 us for each."""

KERNEL_BLOCKS = 4
"""Multiprocessors that the kernel takes from the model; they move several times what a socket does."""

_TABLE_BYTES = 24 * wire.MAX_FRAME_RANGES + 8

log = logging.getLogger(__name__)


class Device(Protocol):
    """What is needed of GPUs; `Cuda` is the real one, `transport.cuda.driver` documents it."""

    def context_at(self, address: int, /) -> contextlib.AbstractContextManager[Any]: ...

    def Stream(self, context: Any, /) -> Any: ...

    def Event(self, context: Any, /) -> Any: ...

    def Pinned(self, nbytes: int, context: Any, /) -> Any: ...

    def DeviceBuffer(self, nbytes: int, context: Any, /) -> Any: ...

    def copy_async(self, dst: int, src: int, nbytes: int, stream: int, /) -> None: ...

    def copy_batch_async(self, dst: U64Array, src: U64Array, length: U64Array, stream: int, /) -> None: ...

    def kernel(self, context: Any, /) -> Any:
        """What `transport.cuda.kernel.Scatter` is.

        Raises:
            TransportError: It can't be had.
        """


class Cuda:
    """The GPUs of this process."""

    context_at = staticmethod(driver.context_at)
    copy_async = staticmethod(driver.copy_async)
    copy_batch_async = staticmethod(driver.copy_batch_async)
    Stream = driver.Stream
    Event = driver.Event
    Pinned = driver.Pinned
    DeviceBuffer = driver.DeviceBuffer

    def kernel(self, context: driver.Context) -> Scatter:
        return Scatter.of(context.device)


class Memory(Protocol):
    """What is known of this process's memory; `Staging` documents it."""

    def on_gpu(self, address: U64Array, /) -> NDArray[np.bool_]: ...

    def reach(self, device: int, address: U64Array, length: U64Array, /) -> bool: ...


class Slot:
    """A buffer, and the last copy into it or out of it.

    Attributes:
        address: of its first byte.
        array: uint8 [n], the buffer.
    """

    def __init__(self, lane: "Lane", nbytes: int) -> None:
        device, context = lane.device, lane.context
        self._lane = lane
        self._copied = device.Event(context)
        self._memory = device.Pinned(nbytes, context)
        self._table = device.Pinned(_TABLE_BYTES, context)
        self._launched = device.DeviceBuffer(_TABLE_BYTES, context)
        self.address: int = self._memory.address
        self.array: NDArray[np.uint8] = self._memory.array

    def fill(self, plan: CopyPlan) -> None:
        """Begin to gather a plan's source, once what it waits for has happened.

        Raises:
            TransportError: The GPU refuses.
        """
        for event in plan.after:
            self._lane.stream.wait(event)
        places = places_of(plan.length) + np.uint64(self.address)
        merged = CopyPlan.of(plan.src, places, plan.length)
        self._copy(merged, self._lane.way(merged.src, merged.length))

    def empty(self, plan: CopyPlan, way: "Way") -> None:
        """Begin to put the buffer's bytes to where they belong.

        Args:
            plan: its sources are counted from anywhere, the first is the buffer's beginning.
            way: `Lane.way` of its targets, or of more.

        Raises:
            TransportError: The GPU refuses.
        """
        here = np.uint64(self.address) - plan.src[0]
        self._copy(CopyPlan(plan.src + here, plan.dst, plan.length), way)

    def wait(self) -> None:
        """Wait for the copy; on an own stream, that is milliseconds, and no other process can make it longer.

        Raises:
            TransportError: The GPU failed. Nothing of this process reaches it any more.
        """
        self._copied.synchronize()

    def done(self) -> bool:
        """Whether `wait` would not.

        Raises:
            TransportError: The GPU failed.
        """
        return bool(self._copied.query())

    def close(self) -> None:
        for thing in (self._copied, self._memory, self._table, self._launched):
            thing.close()

    def _copy(self, plan: CopyPlan, way: "Way") -> None:
        stream = self._lane.stream
        if way is Way.MIXED:
            plan = self._lane.copied_here(plan)
        src, dst, length = plan.src, plan.dst, plan.length
        n = length.size
        try:
            if way is Way.KERNEL and n > KERNEL_RANGES and width_of(src, dst, length, None) == 16:
                table = self._table.array[: 24 * n + 8].view(np.uint64)
                total = fill_table(table, src, dst, length)
                at = self._launched.address
                self._lane.device.copy_async(at, self._table.address, table.nbytes, stream.handle)
                self._lane.kernel.launch(at, n, total, 16, stream.handle, blocks=KERNEL_BLOCKS)
            else:
                self._lane.device.copy_batch_async(dst, src, length, stream.handle)
            self._copied.record(stream.handle)
        except TransportError:
            stream.synchronize()  # a part of it may be under way, which the event would not tell
            raise


class Way(Enum):
    """How ranges get into a buffer or out of it."""

    KERNEL = auto()  # if they are many, even of a part of them
    ENGINES = auto()
    MIXED = auto()  # some are not a GPU's at all


class Lane:
    """One connection's buffers in one direction. Belongs to the thread that makes it.

    Args:
        address: of memory (uint64 [n]), some of it of the device that this is for.

    Attributes:
        slots: the buffers, to be taken in turn.
        kernel: to be launched on `stream`, if it can be had.

    Raises:
        TransportError: The GPU's driver refuses; the message has the mend.
    """

    def __init__(self, device: Device, memory: Memory, address: U64Array, nbytes: int, count: int) -> None:
        self.device, self._memory = device, memory
        self._stack = contextlib.ExitStack()
        first = int(address[memory.on_gpu(address)][0])
        try:
            self.context = self._stack.enter_context(device.context_at(first))
            self.kernel = _kernel(device, self.context)
            self.stream = device.Stream(self.context)
            self._stack.callback(self.stream.close)
            self.slots = deque[Slot]()
            for _ in range(count):
                self.slots.append(Slot(self, nbytes))
                self._stack.callback(self.slots[-1].close)
            self._stack.callback(self.stream.synchronize)
        except TransportError as failed:
            self.close()
            raise TransportError(
                f"can't stage GPU memory at {first:#x} in {count} buffers of {nbytes >> 20} MiB: {failed}"
            ) from failed

    def way(self, address: U64Array, length: U64Array) -> Way:
        """How these ranges (uint64 [n]) are to be moved."""
        if not self._memory.on_gpu(address).all():
            return Way.MIXED
        # Copy engines know what they touch. The kernel must not touch what is another device's.
        many = self.kernel is not None and length.size > KERNEL_RANGES
        if many and self._memory.reach(self.context.device, address, length):
            return Way.KERNEL
        return Way.ENGINES

    def copied_here(self, plan: CopyPlan) -> CopyPlan:
        """Copy what no GPU has a part in: what is left of the plan."""
        gpu = self._memory.on_gpu(plan.src) | self._memory.on_gpu(plan.dst)
        here = (each[~gpu].tolist() for each in (plan.dst, plan.src, plan.length))
        for dst, src, nbytes in zip(*here, strict=True):
            ctypes.memmove(dst, src, nbytes)
        return CopyPlan(plan.src[gpu], plan.dst[gpu], plan.length[gpu])

    def close(self) -> None:
        """Wait for the copies under way, and give everything back."""
        with contextlib.suppress(TransportError):
            self._stack.close()


def places_of(length: U64Array) -> U64Array:
    """Where ranges that lie end to end begin: uint64 [n]."""
    places: U64Array = np.cumsum(length, dtype=np.uint64) - length
    return places


def _kernel(device: Device, context: Any) -> Any:
    try:
        return device.kernel(context)
    except TransportError as missing:
        log.info("GPU memory is staged by copy engines alone: %s", missing)
        return None
