"""What is to be copied, as arrays: one plan holds every range of one write."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol, Self

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.memory import U64Array


class Event(Protocol):
    """Something that happens on a GPU, at some point of a stream."""

    @property
    def handle(self) -> int:
        """The driver's handle, for streams to wait on."""

    def query(self) -> bool:
        """Whether it has happened."""

    def synchronize(self) -> None:
        """Wait until it has happened, without the GIL."""


class Tile(msgspec.Struct, frozen=True):
    """The shape of every entry of a plan: ``n1 x n2`` runs of `run` bytes.

    Run (i, j) lies at ``i * src1 + j * src2`` from the entry's source address, and at ``i * dst1 + j * dst2``
    from its target address. Strides are in bytes; the second dimension is the denser one in the target.
    """

    n1: int
    n2: int
    run: int
    src1: int
    src2: int
    dst1: int
    dst2: int

    @property
    def nbytes(self) -> int:
        """Bytes that one entry copies."""
        return self.n1 * self.n2 * self.run

    @property
    def src_span(self) -> int:
        """Bytes from an entry's first source byte to one past its last."""
        return (self.n1 - 1) * self.src1 + (self.n2 - 1) * self.src2 + self.run

    @property
    def dst_span(self) -> int:
        """Bytes from an entry's first target byte to one past its last."""
        return (self.n1 - 1) * self.dst1 + (self.n2 - 1) * self.dst2 + self.run

    @classmethod
    def of(cls, run: int, dims: Sequence[tuple[int, int, int]]) -> Self:
        """The tile with the longest runs that copies the same bytes.

        Args:
            run: bytes that are contiguous on both sides.
            dims: (count, source stride, target stride) of each dimension around them.

        Raises:
            ValueError: More than two dimensions are left when neighbours are folded.
        """
        left = sorted((dim for dim in dims if dim[0] != 1), key=lambda dim: dim[2])
        while left and left[0][1] == left[0][2] == run:
            run *= left.pop(0)[0]
        folded: list[tuple[int, int, int]] = []
        for count, src, dst in left:
            if folded and (src, dst) == (folded[-1][0] * folded[-1][1], folded[-1][0] * folded[-1][2]):
                folded[-1] = (folded[-1][0] * count, *folded[-1][1:])
            else:
                folded.append((count, src, dst))
        if len(folded) > 2:
            raise ValueError(f"runs of {run} bytes lie in {len(folded)} dimensions, a tile has two")
        (n2, src2, dst2), (n1, src1, dst1) = [*folded, *[(1, run, run)] * 2][:2]
        return cls(n1, n2, run, src1, src2, dst1, dst2)


class CopyPlan(msgspec.Struct, frozen=True, eq=False):
    """Byte ranges to copy from one process's memory into another's, in order.

    Attributes:
        src: uint64 [n], absolute addresses in the initiator.
        dst: uint64 [n], absolute addresses in the target.
        length: uint64 [n], bytes to copy, each > 0.
        tile: if given, entry i is no range but a tile, and each length is `Tile.nbytes`.
        after: what must have happened on the GPU before the source may be read.
    """

    src: U64Array
    dst: U64Array
    length: U64Array
    tile: Tile | None = None
    after: tuple[Event, ...] = ()

    @classmethod
    def of(cls, src: U64Array, dst: U64Array, length: U64Array, after: Sequence[Event] = ()) -> Self:
        """A plan of `n` copies, neighbours merged where they are adjacent in both source and target.

        Order is kept and empty ranges are left out. Takes arrays of shape [n] of any integer type.

        Raises:
            ValueError: The three arrays are not one-dimensional and of one size.
        """
        s, d, n = (np.ascontiguousarray(a, dtype=np.uint64) for a in (src, dst, length))
        if not (s.ndim == 1 and s.shape == d.shape == n.shape):
            raise ValueError(f"src, dst, length must be [n] of one n, not {s.shape}, {d.shape}, {n.shape}")
        events = tuple(dict.fromkeys(after))
        if not n.all():
            s, d, n = s[n > 0], d[n > 0], n[n > 0]
        if n.size < 2:
            return cls(s, d, n, after=events)
        first = np.empty(n.size, bool)
        first[0] = True
        np.logical_or(s[1:] != s[:-1] + n[:-1], d[1:] != d[:-1] + n[:-1], out=first[1:])
        heads = np.flatnonzero(first)
        return cls(s[heads], d[heads], np.add.reduceat(n, heads), after=events)

    @classmethod
    def tiled(cls, src: U64Array, dst: U64Array, tile: Tile, after: Sequence[Event] = ()) -> Self:
        """A plan of `n` tiles at the addresses `src` and `dst` (integers, [n]); plain if tiles are ranges.

        Raises:
            ValueError: The arrays are not one-dimensional and of one size.
        """
        length = np.full(np.shape(src), tile.nbytes, np.uint64)
        if tile.n1 == tile.n2 == 1:
            return cls.of(src, dst, length, after)
        s, d = (np.ascontiguousarray(a, dtype=np.uint64) for a in (src, dst))
        if not (s.ndim == 1 and s.shape == d.shape):
            raise ValueError(f"src, dst must be [n] of one n, not {s.shape}, {d.shape}")
        return cls(s, d, length, tile, tuple(dict.fromkeys(after)))

    def flat(self) -> Self:
        """The same copies as plain ranges, in the order (entry, i, j), neighbours merged."""
        tile = self.tile
        if tile is None:
            return self

        def runs(at: U64Array, stride1: int, stride2: int) -> U64Array:
            i, j = np.arange(tile.n1, dtype=np.uint64), np.arange(tile.n2, dtype=np.uint64)
            inside = i[:, None] * np.uint64(stride1) + j * np.uint64(stride2)
            return (at[:, None] + inside.ravel()).ravel()

        src, dst = runs(self.src, tile.src1, tile.src2), runs(self.dst, tile.dst1, tile.dst2)
        return type(self).of(src, dst, np.full(src.size, tile.run, np.uint64), self.after)

    @property
    def nbytes(self) -> int:
        """Bytes that the plan copies."""
        return int(self.length.sum())

    def reads(self) -> tuple[U64Array, U64Array]:
        """Address and length (uint64 [n]) of what each entry reads, gaps inside tiles included."""
        return self.src, self._span(self.tile.src_span if self.tile else None)

    def writes(self) -> tuple[U64Array, U64Array]:
        """Address and length (uint64 [n]) of what each entry writes, gaps inside tiles included."""
        return self.dst, self._span(self.tile.dst_span if self.tile else None)

    def part(self, low: int, high: int) -> Self:
        """Entries ``[low, high)``; shares memory with this plan."""
        cut = slice(low, high)
        return type(self)(self.src[cut], self.dst[cut], self.length[cut], self.tile, self.after)

    def split(self, max_bytes: int, max_ranges: int = 1 << 62) -> Iterator[Self]:
        """Cut into plans of at most `max_bytes` and `max_ranges` each; cuts may fall inside a range.

        Tiles are not cut: a larger one is a plan of its own. An empty plan gives itself, so that there always
        is a first piece.

        Raises:
            ValueError: A limit is below 1.
        """
        if max_bytes < 1 or max_ranges < 1:
            raise ValueError(f"max_bytes={max_bytes} and max_ranges={max_ranges} must be at least 1")
        if self.tile is not None:
            count = max(1, min(max_bytes // self.tile.nbytes, max_ranges))
            return (self.part(at, at + count) for at in range(0, max(self.src.size, 1), count))
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
        whole = type(self)(
            self.src[of] + inside, self.dst[of] + inside, piece_end - piece_start, after=self.after
        )
        bounds = [0, *(np.searchsorted(piece_end, cuts) + 1).tolist(), whole.length.size]
        for low, high in pairwise(bounds):
            for at in range(low, high, max_ranges):
                yield whole.part(at, min(at + max_ranges, high))

    def _span(self, span: int | None) -> U64Array:
        return self.length if span is None else np.full(self.length.size, span, np.uint64)
