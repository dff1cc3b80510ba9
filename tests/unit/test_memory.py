"""Ranges: sorted, disjoint, and a check of bounds that cannot be fooled."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.memory import Ranges

spans = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 12)), max_size=12)


def of(rows: list[tuple[int, int]]) -> Ranges:
    table = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    return Ranges.of(table[:, 0], table[:, 1])


def members(rows: list[tuple[int, int]]) -> set[int]:
    return {b for at, n in rows for b in range(at, at + n)}


@given(spans)
def test_ranges_are_sorted_disjoint_and_complete(rows: list[tuple[int, int]]) -> None:
    ranges = of(rows)
    assert (ranges.start < ranges.end).all()
    assert (ranges.start[1:] > ranges.end[:-1]).all()
    assert ranges.nbytes == len(members(rows))
    pairs = zip(ranges.start.tolist(), ranges.end.tolist(), strict=True)
    assert {b for s, e in pairs for b in range(s, e)} == members(rows)


@given(spans, spans)
def test_cover_is_exactly_membership(rows: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    table = np.array(asked, dtype=np.uint64).reshape(-1, 2)
    assert of(rows).cover(table[:, 0], table[:, 1]) == (members(asked) <= members(rows))


def test_lengths_that_wrap_around_are_not_covered() -> None:
    ranges = of([(1000, 100)])
    assert not ranges.cover(np.array([1050], np.uint64), np.array([2**64 - 20], np.uint64))
    assert not Ranges.of(np.array([], np.uint64), np.array([], np.uint64)).cover(
        np.array([0], np.uint64), np.array([1], np.uint64)
    )


def test_empty_ranges_are_left_out() -> None:
    ranges = Ranges.of(np.array([10, 10, 30], np.uint64), np.array([5, 0, 0], np.uint64))
    assert (ranges.start.tolist(), ranges.end.tolist()) == ([10], [15])
