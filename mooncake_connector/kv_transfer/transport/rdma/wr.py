"""Work requests as arrays of the C structs themselves, made from a plan without an object per range."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan

WR_BYTES, SGE_BYTES = 128, 16

# enum values of the verbs ABI, which no version can change
WRITE, WRITE_WITH_IMM = 0, 1
SIGNALED = 2

WR_DTYPE = np.dtype(
    {
        "names": ["wr_id", "next", "sg_list", "num_sge", "opcode", "flags", "imm", "remote_addr", "rkey"],
        "formats": ["u8", "u8", "u8", "i4", "u4", "u4", ">u4", "u8", "u4"],
        "offsets": [0, 8, 16, 24, 28, 32, 36, 40, 48],
        "itemsize": WR_BYTES,
    }
)
"""``struct ibv_send_wr`` of 64-bit machines, as far as RDMA WRITE uses it (rdma-core, verbs.h)."""

SGE_DTYPE = np.dtype([("addr", "u8"), ("length", "u4"), ("lkey", "u4")])
"""``struct ibv_sge``."""


class OutsideError(TransportError):
    """A range is in no registered memory.

    Attributes:
        keys: of the side that lacks it.
    """

    def __init__(self, address: int, keys: "Keys") -> None:
        owner = "the target" if keys.remote else "this process"
        super().__init__(f"{address:#x} is in no region that {owner} has registered: register it")
        self.keys = keys


class Keys(msgspec.Struct, frozen=True, eq=False):
    """One side's registered regions as one NIC knows them, disjoint and ascending.

    Row 0 is an empty region at address 0, so that every address has a row at or below it.

    Attributes:
        start: int64 [1 + n], first byte of each region.
        end: int64 [1 + n], one past the last byte.
        shift: int64 [1 + n], from an address to what the NIC calls it: 0, or for a dma-buf down to an offset.
        key: uint32 [1 + n], lkey or rkey.
        remote: they are the target's.
    """

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    shift: NDArray[np.int64]
    key: NDArray[np.uint32]
    remote: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int]], *, remote: bool = False) -> Self:
        """From rows (first byte, length, what the NIC calls the first byte, key) in any order."""
        start, length, base, key = np.array([(0, 0, 0, 0), *sorted(rows)], np.int64).T
        return cls(start, start + length, base - start, key.astype(np.uint32), remote)

    def row(self, address: NDArray[np.int64]) -> NDArray[np.intp]:
        """Row [n] of the region that begins at or below each address [n]; it may end before."""
        return self.start.searchsorted(address, side="right") - 1

    def require(self, address: NDArray[np.int64]) -> None:
        """Raises OutsideError if an address [n] is in no region."""
        outside = address >= self.end[self.row(address)]
        if outside.any():
            raise OutsideError(int(address[outside][0]), self)

    def region_at(self, named: int) -> str:
        """For messages: an address as the NIC names it, and the region that it belongs to."""
        rows = zip(self.start.tolist(), self.end.tolist(), self.shift.tolist(), strict=True)
        for start, end, shift in rows:
            if start <= named - shift < end:
                return f"{named - shift:#x} of region {start:#x}..{end:#x}"
        return f"{named:#x}"


class WorkRequests(NamedTuple):
    """A chain of WRITEs: ``next`` and ``sg_list`` point into these very arrays, so keep them until posted.

    Attributes:
        wrs: [m] of `WR_DTYPE`; ``wr_id`` counts from 0.
        sges: [n] of `SGE_DTYPE`.
    """

    wrs: NDArray[Any]
    sges: NDArray[Any]


def work_requests(plan: CopyPlan, local: Keys, remote: Keys, *, max_sge: int, max_bytes: int) -> WorkRequests:
    """The WRITEs that carry a plan out, in its order.

    Ranges that are adjacent in the target share a WRITE, which gathers up to `max_sge` of them; ranges are
    cut where a region ends and at `max_bytes`. An empty plan gives one WRITE of no bytes.

    Raises:
        OutsideError: A range leaves the registered memory of either side.
    """
    if not plan.length.size:  # a WRITE of no bytes names no memory
        return _linked(np.zeros(1, WR_DTYPE), np.zeros(0, SGE_DTYPE))
    # Addresses of processes fit int64, in which running past an end shows as a negative difference.
    src, dst, length = plan.src.view(np.int64), plan.dst.view(np.int64), plan.length.view(np.int64)
    while True:
        here, there = local.row(src), remote.row(dst)
        room = np.minimum(local.end[here] - src, remote.end[there] - dst)
        if (room - length).min() >= 0 and length.max() <= max_bytes:
            break
        local.require(src)
        remote.require(dst)
        src, dst, length = _cut(src, dst, length, np.minimum(room, max_bytes))
    sges = np.empty(length.size, SGE_DTYPE)
    sges["addr"] = src + local.shift[here]
    sges["length"] = length
    sges["lkey"] = local.key[here]
    heads = _gather(dst, length, there, max_sge, max_bytes) if length.size > 1 else None
    if heads is None:
        wrs = np.zeros(length.size, WR_DTYPE)
        wrs["num_sge"] = 1
        wrs["sg_list"] = np.arange(0, length.size * SGE_BYTES, SGE_BYTES)
    else:
        dst, there = dst[heads], there[heads]
        wrs = np.zeros(heads.size, WR_DTYPE)
        wrs["num_sge"] = np.diff(heads, append=length.size)
        wrs["sg_list"] = heads * SGE_BYTES
    wrs["remote_addr"] = dst + remote.shift[there]
    wrs["rkey"] = remote.key[there]
    return _linked(wrs, sges)


def _linked(wrs: NDArray[Any], sges: NDArray[Any]) -> WorkRequests:
    """Turn offsets into addresses and chain the requests."""
    order = np.arange(wrs.size)
    wrs["wr_id"] = order
    wrs["sg_list"] += np.uint64(sges.ctypes.data)
    wrs["next"] = order * WR_BYTES + (wrs.ctypes.data + WR_BYTES)
    wrs["next"][-1] = 0
    return WorkRequests(wrs, sges)


def _cut(
    src: NDArray[np.int64], dst: NDArray[np.int64], length: NDArray[np.int64], room: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split each range that is longer than there is room in two, the first as large as there is."""
    of = np.repeat(np.arange(length.size), 1 + (length > room))
    rest = np.zeros(of.size, bool)
    rest[1:] = of[1:] == of[:-1]
    first = np.minimum(length, room)[of]
    skip = np.where(rest, first, 0)
    return src[of] + skip, dst[of] + skip, np.where(rest, length[of] - first, first)


def _gather(
    dst: NDArray[np.int64], length: NDArray[np.int64], there: NDArray[np.intp], max_sge: int, max_bytes: int
) -> NDArray[np.intp] | None:
    """Index of the first range of each WRITE; None if each range is one."""
    joined = (dst[1:] == dst[:-1] + length[:-1]) & (there[1:] == there[:-1])
    if max_sge == 1 or not joined.any():
        return None
    everyone = np.arange(length.size)
    first = np.ones(length.size, bool)
    np.logical_not(joined, out=first[1:])
    run = np.maximum.accumulate(np.where(first, everyone, 0))
    heads = np.flatnonzero((everyone - run) % max_sge == 0)
    if np.add.reduceat(length, heads).max() > max_bytes:
        return None  # ranges this large gain nothing by sharing
    return heads
