"""Memory as the transfer engine names it: where it is, and which byte ranges of it."""

from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import ConfigError

U64Array = NDArray[np.uint64]


class Region(msgspec.Struct, frozen=True):
    """A contiguous piece of one process's memory.

    Attributes:
        address: first byte, a virtual address in the owning process.
        length: bytes.
        location: ``cpu:0`` (NUMA node 0), ``cuda:1``, ...
    """

    address: int
    length: int
    location: str = "cpu:0"

    @property
    def on_gpu(self) -> bool:
        return self.location.startswith("cuda:")


class Ranges(msgspec.Struct, frozen=True, eq=False):
    """Sorted, disjoint byte ranges of one process's memory.

    Attributes:
        start: uint64 [n], first byte of each range, ascending.
        end: uint64 [n], one past the last byte.
    """

    start: U64Array
    end: U64Array

    @classmethod
    def of(cls, address: U64Array, length: U64Array) -> Self:
        """Sort and merge ``[address, address + length)``; overlapping and adjacent ones become one.

        Takes arrays of shape [n] of any integer type; empty ranges are left out.
        """
        at, size = np.asarray(address, np.uint64), np.asarray(length, np.uint64)
        at, size = at[size > 0], size[size > 0]
        order = np.argsort(at, kind="stable")
        start = at[order]
        end = start + size[order]
        if start.size == 0:
            return cls(start, end)
        reach = np.maximum.accumulate(end)
        first = np.concatenate(([True], start[1:] > reach[:-1]))
        last = np.concatenate((first[1:], [True]))
        return cls(start[first], reach[last])

    def cover(self, address: U64Array, length: U64Array) -> bool:
        """Whether every ``[address, address + length)`` lies inside one of these ranges."""
        if address.size == 0:
            return True
        if self.start.size == 0:
            return False
        at = np.searchsorted(self.start, address, side="right")
        if not at.all():
            return False
        end = address + length
        return bool((end <= self.end[at - 1]).all() and (end >= address).all())

    @property
    def nbytes(self) -> int:
        """Bytes in all ranges."""
        return int((self.end - self.start).sum())


def region_of(memory: Any) -> Region:
    """The memory of a `Region`, a torch tensor, or anything with the buffer protocol (numpy, bytearray).

    Raises:
        ConfigError: It is not contiguous, or no memory at all.
    """
    if isinstance(memory, Region):
        return memory
    if hasattr(memory, "data_ptr"):
        if not memory.is_contiguous():
            raise ConfigError("the tensor is not contiguous: call .contiguous(), or plan its ranges yourself")
        location = "cpu:0" if memory.device.type == "cpu" else f"{memory.device.type}:{memory.device.index}"
        return Region(memory.data_ptr(), memory.numel() * memory.element_size(), location)
    try:
        array = np.frombuffer(memory, np.uint8)
    except (TypeError, ValueError, BufferError) as bad:
        raise ConfigError(f"{type(memory).__name__} is no contiguous memory: {bad}") from bad
    return Region(array.ctypes.data, array.nbytes)
