"""System calls that move many ranges at once, by ctypes: no Python object per range, the GIL released."""

import ctypes
import errno
import os
from array import array
from typing import NoReturn, Protocol

import numpy as np

from mooncake_connector.kv_transfer.memory import U64Array

IOV_MAX = 1024
"""Ranges that the kernel takes in one call."""

MSG_DONTWAIT = 0x40
MSG_NOSIGNAL = 0x4000
_PR_SET_PTRACER = 0x59616D61

_libc = ctypes.CDLL(None, use_errno=True)


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc.sendmsg.argtypes = _libc.recvmsg.argtypes = (ctypes.c_int, ctypes.POINTER(_MsgHdr), ctypes.c_int)
_libc.sendmsg.restype = _libc.recvmsg.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = _libc.process_vm_writev.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.restype = _libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


class Cursor(Protocol):
    """What is left of some memory ranges, for calls that move some of their bytes at a time.

    Attributes:
        left: bytes still to move.
        iov: address of the next ``struct iovec``.
        count: how many of them the next call may use.
    """

    @property
    def left(self) -> int: ...

    @property
    def iov(self) -> int: ...

    @property
    def count(self) -> int: ...

    def advance(self, nbytes: int) -> None:
        """Step over `nbytes` that were moved."""


class Scatter:
    """A cursor over any number of ranges.

    Args:
        address: uint64 [n].
        length: uint64 [n], bytes, each > 0.
    """

    def __init__(self, address: U64Array, length: U64Array) -> None:
        self._iov = np.empty((length.size, 2), np.uint64)
        self._iov[:, 0] = address
        self._iov[:, 1] = length
        self._end = np.cumsum(length, dtype=np.int64)
        self._at = 0
        self._base = self._iov.ctypes.data
        self._done = 0
        self._total = int(self._end[-1]) if length.size else 0

    @property
    def left(self) -> int:
        return self._total - self._done

    @property
    def iov(self) -> int:
        return self._base + 16 * self._at

    @property
    def count(self) -> int:
        return min(IOV_MAX, len(self._end) - self._at)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._done >= self._total:
            self._at = len(self._end)
            return
        self._at = at = int(np.searchsorted(self._end, self._done, side="right"))
        left = int(self._end[at]) - self._done
        row = self._iov[at]
        row[0] += row[1] - np.uint64(left)
        row[1] = left


class Few:
    """A cursor over a range or two: made in a tenth of the time.

    Args:
        ranges: address and length of each.
    """

    __slots__ = ("_iov", "count", "iov", "left")

    def __init__(self, *ranges: int) -> None:
        self._iov = array("Q", ranges)
        self.iov: int = self._iov.buffer_info()[0]
        self.count = len(ranges) // 2
        self.left = sum(ranges[1::2])

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        while nbytes:
            at = len(self._iov) - 2 * self.count
            step = min(nbytes, self._iov[at + 1])
            nbytes -= step
            self._iov[at] += step
            self._iov[at + 1] -= step
            if not self._iov[at + 1]:
                self.count -= 1
                self.iov += 16


def send(fd: int, data: Cursor, flags: int = 0) -> int:
    """``sendmsg`` of the next ranges: bytes sent.

    Raises:
        OSError: As sendmsg; BlockingIOError if it would block.
    """
    head = _MsgHdr(iov=data.iov, iovlen=data.count)
    return _retried(_libc.sendmsg, fd, ctypes.byref(head), flags | MSG_NOSIGNAL)


def receive(fd: int, into: Cursor, flags: int = 0) -> int:
    """``recvmsg`` into the next ranges: bytes received, 0 at the end of the stream.

    Raises:
        OSError: As recvmsg; BlockingIOError if it would block.
    """
    head = _MsgHdr(iov=into.iov, iovlen=into.count)
    return _retried(_libc.recvmsg, fd, ctypes.byref(head), flags)


def read_process(pid: int, into: Cursor, source: Cursor) -> int:
    """``process_vm_readv`` of the next ranges of another process: bytes read.

    Raises:
        OSError: EPERM (not allowed), ESRCH (no such process), EFAULT (address not mapped).
    """
    moved: int = _libc.process_vm_readv(pid, into.iov, into.count, source.iov, source.count, 0)
    return moved if moved >= 0 else _raise()


def write_process(pid: int, source: Cursor, into: Cursor) -> int:
    """``process_vm_writev`` into the next ranges of another process: bytes written.

    Raises:
        OSError: As `read_process`.
    """
    moved: int = _libc.process_vm_writev(pid, source.iov, source.count, into.iov, into.count, 0)
    return moved if moved >= 0 else _raise()


def set_ptracer(pid: int) -> None:
    """Name the one process that Yama shall let read this one's memory; does nothing where Yama is absent."""
    _libc.prctl(_PR_SET_PTRACER, pid, 0, 0, 0)


def _retried(call: "ctypes._NamedFuncPointer", *args: object) -> int:
    while True:
        moved: int = call(*args)
        if moved >= 0:
            return moved
        if ctypes.get_errno() != errno.EINTR:
            _raise()


def _raise() -> NoReturn:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
