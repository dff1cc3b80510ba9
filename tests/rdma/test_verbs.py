"""The rdma transport on real verbs: bytes, fences, refusals, deaths."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.topology import discover
from mooncake_connector.kv_transfer.transport.rdma import RdmaDevices, queue_pair, unavailable, verbs
from mooncake_connector.kv_transfer.transport.rdma.poster import ObjectPoster, layout_problem
from mooncake_connector.kv_transfer.transport.rdma.rail import RdmaRail
from mooncake_connector.kv_transfer.transport.rdma.wr import Keys
from tests.rdma.nics import Cables, Nic, guest_only
from tests.rdma.rdma_peer import Link, Peer, Writes, region

NBYTES = 4 << 20
_rng = np.random.default_rng(3)
SOURCE = _rng.integers(1, 256, NBYTES, np.uint8)


@pytest.fixture(scope="module")
def devices() -> Iterator[RdmaDevices]:
    devices = RdmaDevices(discover().nics)
    devices.register(region(SOURCE))
    yield devices
    devices.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    peer = Peer(NBYTES)
    yield peer
    peer.end()


@pytest.fixture
def link(devices: RdmaDevices, peer: Peer, request: pytest.FixtureRequest) -> Iterator[Link]:
    """One rail, over the first NIC."""
    link = Link(peer, request.node.name, devices.nics[:1], 1)
    link.until(lambda: len(link.up) == 2, "a rail to each of the target's NICs")
    peer.call("wipe")
    yield link
    link.close()


def one_rail(link: Link) -> RdmaRail:
    rail = link.up[min(link.up)]
    assert isinstance(rail, RdmaRail)
    return rail


def plan_of(link: Link, src: list[int], dst: list[int], length: list[int]) -> CopyPlan:
    base = np.uint64(SOURCE.ctypes.data)
    there = [link.address + d for d in dst]
    return CopyPlan.of(np.array(src, np.uint64) + base, np.array(there, np.uint64), np.array(length))


def scattered(link: Link, nbytes: int, size: int) -> tuple[CopyPlan, np.ndarray]:
    """Slots of `size` from anywhere to anywhere, by twos in the target; and what shall be there."""
    slots = NBYTES // size
    n = nbytes // size
    src = _rng.permutation(slots)[:n] * size
    starts = _rng.permutation(slots // 2)[: n // 2] * 2
    dst = np.stack((starts, starts + 1), axis=1).reshape(-1)[:n] * size
    expected = np.zeros(NBYTES, np.uint8)
    for s, d in zip(src, dst, strict=True):
        expected[d : d + size] = SOURCE[s : s + size]
    return plan_of(link, src.tolist(), dst.tolist(), [size] * n), expected


def test_fast_posting_is_sound_with_this_pyverbs() -> None:
    from pyverbs.wr import SendWR

    assert unavailable() is None
    assert layout_problem() is None
    assert (
        layout_problem(lambda **to: SendWR(**{**to, "imm_data": 5}))
        == "field imm is 0x5000000, not 0x1020304"
    )
    assert (
        layout_problem(lambda **to: SendWR(**{**to, "wr_id": 5}))
        == "the C struct isn't found inside its object"
    )


@pytest.mark.parametrize("nics", [1, 2])
def test_scattered_writes_land_byte_for_byte(devices: RdmaDevices, peer: Peer, nics: int) -> None:
    link = Link(peer, f"scattered-{nics}", devices.nics[:nics], 2)
    peer.call("wipe")
    link.until(lambda: len(link.up) == 4, "two rails for each of two pairs")
    plan, expected = scattered(link, 1 << 20, 8192)
    writes = Writes()
    rails = list(link.up.values())
    for i, piece in enumerate(plan.split(100_000)):
        writes.start(rails[i % len(rails)], piece)
    assert writes.end() == [None] * 11
    assert link.landed()
    assert peer.call("read") == expected.tobytes()
    link.close()


def test_more_requests_than_the_queue_holds(link: Link) -> None:
    plan, expected = scattered(link, 600 << 10, 64)
    assert plan.length.size > 4000
    writes = Writes()
    rail = one_rail(link)
    for piece in plan.split(1 << 30, 3000):
        writes.start(rail, piece)
    assert set(writes.end(60)) == {None}
    assert link.landed()
    assert link.peer.call("read") == expected.tobytes()


def test_slow_posting_and_unseen_events_work_too(
    devices: RdmaDevices, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_pair, "poster", ObjectPoster)
    monkeypatch.setattr(verbs, "event_fd", lambda make: (make(), None))
    link = Link(peer, "slow", devices.nics[:1], 1)
    peer.call("wipe")
    plan, expected = scattered(link, 1 << 18, 4096)
    writes = Writes()
    writes.start(one_rail(link), plan)
    assert writes.end() == [None]
    assert link.landed()
    assert peer.call("read") == expected.tobytes()
    link.close()


def test_marks_wait_for_what_has_not_landed(link: Link) -> None:
    (mark,) = [m for m in link.rails.marks() if m.rail == 1]
    later = type(mark)(mark.rail, mark.count + 1)
    assert not link.peer.call("wait", link.name, (later,), 0.3)
    writes = Writes()
    writes.start(one_rail(link), plan_of(link, [0], [0], [10]))
    assert writes.end() == [None]
    assert link.peer.call("wait", link.name, (later,), 10)


def test_destroyed_rails_fence_late_writes(link: Link) -> None:
    writes = Writes()
    rail = one_rail(link)
    writes.keep_starting(rail, plan_of(link, [0], [0], [NBYTES // 2]), 100)
    link.peer.call("fence_peer", link.name)
    link.peer.call("wipe")
    ends = writes.end(10)
    failures = [end for end in ends if end is not None]
    assert failures
    assert all(failure.retry for failure in failures)
    assert not any(link.peer.call("read"))


def test_an_abandoned_rail_is_fenced_and_comes_back(link: Link) -> None:
    rail = one_rail(link)
    name = rail.name
    writes = Writes()
    writes.keep_starting(rail, plan_of(link, [0], [0], [NBYTES // 2]), 20)
    link.rails.abandon(name, "it is stuck")
    assert {end.reason for end in writes.end() if end} == {"it is stuck"}
    link.rails.restore(name)  # before its fence: it waits
    link.until(lambda: link.log.count(("up", name)) == 2, "the rail's return")
    kinds = [kind for kind, of in link.log if of == name]
    assert kinds == ["up", "down", "fenced", "up"]
    writes = Writes()
    writes.start(rail, plan_of(link, [0], [0], [10]))
    assert writes.end()[0].retry, "the rail of before stays down"
    writes = Writes()
    writes.start(link.up[name], plan_of(link, [100], [200], [50]))
    assert writes.end() == [None]
    assert link.landed()
    assert link.peer.call("read")[200:250] == SOURCE[100:150].tobytes()


def test_memory_that_nobody_registered_is_named(link: Link) -> None:
    rail = one_rail(link)
    writes = Writes()
    writes.start(rail, plan_of(link, [0], [NBYTES], [10]))
    writes.start(rail, plan_of(link, [NBYTES + (1 << 30)], [0], [10]))
    there, here = writes.end()
    assert not there.retry
    assert f"{link.address + NBYTES:#x} is in no region that the target has registered" in there.reason
    assert not here.retry
    assert "this process has registered" in here.reason
    writes = Writes()
    writes.start(rail, plan_of(link, [0], [0], [10]))
    assert writes.end() == [None], "the rail lives on"


def test_memory_registered_late_is_asked_for(link: Link) -> None:
    address = link.peer.call("register_late")
    writes = Writes()
    writes.start(one_rail(link), plan_of(link, [0], [address - link.address], [1000]))
    assert writes.end() == [None]
    assert link.landed()
    assert link.peer.call("read_late")[:1000] == SOURCE[:1000].tobytes()


@pytest.mark.parametrize("what", ["key", "range", "registration"])
def test_the_nic_refuses_what_was_not_granted(link: Link, what: str) -> None:
    rail = one_rail(link)
    start, nbytes, there = link.address, NBYTES, rail.there
    key = int(there.key[there.start == start][0])
    if what == "key":
        rail.there = Keys.of([(start, nbytes, start, key ^ 0xFF)], remote=True)
    elif what == "range":
        rail.there = Keys.of([(start, nbytes + 4096, start, key)], remote=True)
    else:
        link.peer.call("deregister")
    writes = Writes()
    writes.start(rail, plan_of(link, [0], [NBYTES - 4096], [8192 if what == "range" else 4096]))
    writes.start(rail, plan_of(link, [0], [0], [10]))
    blamed, other = writes.end()
    if what == "registration":
        link.peer.call("register")
    assert not blamed.retry
    assert f"refused a write to {start + NBYTES - 4096:#x} of region {start:#x}.." in blamed.reason
    assert other.retry
    link.until(lambda: link.saw("fenced", rail.name), "the fence")
    assert not any(link.peer.call("read")[NBYTES - 4096 :])


def test_a_gid_index_that_is_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"rdma_gid_index=200: on rxe\d that index does not exist; usable there: "
    ):
        RdmaDevices(discover().nics, gid_index=200)


@guest_only
def test_a_port_that_goes_down_takes_its_rails_with_it(
    devices: RdmaDevices, peer: Peer, cables: Cables, nics: list[Nic]
) -> None:
    link = Link(peer, "cables", devices.nics, 1)
    link.until(lambda: len(link.up) == 2, "a rail for each NIC")
    gone = next(nic for nic in nics if nic.device == "rxe1")
    name = "rdma-rxe1-rxe1-0"
    start = time.monotonic()
    cables.pull(gone)
    link.until(lambda: link.saw("fenced", name), "the rail's end", 5)
    assert time.monotonic() - start < 3
    assert "rdma-rxe0-rxe0-0" in link.up
    link.rails.restore(name)
    link.until(lambda: link.log.count(("down", name)) == 2, "the restoration's failure")
    cables.plug(gone)
    link.rails.restore(name)
    link.until(lambda: name in link.up, "the rail's return")
    writes = Writes()
    writes.start(link.up[name], plan_of(link, [0], [0], [100]))
    assert writes.end() == [None]
    link.close()


def test_a_killed_peer_is_noticed_within_3_s(devices: RdmaDevices) -> None:
    peer = Peer(NBYTES)
    link = Link(peer, "killed", devices.nics[:1], 1)
    writes = Writes()
    rail = one_rail(link)
    writes.keep_starting(rail, plan_of(link, [0], [0], [NBYTES // 2]), 100)
    peer.kill()
    failures = [end for end in writes.end(10) if end is not None]
    assert failures
    assert all(failure.retry for failure in failures)
    assert writes.seconds < 3
    link.close()
    peer.end()
