"""What is to be copied, as arrays: one plan holds every range of one write."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Self

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.memory import U64Array


class CopyPlan(msgspec.Struct, frozen=True, eq=False):
    """Byte ranges to copy from one process's memory into another's, in order.

    Attributes:
        src: uint64 [n], absolute addresses in the initiator.
        dst: uint64 [n], absolute addresses in the target.
        length: uint64 [n], bytes, each > 0.
    """

    src: U64Array
    dst: U64Array
    length: U64Array

    @classmethod
    def of(cls, src: U64Array, dst: U64Array, length: U64Array) -> Self:
        """A plan of `n` copies, neighbours merged where they are adjacent in both source and target.

        Order is kept and empty ranges are left out. Takes arrays of shape [n] of any integer type.

        Raises:
            ValueError: The three arrays are not one-dimensional and of one size.
        """
        s, d, n = (np.ascontiguousarray(a, dtype=np.uint64) for a in (src, dst, length))
        if not (s.ndim == 1 and s.shape == d.shape == n.shape):
            raise ValueError(f"src, dst, length must be [n] of one n, not {s.shape}, {d.shape}, {n.shape}")
        if not n.all():
            s, d, n = s[n > 0], d[n > 0], n[n > 0]
        if n.size < 2:
            return cls(s, d, n)
        first = np.empty(n.size, bool)
        first[0] = True
        np.logical_or(s[1:] != s[:-1] + n[:-1], d[1:] != d[:-1] + n[:-1], out=first[1:])
        heads = np.flatnonzero(first)
        return cls(s[heads], d[heads], np.add.reduceat(n, heads))

    @property
    def nbytes(self) -> int:
        """Bytes that the plan copies."""
        return int(self.length.sum())

    def split(self, max_bytes: int, max_ranges: int = 1 << 62) -> Iterator[Self]:
        """Cut into plans of at most `max_bytes` and `max_ranges` each; cuts may fall inside a range.

        An empty plan gives itself, so that there always is a first piece.

        Raises:
            ValueError: A limit is below 1.
        """
        if max_bytes < 1 or max_ranges < 1:
            raise ValueError(f"max_bytes={max_bytes} and max_ranges={max_ranges} must be at least 1")
        return self._cut(np.arange(max_bytes, max(self.nbytes, 1), max_bytes, dtype=np.uint64), max_ranges)

    def _cut(self, cuts: U64Array, max_ranges: int) -> Iterator[Self]:
        """Cut at byte positions `cuts` (ascending, inside the plan) and wherever `max_ranges` are full."""
        if cuts.size == 0 and self.length.size <= max_ranges:
            yield self
            return
        range_end = np.cumsum(self.length, dtype=np.uint64)
        piece_end = np.union1d(range_end, cuts)
        piece_start = np.concatenate((np.zeros(1, np.uint64), piece_end[:-1]))
        of = np.searchsorted(range_end, piece_start, side="right")
        inside = piece_start - (range_end - self.length)[of]
        src, dst, length = self.src[of] + inside, self.dst[of] + inside, piece_end - piece_start
        bounds = [0, *(np.searchsorted(piece_end, cuts) + 1).tolist(), length.size]
        for low, high in pairwise(bounds):
            for at in range(low, high, max_ranges):
                part = slice(at, min(at + max_ranges, high))
                yield type(self)(src[part], dst[part], length[part])
