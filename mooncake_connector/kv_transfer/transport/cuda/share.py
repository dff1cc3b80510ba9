"""GPU memory that another process of the host may open: by CUDA IPC handle, or by file descriptor where the
allocation was made with the driver's virtual memory calls (expandable segments, sleep mode).
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Ranges, Region
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.cuda.driver import Context, bindings, call

PIECE = 2 << 20
"""The granularity of virtual memory on all devices."""

_SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


class Allocation(msgspec.Struct, frozen=True):
    """A piece of a process's GPU memory as another process can open it.

    Attributes:
        base: its address in the owner.
        handle: of CUDA IPC; empty if there is `fd`.
        fd: the owner's file descriptor for it; -1 if there is `handle`.
    """

    base: int
    nbytes: int
    handle: bytes = b""
    fd: int = -1


class Exports:
    """What this process lets others open: the GPU memory that was registered. All of one device.

    Attributes:
        context: of that device; None while there is no GPU memory.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self._lock = threading.Lock()
        self._regions: set[Region] = set()
        self._allocations: dict[int, Allocation] = {}
        self.ranges = _no_ranges()

    def add(self, region: Region) -> None:
        """Export a region of GPU memory.

        Raises:
            TransportError: The driver won't, or it is another device's memory.
        """
        with self._lock:
            context = Context.of(int(region.location.partition(":")[2]))
            if self.context not in (None, context):
                raise TransportError(
                    f"{region} is not on cuda:{self.context.device} as what was registered before: "
                    "take one transfer engine per GPU"
                )
            at, end = region.address, region.address + region.length
            with context:
                while at < end:
                    if (known := self._at(at)) is None:
                        for made in _export(at, end):
                            self._allocations.setdefault(made.base, made)
                        known = self._at(at)
                    if known is None:
                        raise TransportError(f"{at:#x} is no GPU memory that could be shared")
                    at = known.base + known.nbytes
            self.context = context
            self._regions.add(region)
            self._refresh()

    def remove(self, region: Region) -> None:
        """Forget a region; what others have opened stays open there."""
        with self._lock:
            self._regions.discard(region)
            self._refresh()
            for base, allocation in list(self._allocations.items()):
                if not any(
                    r.address < base + allocation.nbytes and base < r.address + r.length
                    for r in self._regions
                ):
                    del self._allocations[base]
                    if allocation.fd >= 0:
                        os.close(allocation.fd)

    def allocations(self) -> tuple[Allocation, ...]:
        with self._lock:
            return tuple(self._allocations.values())

    def close(self) -> None:
        for region in list(self._regions):
            self.remove(region)

    def _at(self, address: int) -> Allocation | None:
        for allocation in self._allocations.values():
            if allocation.base <= address < allocation.base + allocation.nbytes:
                return allocation
        return None

    def _refresh(self) -> None:
        regions = list(self._regions)
        self.ranges = Ranges.of(
            np.array([r.address for r in regions], np.uint64),
            np.array([r.length for r in regions], np.uint64),
        )


def _no_ranges() -> Ranges:
    empty = np.empty(0, np.uint64)
    return Ranges(empty, empty)


def _export(address: int, end: int) -> Iterator[Allocation]:
    """The allocation that holds an address; of virtual memory all those up to `end`."""
    driver = bindings()
    attribute = driver.CUpointer_attribute
    base = int(call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address))
    nbytes = int(call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address))
    if call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, address):
        yield Allocation(base, nbytes, handle=bytes(call("cuIpcGetMemHandle", base).reserved))
        return
    posix = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    try:
        for at, size, handle in _mappings(address, end, base):
            try:
                fd = int(call("cuMemExportToShareableHandle", handle, posix, 0))
            finally:
                call("cuMemRelease", handle)
            yield Allocation(at, size, fd=fd)
    except TransportError as refused:
        raise TransportError(
            f"GPU memory at {address:#x} can't be shared with other processes: {refused}; "
            "allocate KV with cudaMalloc (PYTORCH_CUDA_ALLOC_CONF without expandable_segments, no sleep mode)"
        ) from refused


def _mappings(address: int, end: int, lowest: int) -> Iterator[tuple[int, int, Any]]:
    """Address, size and handle of each piece of memory that is mapped from an address up to `end`.

    The driver tells the extent of virtual memory, of which parts may not be mapped, and not of each piece.
    """
    at = address // PIECE * PIECE
    held = call("cuMemRetainAllocationHandle", at)
    begin = at
    while begin > lowest and _same(held, begin - PIECE):
        begin -= PIECE
    at += PIECE
    while True:
        while _same(held, at):
            at += PIECE
        yield begin, at - begin, held
        if at >= end:
            return
        begin, held = at, call("cuMemRetainAllocationHandle", at)


def _same(held: Any, at: int) -> bool:
    """Whether the piece of memory that is mapped at an address is that of a handle."""
    try:
        handle = call("cuMemRetainAllocationHandle", at)
    except TransportError:
        return False  # nothing is mapped there
    call("cuMemRelease", handle)
    return int(handle) == int(held)


class Imports:
    """One peer's allocations, opened for the device of `context`: where the peer's addresses are here.

    Args:
        pid: of the peer.

    Raises:
        TransportError: One can't be opened; none is left open then.
    """

    def __init__(self, pid: int, allocations: Sequence[Allocation], context: Context) -> None:
        self._context = context
        self._opened: list[_Opened] = []
        ordered = sorted(allocations, key=lambda a: a.base)
        try:
            with context:
                for allocation in ordered:
                    self._opened.append(_open(pid, allocation, context))
        except TransportError:
            self.close()
            raise
        self._base = np.array([a.base for a in ordered], np.uint64)
        self._end = np.array([a.base + a.nbytes for a in ordered], np.uint64)
        # Unsigned arithmetic wraps, so a negative distance is as good as a positive one.
        here = np.array([opened.address for opened in self._opened], np.uint64)
        self._shift = here - self._base

    def place(self, plan: CopyPlan) -> CopyPlan:
        """`plan` with targets as they are mapped here; ranges that meet two allocations are cut.

        Raises:
            TransportError: A target lies outside what the peer let be opened.
        """
        if not plan.dst.size:
            return plan
        address, length = plan.writes()
        end = address + length
        if self._base.size == 1:
            if address.min() < self._base[0] or end.max() > self._end[0]:
                raise _outside(plan)
            return msgspec.structs.replace(plan, dst=plan.dst + self._shift[0])
        at = np.searchsorted(self._base, address, side="right") - 1
        if (at < 0).any():
            raise _outside(plan)
        over = end > self._end[at]
        if over.any():
            # A tile may lie across two allocations although none of its runs does; runs can be cut.
            return self.place(plan.flat() if plan.tile is not None else self._cut(plan, at, over))
        return msgspec.structs.replace(plan, dst=plan.dst + self._shift[at])

    def _cut(self, plan: CopyPlan, at: NDArray[np.int64], over: NDArray[np.bool_]) -> CopyPlan:
        """Cut ranges at the end of the allocation they begin in, which must go on in another one."""
        if (plan.dst >= self._end[at]).any():
            raise _outside(plan)
        head = np.where(over, self._end[at] - plan.dst, plan.length)
        tail = plan.length - head
        parts = [
            np.stack((whole, whole + more), 1).ravel() for whole, more in ((plan.src, head), (plan.dst, head))
        ]
        length = np.stack((head, tail), 1).ravel()
        keep = length > 0
        return CopyPlan(parts[0][keep], parts[1][keep], length[keep], after=plan.after)

    def close(self) -> None:
        """Close all, in the order opposite to opening."""
        with self._context:
            while self._opened:
                opened = self._opened.pop()
                with contextlib.suppress(TransportError):
                    opened.close()


def _outside(plan: CopyPlan) -> TransportError:
    return TransportError(
        f"cuda_ipc: a write of {plan.nbytes} bytes leaves the memory that the target shares: connect anew"
    )


class _Opened:
    """A mapping of one allocation of another process. Those of CUDA IPC exist once per process."""

    def __init__(self, address: int, nbytes: int, key: bytes) -> None:
        self.address, self._nbytes, self._key = address, nbytes, key

    def close(self) -> None:
        if self._key:
            with _LOCK:
                address, users = _BY_HANDLE[self._key]
                if users > 1:
                    _BY_HANDLE[self._key] = address, users - 1
                    return
                del _BY_HANDLE[self._key]
                call("cuIpcCloseMemHandle", address)
        elif self._nbytes:
            call("cuMemUnmap", self.address, self._nbytes)
            call("cuMemAddressFree", self.address, self._nbytes)


_LOCK = threading.Lock()
_BY_HANDLE: dict[bytes, tuple[int, int]] = {}


def _open(pid: int, allocation: Allocation, context: Context) -> _Opened:
    if pid == os.getpid():
        return _Opened(allocation.base, 0, b"")
    if allocation.handle:
        with _LOCK:
            key = context.device.to_bytes(4, "little") + allocation.handle
            address, users = _BY_HANDLE.get(key, (0, 0))
            if not users:
                handle = bindings().CUipcMemHandle()
                handle.reserved = allocation.handle
                lazily_enable_peer_access = 1
                address = int(call("cuIpcOpenMemHandle", handle, lazily_enable_peer_access))
            _BY_HANDLE[key] = address, users + 1
        return _Opened(address, allocation.nbytes, key)
    return _Opened(_import(pid, allocation, context), allocation.nbytes, b"")


def _import(pid: int, allocation: Allocation, context: Context) -> int:
    driver = bindings()
    posix = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    fd = _fetch(pid, allocation.fd)
    try:
        handle = call("cuMemImportFromShareableHandle", fd, posix)
    finally:
        os.close(fd)
    try:
        address = int(call("cuMemAddressReserve", allocation.nbytes, 0, 0, 0))
        call("cuMemMap", address, allocation.nbytes, 0, handle, 0)
    finally:
        call("cuMemRelease", handle)  # the mapping keeps the memory
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = context.device
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call("cuMemSetAccess", address, allocation.nbytes, [access], 1)
    return address


def _fetch(pid: int, fd: int) -> int:
    """A duplicate of another process's file descriptor."""
    pidfd = os.pidfd_open(pid)
    try:
        got: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if got < 0:
        raise TransportError(
            f"process {pid} lets no other process take its GPU memory's descriptor: "
            f"{os.strerror(ctypes.get_errno())}; run both as one user, with kernel.yama.ptrace_scope=0"
        )
    return got
