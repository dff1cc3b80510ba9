"""Cutting plans into slices, one at a time: a slice is what one rail carries as one write."""

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import CopyPlan

_ALIGN = 4096


class SlicePolicy(msgspec.Struct, frozen=True):
    """How transfers are cut and how long they are tried.

    Attributes:
        min_bytes: no rail is so slow that its slices are smaller, ends of transfers apart.
        max_bytes: no rail is so fast that its slices are larger.
        stripe_bytes: less than this is not shared out over several rails; a rail whose speed nobody has
            measured yet gets no more than this at once.
        slice_time_s: what a rail carries in this time is a slice [s]: so long may foreground wait for a
            slice of background, and so much is lost with a slice. Each slice costs the processor 0.1 to
            0.4 ms, and rails share it. Where it costs all rails together as much as this time, they look
            slow, get smaller slices, and so become slower still.
        max_ranges: of one slice.
        steady_bytes: of a slice on a rail that takes a plan as a whole (`RailSpec.steady`).
        steady_ranges: likewise.
        max_failovers: how often the same bytes may move on to another rail before their transfer fails.
        no_rail_s: how long transfers wait while no rail can be used [s].
    """

    min_bytes: int = 64 << 10
    max_bytes: int = 8 << 20
    stripe_bytes: int = 1 << 20
    slice_time_s: float = 4e-3
    max_ranges: int = 4096
    steady_bytes: int = 1 << 30
    steady_ranges: int = 65536
    max_failovers: int = 3
    no_rail_s: float = 10.0

    def slice_bytes(self, bandwidth: float, measured: bool) -> int:
        """Bytes of a slice on a rail of `bandwidth` bytes/s."""
        limit = self.max_bytes if measured else min(self.max_bytes, self.stripe_bytes)
        return int(min(max(bandwidth * self.slice_time_s, self.min_bytes), limit))


class Piece:
    """What is left to send of a plan. Cuts off slices from its front, without work for the rest.

    Attributes:
        left: bytes not yet taken.
        tried: rails that lost these bytes before, oldest first.
    """

    __slots__ = ("_ends", "_index", "_plan", "_taken", "left", "tried")

    def __init__(self, plan: CopyPlan, nbytes: int, tried: tuple[str, ...] = ()) -> None:
        self.left = nbytes
        self.tried = tried
        self._plan = plan
        self._taken = 0
        self._index = 0
        self._ends: U64Array | None = None

    def take(self, nbytes: int, max_ranges: int) -> tuple[CopyPlan, int]:
        """The next at most `nbytes` bytes in at most `max_ranges` ranges, and how many bytes they are.

        Tiles are not cut: of these at least one is taken, however large. The plan may share memory with the
        one it was cut from.
        """
        plan, left = self._plan, self.left
        if not self._taken and nbytes >= left and plan.length.size <= max_ranges:
            self.left = 0
            return plan, left
        if plan.tile is not None:
            part = plan.part(self._index, self._index + max(1, min(nbytes // plan.tile.nbytes, max_ranges)))
            size = part.length.size * plan.tile.nbytes
            self._index += part.length.size
            self._taken += size
            self.left -= size
            return part, size
        if self._ends is None:
            self._ends = np.cumsum(plan.length, dtype=np.uint64)
        ends, low, begin = self._ends, self._index, self._taken
        end = begin + min(nbytes, left)
        high = int(np.searchsorted(ends, np.uint64(end))) + 1
        if high - low > max_ranges:
            high = low + max_ranges
            end = int(ends[high - 1])
        src, dst, length = plan.src[low:high], plan.dst[low:high], plan.length[low:high]
        head = begin - (int(ends[low - 1]) if low else 0)
        tail = int(ends[high - 1]) - end
        if head or tail:
            src, dst, length = src.copy(), dst.copy(), length.copy()
            src[0] += np.uint64(head)
            dst[0] += np.uint64(head)
            length[0] -= np.uint64(head)
            length[-1] -= np.uint64(tail)
        self._index = high - 1 if tail else high
        self._taken = end
        self.left -= end - begin
        return CopyPlan(src, dst, length, after=plan.after), end - begin


def whole_bytes(plan: CopyPlan) -> int:
    """`plan.nbytes`, for plans of one range without numpy's overhead of a reduction."""
    return int(plan.length[0]) if plan.length.size == 1 else plan.nbytes


def even(nbytes: int, left: int) -> int:
    """At most `nbytes` of `left`, such that no crumb remains and large cuts stay aligned."""
    if nbytes >= left:
        return left
    if left < 2 * nbytes:
        half = -(-left // 2)
        return min(half + -half % _ALIGN, nbytes)
    return nbytes - nbytes % _ALIGN if nbytes > _ALIGN else nbytes
