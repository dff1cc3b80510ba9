"""Who waits for a GPU on behalf of NICs: in order, never early, and with the reason if it is in vain."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.transport import Failure
from mooncake_connector.kv_transfer.transport.rdma import rail as rdma_rail
from mooncake_connector.kv_transfer.transport.rdma.rail import RdmaRail
from tests.unit.transport_peer import Done, until


class Moment:
    """An event."""

    handle = 0

    def __init__(self, broken: str = "") -> None:
        self.happened = threading.Event()
        self._broken = broken

    def query(self) -> bool:
        return self.happened.is_set()

    def synchronize(self) -> None:
        assert self.happened.wait(10)
        if self._broken:
            raise TransportError(self._broken)


@pytest.fixture
def rail(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rail of no NIC; `enqueued` are the plans that it was about to post."""
    monkeypatch.setattr(rdma_rail, "QueuePair", lambda *args: SimpleNamespace(close=lambda: None))
    nic: Any = SimpleNamespace(max_depth=16)
    made: Any = RdmaRail(
        "rdma-0",
        nic,
        speed=0.0,
        penalty=1.0,
        refresh=lambda then: None,
        on_broken=lambda reason: None,
    )
    made.enqueued = []

    def enqueue(plan: CopyPlan, on_done: Done) -> None:
        made.enqueued.append(plan)
        on_done(None)

    monkeypatch.setattr(made, "_enqueue", enqueue)
    return made


def plan(address: int, *after: Moment) -> CopyPlan:
    one = np.array([address], np.uint64)
    return CopyPlan(one, one, one, after=after)


def test_a_nic_reads_nothing_before_it_is_written(rail: RdmaRail) -> None:
    first, second = Moment(), Moment()
    writes = [plan(4096, first), plan(8192, first, second), plan(100)]
    dones = [Done() for _ in writes]
    for write, done in zip(writes, dones, strict=True):
        rail.write(1, write, done)
    enqueued: list[CopyPlan] = rail.enqueued  # type: ignore[attr-defined]
    assert enqueued == [writes[2]]
    second.happened.set()
    assert not dones[1].results
    first.happened.set()
    until(lambda: len(enqueued) == 3, 5, "all are posted")
    assert enqueued[1:] == writes[:2]
    assert [done.wait() for done in dones] == [None] * 3
    rail.write(1, plan(200, first), Done())
    assert len(enqueued) == 4  # at once: it has happened


def test_a_source_that_is_never_written_fails_its_write_alone(rail: RdmaRail) -> None:
    broken, fine = Moment("CUDA_ERROR_LAUNCH_FAILED"), Moment()
    dones = [Done(), Done()]
    rail.write(1, plan(4096, broken), dones[0])
    rail.write(1, plan(8192, fine), dones[1])
    broken.happened.set()
    fine.happened.set()
    reason = "rdma: the source will not be written: CUDA_ERROR_LAUNCH_FAILED"
    assert dones[0].wait() == Failure(reason, True)
    assert dones[1].wait() is None


def test_a_nic_gets_tiles_as_ranges(rail: RdmaRail) -> None:
    start = np.array([1000], np.uint64)
    rail.write(1, CopyPlan.tiled(start, start, Tile.of(64, [(8, 256, 64)])), Done())
    (posted,) = rail.enqueued  # type: ignore[attr-defined]
    assert posted.tile is None
    assert posted.src.tolist() == [1000 + 256 * i for i in range(8)]
    assert posted.dst.tolist() == [1000 + 64 * i for i in range(8)]
