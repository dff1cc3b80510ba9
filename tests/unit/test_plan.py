"""CopyPlan: merged, cut and shared plans copy exactly the bytes asked for, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.plan import CopyPlan, Tile

BASE = 1 << 40

blocks = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9)), max_size=40)
"""(src, dst, length) near BASE: small enough for neighbours and overlaps to be frequent."""


def plan_of(rows: list[tuple[int, int, int]]) -> CopyPlan:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return CopyPlan.of(table[:, 0] + BASE, table[:, 1] + BASE, table[:, 2])


def bytes_of(plan: CopyPlan) -> list[tuple[int, int]]:
    """Every (source byte, target byte) in the order they are copied."""
    rows = zip(plan.src.tolist(), plan.dst.tolist(), plan.length.tolist(), strict=True)
    return [(s + i, d + i) for s, d, n in rows for i in range(n)]


def asked(rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(BASE + s + i, BASE + d + i) for s, d, n in rows for i in range(n)]


@given(blocks)
def test_merged_plan_copies_exactly_what_was_asked(rows: list[tuple[int, int, int]]) -> None:
    plan = plan_of(rows)
    assert bytes_of(plan) == asked(rows)
    assert plan.nbytes == len(asked(rows))
    assert plan.length.all()
    adjacent = (plan.src[1:] == plan.src[:-1] + plan.length[:-1]) & (
        plan.dst[1:] == plan.dst[:-1] + plan.length[:-1]
    )
    assert not adjacent.any()


@given(blocks, st.integers(1, 50), st.integers(1, 5))
def test_split_keeps_bytes_and_limits(
    rows: list[tuple[int, int, int]], max_bytes: int, max_ranges: int
) -> None:
    pieces = list(plan_of(rows).split(max_bytes, max_ranges))
    assert [b for piece in pieces for b in bytes_of(piece)] == asked(rows)
    assert all(piece.nbytes <= max_bytes and piece.length.size <= max_ranges for piece in pieces)
    assert len(pieces) == 1 or (pieces and all(piece.nbytes for piece in pieces))


def test_contiguous_blocks_become_one_range() -> None:
    at = np.arange(1000, dtype=np.uint64) * 4096
    plan = CopyPlan.of(at, at + 7, np.full(1000, 4096))
    assert plan.length.tolist() == [4096 * 1000]


def test_shapes_and_limits_are_checked() -> None:
    one, two = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    with pytest.raises(ValueError, match="one n"):
        CopyPlan.of(one, two, one)
    with pytest.raises(ValueError, match="max_bytes=0"):
        plan_of([]).split(0)


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Tile, list[tuple[int, int, int]], int]:
    """A tile, and what it was made of: dense arrays, permuted or cut out of larger ones."""
    run, n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def strides() -> tuple[int, int]:
        gap, outer_gap = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        if draw(st.booleans()):
            inner = run + gap
            return m * inner + outer_gap, inner
        inner = run + gap
        return inner, n * inner + outer_gap

    (s1, s2), (d1, d2) = strides(), strides()
    dims = [(n, s1, d1), (m, s2, d2)]
    return Tile.of(run, dims), dims, run


entries = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=8)


def copies(at: list[tuple[int, int]], dims: list[tuple[int, int, int]], run: int) -> set[tuple[int, int]]:
    (n, s1, d1), (m, s2, d2) = dims
    return {
        (BASE + s + i * s1 + j * s2 + k, BASE + d + i * d1 + j * d2 + k)
        for s, d in at
        for i in range(n)
        for j in range(m)
        for k in range(run)
    }


def tiled(at: list[tuple[int, int]], tile: Tile) -> CopyPlan:
    table = np.array(at, np.int64) + BASE
    return CopyPlan.tiled(table[:, 0], table[:, 1], tile)


@given(tiles(), entries)
def test_tiles_copy_what_their_dimensions_say(
    made: tuple[Tile, list[tuple[int, int, int]], int], at: list[tuple[int, int]]
) -> None:
    tile, dims, run = made
    plan = tiled(at, tile)
    assert set(bytes_of(plan.flat())) == copies(at, dims, run)
    assert plan.nbytes == plan.flat().nbytes == len(at) * tile.nbytes
    read, written = plan.reads(), plan.writes()
    assert min(read[0]) == min(plan.flat().src)
    assert max(read[0] + read[1]) == max(plan.flat().src + plan.flat().length)
    assert max(written[0] + written[1]) == max(plan.flat().dst + plan.flat().length)


@given(tiles(), entries, st.integers(1, 100), st.integers(1, 5))
def test_tiles_are_cut_between_entries(
    made: tuple[Tile, list[tuple[int, int, int]], int], at: list[tuple[int, int]], size: int, ranges: int
) -> None:
    plan = tiled(at, made[0])
    pieces = list(plan.split(size, ranges))
    assert [b for piece in pieces for b in bytes_of(piece.flat())] == bytes_of(plan.flat())
    if plan.tile is not None:
        for piece in pieces:
            assert piece.tile == plan.tile
            assert piece.length.size == 1 or (piece.nbytes <= size and piece.length.size <= ranges)


def test_dense_tiles_become_ranges() -> None:
    assert Tile.of(8, [(4, 64, 64), (8, 8, 8)]).run == 256
    permuted = Tile.of(8, [(4, 8, 64), (8, 32, 8)])
    assert (permuted.n1, permuted.n2, permuted.run) == (4, 8, 8)
    assert permuted.dst2 == 8  # the target's dense dimension is the inner one
    at = np.arange(3, dtype=np.int64) * 256
    plan = CopyPlan.tiled(at + 1, at, Tile.of(8, [(4, 64, 64), (8, 8, 8)]))
    assert plan.tile is None
    assert plan.length.tolist() == [768]


def test_events_stay_with_every_part() -> None:
    class Done:
        handle = 1

        def query(self) -> bool:
            return True

        def synchronize(self) -> None: ...

    event, other = Done(), Done()
    at = np.arange(3, dtype=np.uint64) * 64
    plain = CopyPlan.of(at, at, np.full(3, 16), [event, other, event])
    plan = CopyPlan.tiled(at, at, Tile.of(8, [(2, 16, 32)]), plain.after)
    assert plain.after == (event, other)
    assert plan.tile is not None
    for part in (*plain.split(8), *plan.split(8), plan.flat(), plan.part(1, 2)):
        assert part.after == (event, other)
