"""CopyPlan: merged, cut and shared plans copy exactly the bytes asked for, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.plan import CopyPlan

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
