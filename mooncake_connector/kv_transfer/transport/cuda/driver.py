"""A thin face on the CUDA driver (``cuda.bindings``): contexts, streams, events, page-locked memory, copies.

Nothing here runs unless somebody has GPU memory: the driver must not be initialised in processes that fork.
Every call raises `TransportError` with the driver's name for what went wrong.
"""

import ctypes
import functools
import threading
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array

_MEND = "install a driver of CUDA 12.8 or newer and pip install 'mooncake-connector[cuda]'"


@functools.cache
def available() -> str | None:
    """Why CUDA can't be used in this process; None if it can."""
    try:
        driver = bindings()
        _check(driver.cuInit(0))
        count = _check(driver.cuDeviceGetCount())
    except TransportError as missing:
        return str(missing)
    return None if count else "no CUDA device is visible (CUDA_VISIBLE_DEVICES?)"


@functools.cache
def bindings() -> Any:
    """``cuda.bindings.driver``.

    Raises:
        TransportError: It isn't installed, or there is no driver.
    """
    try:
        from cuda.bindings import driver
    except (ImportError, RuntimeError) as missing:
        raise TransportError(f"no CUDA here: {missing}; {_MEND}") from missing
    return driver


def call(name: str, *args: Any) -> Any:
    """Call a driver function; its one result, a tuple of several, or None."""
    try:
        return _check(getattr(bindings(), name)(*args))
    except TransportError as failed:
        raise TransportError(f"{name}: {failed}") from None
    except RuntimeError as missing:  # the function, or the whole driver
        raise TransportError(f"{name}: {missing}; {_MEND}") from missing


def _check(result: Any) -> Any:
    error, *values = result
    if int(error):
        raise TransportError(str(getattr(error, "name", error)))
    return values[0] if len(values) == 1 else tuple(values) if values else None


class Context:
    """A device's primary context, which all libraries of a process share. ``with`` makes it current."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.handle: Any = call("cuDevicePrimaryCtxRetain", device)

    @staticmethod
    @functools.cache
    def of(device: int) -> "Context":
        """Of device number `device`, as this process counts them."""
        if (reason := available()) is not None:
            raise TransportError(reason)
        return Context(device)

    def __enter__(self) -> Self:
        call("cuCtxPushCurrent", self.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call("cuCtxPopCurrent")


def context_at(address: int) -> Context:
    """The context of the device whose memory this is."""
    if (reason := available()) is not None:
        raise TransportError(reason)
    device = ctypes.c_int(-1)
    ordinal = bindings().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    # cuda.bindings 13.3 answers 0 for the memory of every device.
    get = _function(b"cuPointerGetAttribute", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    if error := get(ctypes.addressof(device), int(ordinal), address):
        raise TransportError(f"cuPointerGetAttribute: error {error}: {address:#x} is no GPU's memory")
    return Context.of(device.value)


class Event:
    """A moment in a stream. Recorded anew it names the later moment; waits begun before are not affected."""

    def __init__(self, context: Context) -> None:
        flags = bindings().CUevent_flags
        self.context = context
        with context:
            self._event = call(
                "cuEventCreate",
                int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_BLOCKING_SYNC),
            )
        self.handle = int(self._event)

    def record(self, stream: int) -> None:
        """After all that `stream` (a CUstream's value) has been given. Of the current context."""
        error = bindings().cuEventRecord(self._event, stream)[0]
        if int(error):
            raise TransportError(f"cuEventRecord: {error.name}")

    def query(self) -> bool:
        """Whether it has happened."""
        error = bindings().cuEventQuery(self._event)[0]
        if int(error) not in (0, int(bindings().CUresult.CUDA_ERROR_NOT_READY)):
            raise TransportError(f"cuEventQuery: {error.name}")
        return not int(error)

    def synchronize(self) -> None:
        """Wait for it, asleep; other Python threads run."""
        call("cuEventSynchronize", self._event)

    def close(self) -> None:
        call("cuEventDestroy", self._event)


class Stream:
    """A stream that doesn't wait for the default stream.

    Args:
        urgent: its kernels are scheduled before those of ordinary streams.
    """

    def __init__(self, context: Context, *, urgent: bool = False) -> None:
        self.context = context
        with context:
            _, greatest = call("cuCtxGetStreamPriorityRange")
            non_blocking = int(bindings().CUstream_flags.CU_STREAM_NON_BLOCKING)
            self._stream = call("cuStreamCreateWithPriority", non_blocking, greatest if urgent else 0)
        self.handle = int(self._stream)

    def wait(self, event: Event) -> None:
        """What the stream is given from now on runs after `event`, as it was recorded last."""
        call("cuStreamWaitEvent", self._stream, event.handle, 0)

    def synchronize(self) -> None:
        call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        call("cuStreamDestroy", self._stream)


class Pinned:
    """Page-locked host memory that every device of this process can reach.

    Attributes:
        address: the same for the host and, by unified addressing, for devices.
        array: uint8 [nbytes].
    """

    def __init__(self, nbytes: int, context: Context) -> None:
        portable_mapped = 0x01 | 0x02
        with context:
            self.address = int(call("cuMemHostAlloc", nbytes, portable_mapped))
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * nbytes).from_address(self.address)
        )
        self.array[:] = 0

    def close(self) -> None:
        call("cuMemFreeHost", self.address)


class HostRegistration:
    """Makes a mapped file of this process reachable for a device.

    Attributes:
        device_address: by which kernels reach the first byte.
    """

    def __init__(self, address: int, nbytes: int, context: Context) -> None:
        self._address = address
        portable_mapped = 0x01 | 0x02
        with context:
            call("cuMemHostRegister", address, nbytes, portable_mapped)
            self.device_address = int(call("cuMemHostGetDevicePointer", address, 0))

    def close(self) -> None:
        call("cuMemHostUnregister", self._address)


class DeviceBuffer:
    """Plain device memory."""

    def __init__(self, nbytes: int, context: Context) -> None:
        with context:
            self.address = int(call("cuMemAlloc", nbytes))

    def close(self) -> None:
        call("cuMemFree", self.address)


def copy_async(dst: int, src: int, nbytes: int, stream: int) -> None:
    """Copy between any two kinds of memory, in `stream`'s order. Needs a current context."""
    call("cuMemcpyAsync", dst, src, nbytes, stream)


def copy_batch_async(dst: U64Array, src: U64Array, length: U64Array, stream: int) -> None:
    """Copy many ranges by the copy engines, in `stream`'s order, in any order among themselves.

    Costs about 1 us of this thread per range, without the interpreter's lock. Needs a current context.

    Args:
        dst, src: uint64 [n], addresses of device or page-locked memory.
        length: uint64 [n], bytes.
    """
    if dst.size == 1:
        copy_async(int(dst[0]), int(src[0]), int(length[0]), stream)
        return
    if not dst.size:
        return
    d, s, n = (np.ascontiguousarray(a, np.uint64) for a in (dst, src, length))
    failed = ctypes.c_size_t(0)
    zero = ctypes.c_size_t(0)
    error = _batch_function()(
        d.ctypes.data, s.ctypes.data, n.ctypes.data, d.size,
        ctypes.addressof(_IN_STREAM_ORDER), ctypes.addressof(zero), 1, ctypes.addressof(failed), stream,
    )  # fmt: skip
    if error:
        raise TransportError(f"cuMemcpyBatchAsync: error {error} at range {failed.value} of {d.size}")


# CUmemcpyAttributes: srcAccessOrder (1 = stream order), two location hints of 8 bytes, flags (1 = rather
# overlap with computation).
_IN_STREAM_ORDER = (ctypes.c_uint32 * 6)(1, 0, 0, 0, 0, 1)


def _batch_function() -> Any:
    # cuda.bindings wants lists of Python objects, which cost more than the copies.
    p, size = ctypes.c_void_p, ctypes.c_size_t
    return _function(b"cuMemcpyBatchAsync", p, p, p, size, p, p, size, p, p)


@functools.cache
def _function(name: bytes, *arguments: Any) -> Any:
    """A driver function as it was in CUDA 12.8, called without the interpreter's lock; gives a CUresult."""
    pointer, _ = call("cuGetProcAddress", name, 12080, 0)
    return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(int(pointer))


_BARRIER = threading.Lock()


def full_barrier() -> None:
    """No load after it is done before the stores before it are visible to other processes."""
    with _BARRIER:  # a locked instruction on x86, acquire and release of it on ARM with its full barrier
        pass
