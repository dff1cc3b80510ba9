"""Slices of a plan cover exactly its bytes, in order, whatever their sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.slicing import Piece, SlicePolicy, even, whole_bytes
from tests.unit.dispatcher_world import pairs_of

KIB, MIB = 1 << 10, 1 << 20

rows = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 20)), min_size=1, max_size=30
)
"""(src, dst, length): unsorted, and now and then adjacent."""


def plan_of(table: list[tuple[int, int, int]]) -> CopyPlan:
    src, dst, length = (np.array(column, np.uint64) for column in zip(*table, strict=True))
    return CopyPlan(src + np.uint64(1 << 63), dst, length)


@given(rows, st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(1, 5))
def test_pieces_cover_a_plan_exactly_and_in_order(
    table: list[tuple[int, int, int]], sizes: list[int], max_ranges: int
) -> None:
    plan = plan_of(table)
    before = pairs_of(plan)
    piece = Piece(plan, plan.nbytes)
    taken = []
    while piece.left:
        size = sizes[len(taken) % len(sizes)]
        left = piece.left
        part, nbytes = piece.take(size, max_ranges)
        assert 0 < nbytes == part.nbytes <= size
        assert 0 < part.length.size <= max_ranges
        assert part.length.all()
        assert left - piece.left == nbytes
        taken.append(part)
    assert [pair for part in taken for pair in pairs_of(part)] == before
    assert pairs_of(plan) == before  # cutting must not write into what it shares with the plan


@given(rows, st.integers(1, 40), st.integers(1, 40))
def test_slices_can_be_cut_again(table: list[tuple[int, int, int]], first: int, second: int) -> None:
    plan = plan_of(table)
    outer, found = Piece(plan, plan.nbytes), []
    while outer.left:
        part, nbytes = outer.take(first, 4)
        inner = Piece(part, nbytes, ("a",))
        while inner.left:
            found += pairs_of(inner.take(second, 2)[0])
    assert found == pairs_of(plan)


@given(st.integers(1, 9), st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 3))
def test_tiles_are_taken_whole(entries: int, sizes: list[int], max_ranges: int) -> None:
    at = np.arange(entries, dtype=np.uint64) * 100
    plan = CopyPlan.tiled(at, at, Tile.of(8, [(2, 16, 32), (3, 48, 10)]))
    assert plan.tile is not None
    piece, found = Piece(plan, plan.nbytes), []
    while piece.left:
        size, left = sizes[len(found) % len(sizes)], piece.left
        part, nbytes = piece.take(size, max_ranges)
        assert part.tile == plan.tile
        assert nbytes == part.nbytes == left - piece.left
        assert part.length.size == 1 or (nbytes <= size and part.length.size <= max_ranges)
        found.append(part)
    assert [pair for part in found for pair in pairs_of(part.flat())] == pairs_of(plan.flat())


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 26))
def test_even_leaves_no_crumbs(nbytes: int, left: int) -> None:
    size = even(nbytes, left)
    assert 0 < size <= min(nbytes, left)
    rest = left - size
    if rest:
        assert nbytes <= 4096 or size % 4096 == 0 or size == nbytes
        assert rest >= size - 2 * 4096
    if left <= nbytes:
        assert size == left


@pytest.mark.parametrize(
    ("bandwidth", "measured", "expected"),
    [
        (1e5, True, 64 * KIB),
        (0.5e9, True, 2_000_000),
        (100e9, True, 8 * MIB),
        (100e9, False, MIB),
        (0.1e9, False, 400_000),
    ],
)
def test_slice_size_follows_bandwidth(bandwidth: float, measured: bool, expected: int) -> None:
    assert SlicePolicy().slice_bytes(bandwidth, measured) == expected


@given(rows)
def test_whole_bytes(table: list[tuple[int, int, int]]) -> None:
    assert whole_bytes(plan_of(table)) == sum(n for _, _, n in table)
