"""Work requests carry exactly the bytes of their plan, within what the NIC can take."""

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.rdma.wr import (
    SGE_BYTES,
    SGE_DTYPE,
    WR_BYTES,
    WR_DTYPE,
    Keys,
    OutsideError,
    WorkRequests,
    work_requests,
)

HERE, THERE = 1 << 40, 1 << 44
REGION = 64

# Two regions, one right behind the other, whose NIC addresses are far apart.
LOCAL = Keys.of([(HERE, REGION, 5000, 1), (HERE + REGION, REGION, 9000, 2)])
REMOTE = Keys.of([(THERE + REGION, REGION, 700, 12), (THERE, REGION, THERE, 11)], remote=True)

ranges = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(0, 28)), max_size=20)


def plan_of(rows: list[tuple[int, int, int]]) -> CopyPlan:
    table = np.array(rows, np.uint64).reshape(-1, 3)
    return CopyPlan.of(table[:, 0] + np.uint64(HERE), table[:, 1] + np.uint64(THERE), table[:, 2])


def named(keys: Keys, key: int, address: int) -> int:
    """What the process calls a byte that the NIC calls `address`."""
    (at,) = np.flatnonzero(keys.key == key)
    byte = address - int(keys.shift[at])
    assert keys.start[at] <= byte < keys.end[at], "outside of what the key covers"
    return byte


def carried(requests: WorkRequests, max_sge: int, max_bytes: int) -> list[tuple[int, int]]:
    """(source byte, target byte) in order, found as a NIC does: by pointers, from the first request on."""
    moves = []
    at = requests.wrs.ctypes.data
    seen = 0
    while at:
        wr = struct_at(at, WR_DTYPE)
        assert wr["wr_id"] == seen
        seen += 1
        target = int(wr["remote_addr"])
        count = int(wr["num_sge"])
        assert count <= max_sge
        total = 0
        for i in range(count):
            sge = struct_at(int(wr["sg_list"]) + i * SGE_BYTES, SGE_DTYPE)
            for byte in range(int(sge["length"])):
                source = named(LOCAL, int(sge["lkey"]), int(sge["addr"]) + byte)
                moves.append((source, named(REMOTE, int(wr["rkey"]), target + total)))
                total += 1
        assert total <= max_bytes
        at = int(wr["next"])
    assert seen == requests.wrs.size
    return moves


def struct_at(address: int, dtype: np.dtype[Any]) -> Any:
    return np.frombuffer(ctypes.string_at(address, dtype.itemsize), dtype)[0]


@given(ranges, st.integers(1, 4), st.integers(1, 40))
def test_requests_carry_the_plan_and_nothing_else(
    rows: list[tuple[int, int, int]], max_sge: int, max_bytes: int
) -> None:
    plan = plan_of(rows)
    asked = [
        (s + i, d + i)
        for s, d, n in zip(plan.src.tolist(), plan.dst.tolist(), plan.length.tolist(), strict=True)
        for i in range(n)
    ]
    requests = work_requests(plan, LOCAL, REMOTE, max_sge=max_sge, max_bytes=max_bytes)
    assert carried(requests, max_sge, max_bytes) == asked


def test_neighbours_in_the_target_share_a_request() -> None:
    plan = plan_of([(40, 0, 8), (0, 8, 8), (20, 16, 8), (60, 30, 2), (10, 32, 2)])
    requests = work_requests(plan, LOCAL, REMOTE, max_sge=2, max_bytes=1 << 20)
    assert requests.wrs["num_sge"].tolist() == [2, 1, 2]
    assert work_requests(plan, LOCAL, REMOTE, max_sge=16, max_bytes=1 << 20).wrs.size == 2


def test_an_empty_plan_is_one_request_of_no_bytes() -> None:
    requests = work_requests(plan_of([]), LOCAL, REMOTE, max_sge=4, max_bytes=10)
    assert requests.wrs.size == 1
    assert requests.wrs["num_sge"][0] == 0


@pytest.mark.parametrize(
    ("row", "owner"),
    [
        ((2 * REGION, 0, 1), "this process"),
        ((2 * REGION - 1, 0, 2), "this process"),
        ((0, 2 * REGION, 1), "the target"),
        ((0, 2 * REGION - 4, 5), "the target"),
    ],
)
def test_what_leaves_the_registered_memory_is_refused(row: tuple[int, int, int], owner: str) -> None:
    with pytest.raises(
        OutsideError, match=f"is in no region that {owner} has registered: register it"
    ) as refused:
        work_requests(plan_of([(0, 0, 4), row]), LOCAL, REMOTE, max_sge=4, max_bytes=1 << 20)
    assert refused.value.keys is (LOCAL if owner == "this process" else REMOTE)


def test_structs_have_the_sizes_of_the_abi() -> None:
    assert (WR_DTYPE.itemsize, SGE_DTYPE.itemsize) == (WR_BYTES, SGE_BYTES) == (128, 16)
