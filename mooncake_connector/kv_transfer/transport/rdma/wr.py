"""Work requests as arrays of the C structs themselves, made from a plan without an object per range."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
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
        super().__init__(f"{address:#x} is in no region that {keys.owner} has registered: register it")
        self.keys = keys


class Keys(msgspec.Struct, frozen=True, eq=False):
    """One side's registered regions as one NIC knows them, disjoint and ascending.

    Attributes:
        start: uint64 [n], first byte of each region.
        end: uint64 [n], one past the last byte.
        base: uint64 [n], what the NIC calls `start`: the address itself, or for a dma-buf an offset into it.
        key: uint32 [n], lkey or rkey.
        owner: for messages.
    """

    start: U64Array
    end: U64Array
    base: U64Array
    key: NDArray[np.uint32]
    owner: str

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int]], owner: str = "this process") -> Self:
        """From rows (start, length, base, key) in any order."""
        table = np.array(sorted(rows), np.uint64).reshape(-1, 4)
        return cls(table[:, 0], table[:, 0] + table[:, 1], table[:, 2], table[:, 3].astype(np.uint32), owner)

    def find(self, address: U64Array) -> NDArray[np.intp]:
        """Index [n] of the region that each address [n] is in.

        Raises:
            OutsideError: One is in none.
        """
        if not self.start.size:
            raise OutsideError(int(address[0]), self)
        at = np.searchsorted(self.start, address, side="right") - 1
        inside = (at >= 0) & (address < self.end[at])
        if not inside.all():
            raise OutsideError(int(address[~inside][0]), self)
        return at

    def region_at(self, named: int) -> str:
        """For messages: an address as the NIC names it, and the region that it belongs to."""
        for start, end, base in zip(self.start.tolist(), self.end.tolist(), self.base.tolist(), strict=True):
            if base <= named < base + end - start:
                return f"{named - base + start:#x} of region {start:#x}..{end:#x}"
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
    src, dst, length = plan.src, plan.dst, plan.length
    if not length.size:  # a WRITE of no bytes names no memory
        return _linked(np.zeros(1, WR_DTYPE), np.zeros(0, SGE_DTYPE))
    while True:
        here, there = local.find(src), remote.find(dst)
        room = np.minimum(np.minimum(local.end[here] - src, remote.end[there] - dst), np.uint64(max_bytes))
        long = length > room
        if not long.any():
            break
        src, dst, length = _cut(src, dst, length, room, long)
    sges = np.empty(length.size, SGE_DTYPE)
    sges["addr"] = src - local.start[here] + local.base[here]
    sges["length"] = length
    sges["lkey"] = local.key[here]
    heads = _gather(dst, length, there, max_sge, max_bytes)
    if heads.size < length.size:
        dst, there = dst[heads], there[heads]
    wrs = np.zeros(heads.size, WR_DTYPE)
    wrs["remote_addr"] = dst - remote.start[there] + remote.base[there]
    wrs["rkey"] = remote.key[there]
    wrs["num_sge"][:-1] = heads[1:] - heads[:-1]
    wrs["num_sge"][-1] = length.size - heads[-1]
    wrs["sg_list"] = heads * SGE_BYTES
    return _linked(wrs, sges)


def _linked(wrs: NDArray[Any], sges: NDArray[Any]) -> WorkRequests:
    """Turn offsets into addresses and chain the requests."""
    order = np.arange(wrs.size, dtype=np.uint64)
    wrs["wr_id"] = order
    wrs["sg_list"] += np.uint64(sges.ctypes.data)
    wrs["next"] = order * np.uint64(WR_BYTES) + np.uint64(wrs.ctypes.data + WR_BYTES)
    wrs["next"][-1] = 0
    return WorkRequests(wrs, sges)


def _cut(
    src: U64Array, dst: U64Array, length: U64Array, room: U64Array, long: NDArray[np.bool_]
) -> tuple[U64Array, U64Array, U64Array]:
    """Split each range that is `long` in two, the first as large as there is room."""
    of = np.repeat(np.arange(length.size), 1 + long)
    rest = np.zeros(of.size, bool)
    rest[1:] = of[1:] == of[:-1]
    skip = np.where(rest, room[of], np.uint64(0))
    return src[of] + skip, dst[of] + skip, np.where(rest | ~long[of], length[of] - skip, room[of])


def _gather(
    dst: U64Array, length: U64Array, there: NDArray[np.intp], max_sge: int, max_bytes: int
) -> NDArray[np.intp]:
    """Index of the first range of each WRITE."""
    n = length.size
    everyone = np.arange(n)
    joined = (dst[1:] == dst[:-1] + length[:-1]) & (there[1:] == there[:-1])
    if max_sge == 1 or not joined.any():
        return everyone
    first = np.ones(n, bool)
    np.logical_not(joined, out=first[1:])
    run = np.maximum.accumulate(np.where(first, everyone, 0))
    heads = np.flatnonzero((everyone - run) % max_sge == 0)
    if np.add.reduceat(length, heads).max() > max_bytes:
        return everyone  # ranges this large gain nothing by sharing
    return heads
