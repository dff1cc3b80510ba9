"""Copies to make and what they must leave behind, reckoned in a way of its own: byte by byte."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """``n1 x n2`` runs of `run` bytes, at ``i * src1 + j * src2`` here and ``i * dst1 + j * dst2`` there."""

    n1: int
    n2: int
    run: int
    src1: int
    src2: int
    dst1: int
    dst2: int

    @property
    def nbytes(self) -> int:
        return self.n1 * self.n2 * self.run

    @property
    def src_span(self) -> int:
        return (self.n1 - 1) * self.src1 + (self.n2 - 1) * self.src2 + self.run

    @property
    def dst_span(self) -> int:
        return (self.n1 - 1) * self.dst1 + (self.n2 - 1) * self.dst2 + self.run


@dataclass(frozen=True)
class Copies:
    """Offsets in the initiator's and the target's memory, and lengths in bytes, int64 [n].

    Attributes:
        shape: if given, every entry is such a tile.
    """

    src: Offsets
    dst: Offsets
    length: Offsets
    shape: Shape | None = None

    @property
    def nbytes(self) -> int:
        return int(self.length.sum())

    def runs(self) -> tuple[Offsets, Offsets, Offsets]:
        """The same as contiguous runs."""
        if (t := self.shape) is None:
            return self.src, self.dst, self.length
        src, dst = [], []
        for i in range(t.n1):
            for j in range(t.n2):
                src.append(self.src + (i * t.src1 + j * t.src2))
                dst.append(self.dst + (i * t.dst1 + j * t.dst2))
        count = len(src) * self.src.size
        return np.concatenate(src), np.concatenate(dst), np.full(count, t.run, np.int64)


def _up(value: int, align: int) -> int:
    return -(-value // align) * align


def scattered(
    rng: random.Random, sizes: list[int], align: int, src_bytes: int, dst_bytes: int, *, guard: int = 1
) -> Copies:
    """Ranges of these sizes, all over both memories and in no order; none meets another in the target.

    Args:
        align: of each address on either side, relative to the memory's beginning.
        guard: least bytes between two ranges in the target.
    """
    order = list(sizes)
    rng.shuffle(order)
    slack = dst_bytes - sum(_up(size + guard, align) for size in order) - align
    assert slack >= 0, f"{len(sizes)} ranges of {sum(sizes)} bytes do not fit {dst_bytes}"
    most = slack // (align * len(order))
    dst, at = [], _up(guard, align)
    for size in order:
        at += align * rng.randint(0, most)
        dst.append(at)
        at += _up(size + guard, align)
    src = [align * rng.randint(0, (src_bytes - size) // align) for size in order]
    index = list(range(len(order)))
    rng.shuffle(index)
    pick = np.array(index)
    return Copies(
        np.array(src, np.int64)[pick], np.array(dst, np.int64)[pick], np.array(order, np.int64)[pick]
    )


def tiles(rng: random.Random, shape: Shape, count: int, src_bytes: int, dst_bytes: int, align: int) -> Copies:
    """`count` tiles, all over both memories; none meets another in the target."""
    whole = scattered(
        rng, [shape.dst_span] * count, align, shape.dst_span + src_bytes - shape.src_span, dst_bytes
    )
    return Copies(whole.src, whole.dst, np.full(count, shape.nbytes, np.int64), shape)
