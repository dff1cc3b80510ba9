"""Both paths over real sockets: bytes land exactly where they should, and only with leave."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import PATHS, Endpoint, Failure, Receiver, process_vm
from mooncake_connector.kv_transfer.transport.syscalls import Scatter
from tests.unit.transport_peer import (
    SLICE_BYTES,
    Done,
    Initiator,
    Process,
    Watched,
    copy,
    random_bytes,
    span,
    until,
)

KEY = 7
NBYTES = 24 << 20


class Events:
    """What a receiver told its listeners, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def up(self, peer: str) -> None:
        self.seen.append(("up", peer))

    def down(self, peer: str, reason: str) -> None:
        self.seen.append(("down", peer, reason))

    def kinds(self) -> list[tuple[str, ...]]:
        return [event[:2] for event in self.seen]


class Local:
    """Target and initiator in this process, with memory to write into."""

    def __init__(self, path: str, connections: int = 2, nbytes: int = 1 << 20) -> None:
        self.path = path
        self.events = Events()
        self.receiver = Receiver(on_link_up=self.events.up, on_link_down=self.events.down)
        self.source = random_bytes(nbytes, 3)
        self.memory = np.zeros(nbytes, np.uint8)
        self.link = Watched(path, self.receiver.admit("p"), connections).up()
        until(lambda: self.events.seen == [("up", "p")], 2, "link up")

    def plan(self, src: int, dst: int, length: int) -> CopyPlan:
        return copy(self.source.ctypes.data + src, self.memory.ctypes.data + dst, length)

    def write(self, key: int, plan: CopyPlan) -> Failure | None:
        return self.link.write(key, plan)

    def grant(self, key: int, start: int, nbytes: int, peer: str = "p") -> None:
        self.receiver.grant(key, peer, span(self.memory.ctypes.data + start, nbytes))

    def close(self) -> None:
        self.link.close()
        self.receiver.close()


@pytest.fixture(params=PATHS)
def local(request: pytest.FixtureRequest) -> Iterator[Local]:
    local = Local(request.param)
    yield local
    local.close()


@pytest.fixture(scope="module")
def initiator() -> Iterator[Process]:
    process = Process(Initiator, NBYTES, 5)
    yield process
    process.end()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("connections", [1, 2, 4])
@pytest.mark.parametrize("size", [512, 3000, 1 << 16, 9 << 20])
def test_scattered_write_from_another_process(
    initiator: Process, path: str, connections: int, size: int
) -> None:
    events = Events()
    receiver = Receiver(on_link_up=events.up)
    memory = np.zeros(NBYTES, np.uint8)
    count = min(NBYTES // size, 12_000)
    order = np.random.default_rng(size).permutation(count) * size
    receiver.grant(
        KEY, "p", Ranges.of(memory.ctypes.data + order[: count // 2 + 1], np.full(count // 2 + 1, size))
    )
    initiator.call("open", path, receiver.admit("p"), connections)
    expected = memory.copy()
    source = random_bytes(NBYTES, 5)
    blocks = range(count // 2 + 1)
    for at in blocks:
        expected[order[at] : order[at] + size] = source[at * size : (at + 1) * size]
    where = [int(memory.ctypes.data + order[at]) for at in blocks]
    assert initiator.call("write", KEY, [at * size for at in blocks], where, [size] * len(blocks)) == []
    assert np.array_equal(memory, expected)
    landed = receiver.revoke(KEY)
    slices = len(list(copy(0, 0, size * len(blocks)).split(SLICE_BYTES)))
    assert landed.nbytes == size * len(blocks)
    assert landed.writes >= slices
    until(lambda: events.seen == [("up", "p")], 2, "link up")
    initiator.call("close")
    receiver.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_write_larger_than_a_frame_counts_once(path: str) -> None:
    local = Local(path, nbytes=20 << 20)
    local.grant(KEY, 0, 20 << 20)
    assert local.write(KEY, local.plan(0, 0, 20 << 20)) is None
    assert np.array_equal(local.memory, local.source)
    assert local.receiver.revoke(KEY).writes == 1
    local.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_hosts(host: str) -> None:
    receiver = Receiver(host)
    link = Watched("tcp", receiver.admit("p")).up()
    memory, one = np.zeros(8, np.uint8), np.ones(8, np.uint8)
    receiver.grant(1, "p", span(memory.ctypes.data, 8))
    assert link.write(1, copy(one.ctypes.data, memory.ctypes.data, 8)) is None
    assert memory.tolist() == [1] * 8
    link.close()
    receiver.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("write", [(0, 4096), (4095, 2), (8191, 2), (8192, 1), (0, 1 << 20)])
def test_a_write_outside_the_grant_is_refused_and_its_connection_closed(
    path: str, write: tuple[int, int]
) -> None:
    local = Local(path)
    local.grant(KEY, 4096, 4096)
    refused = local.write(KEY, local.plan(0, *write))
    assert refused is not None
    assert "outside" in refused.reason
    assert not refused.retry
    assert not local.memory.any()
    rail = f"{path}-0"
    until(lambda: ("fenced", rail) in local.link.kinds(), 2, "the connection was closed and fenced")
    assert local.write(KEY, local.plan(0, 4096, 4096)) is None  # over the other connection
    assert np.array_equal(local.memory[4096:8192], local.source[:4096])
    assert np.count_nonzero(local.memory) == 4096
    assert local.link.downs() == []
    local.close()


def test_one_frame_outside_refuses_the_write() -> None:
    local = Local("tcp", nbytes=10 << 20)
    local.grant(KEY, 0, 9 << 20)
    assert "outside" in str(local.write(KEY, local.plan(0, 0, 10 << 20)))
    assert not local.memory[9 << 20 :].any()
    assert local.receiver.revoke(KEY).writes == 0
    local.close()


def test_keys_that_never_were_a_peers_are_refused_and_the_connection_closed(local: Local) -> None:
    local.grant(KEY, 0, 1 << 20, peer="another")
    for index, key in enumerate((KEY, KEY + 1)):
        done = Done()
        local.link.rails[f"{local.path}-{index}"].write(key, local.plan(0, 0, 300 << 10), done)
        assert done.wait() == Failure(f"no grant {key} was ever this peer's", False)
    assert not local.memory.any()
    until(lambda: len(local.link.downs()) == 1, 2, "no connection is left")


def test_a_revoked_key_is_refused_at_no_cost_and_can_be_granted_again(local: Local) -> None:
    local.grant(KEY, 0, 4096)
    assert local.write(KEY, local.plan(0, 0, 10)) is None
    assert (local.receiver.revoke(KEY).nbytes, local.receiver.revoke(KEY).nbytes) == (10, 0)
    assert local.write(KEY, local.plan(0, 0, 20)) == Failure(f"no grant {KEY}: it was revoked", False)
    local.grant(KEY, 0, 4096)
    with pytest.raises(TransportError, match="granted already"):
        local.grant(KEY, 0, 1)
    assert local.write(KEY, local.plan(0, 0, 20)) is None
    assert np.count_nonzero(local.memory) == 20
    assert [event[0] for event in local.link.seen] == ["up", "up"]


def test_empty_write_is_answered(local: Local) -> None:
    empty = CopyPlan.of(np.array([], np.uint64), np.array([], np.uint64), np.array([], np.uint64))
    local.grant(KEY, 0, 1)
    assert local.write(KEY, empty) is None
    local.receiver.revoke(KEY)
    assert "no grant" in str(local.write(KEY, empty))


def test_many_concurrent_writes_each_end_once(local: Local) -> None:
    rows = 400
    size = (1 << 20) // rows
    local.grant(KEY, 0, 1 << 20)
    dones = [Done() for _ in range(rows)]
    rails = list(local.link.rails.values())

    def run(first: int) -> None:
        for row in range(first, rows, 4):
            rails[row % 2].write(KEY, local.plan(row * size, row * size, size), dones[row])

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.wait() for done in dones] == [None] * rows
    assert np.array_equal(local.memory[: rows * size], local.source[: rows * size])
    assert local.receiver.revoke(KEY).writes == rows
    assert [len(done.results) for done in dones] == [1] * rows


def test_close_ends_every_write_once(local: Local) -> None:
    local.grant(KEY, 0, 1 << 20)
    rail = next(iter(local.link.rails.values()))
    dones = [Done() for _ in range(200)]
    for done in dones:
        rail.write(KEY, local.plan(0, 0, 1 << 20), done)
    local.link.close()
    late = Done()
    rail.write(KEY, local.plan(0, 0, 8), late)
    closed = Failure("the link was closed here", True)
    assert {done.wait() for done in dones} <= {None, closed}
    assert late.wait(1) in (None, closed)
    until(lambda: ("down", "p") in local.events.kinds(), 1, "the target hears of it")
    assert all(len(done.results) == 1 for done in [*dones, late])
    assert local.link.downs() == []
    after = Done()
    rail.write(KEY, local.plan(0, 0, 8), after)
    assert after.results == [closed]


def test_drop_closes_the_link_without_telling_its_owner(local: Local) -> None:
    local.receiver.drop("p")
    until(lambda: bool(local.link.downs()), 1, "the initiator hears of it")
    assert len(local.link.downs()) == 1
    assert local.events.seen == [("up", "p")]


def test_new_admission_replaces_the_link(local: Local) -> None:
    endpoint = local.receiver.admit("p")
    assert local.events.kinds() == [("up", "p"), ("down", "p")]
    again = Watched("tcp", endpoint).up()
    local.grant(KEY, 0, 4096)
    assert again.write(KEY, local.plan(0, 0, 4096)) is None
    whole = [("up", "p"), ("down", "p"), ("up", "p")]
    until(lambda: local.events.kinds() == whole, 2, "the new link is up")
    until(lambda: len(local.link.downs()) == 1, 2, "the old link is down")
    again.close()


@pytest.mark.parametrize("token", [b"", b"x" * 32, b"x" * 1000])
def test_unknown_tokens_are_refused(local: Local, token: bytes) -> None:
    good = local.receiver.admit("q")
    link = Watched("tcp", Endpoint(good.host, good.port, token))
    until(lambda: bool(link.downs()), 2, "link down")
    assert "token is unknown" in link.downs()[0]
    local.grant(KEY, 0, 4096)
    assert local.write(KEY, local.plan(0, 0, 1)) is None


def test_a_token_admits_one_link(local: Local) -> None:
    endpoint = local.receiver.admit("q")
    first = Watched("tcp", endpoint).up()
    second = Watched("tcp", endpoint)
    until(lambda: bool(second.downs()), 2, "link down")
    assert "one link only" in second.downs()[0]
    local.grant(KEY, 0, 8, peer="q")
    assert first.write(KEY, local.plan(0, 0, 8)) is None
    first.close()
    until(lambda: ("down", "q") in local.events.kinds(), 2, "the link is down")
    third = Watched("tcp", endpoint)
    until(lambda: bool(third.downs()), 2, "link down")
    assert "token is unknown" in third.downs()[0]


def test_nobody_listens() -> None:
    receiver = Receiver()
    endpoint = receiver.admit("p")
    receiver.close()
    link = Watched("tcp", endpoint)
    until(lambda: bool(link.downs()), 2, "the refused connection is told")
    assert "can't connect" in link.downs()[0]
    assert [kind for kind, *_ in link.seen] == ["down", "down", "link"]
    link.close()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="advertise"):
        Receiver("0.0.0.0")
    receiver = Receiver()
    endpoint = receiver.admit("p")
    with pytest.raises(TransportError, match="port 0"):
        Receiver(port=endpoint.port)
    with pytest.raises(TransportError, match="process_vm, tcp"):
        Watched("pigeon", endpoint)
    with pytest.raises(TransportError, match="connections=0"):
        Watched("tcp", endpoint, connections=0)
    with pytest.raises(TransportError, match="64 bits"):
        receiver.grant(-1, "p", span(0, 1))
    receiver.close()


def test_a_failing_listener_harms_nobody(local: Local) -> None:
    local.grant(KEY, 0, 4096)

    def fail(failure: Failure | None) -> None:
        raise RuntimeError("planted")

    rail = next(iter(local.link.rails.values()))
    for _ in range(4):
        rail.write(KEY, local.plan(0, 0, 16), fail)
    assert local.write(KEY, local.plan(0, 0, 16)) is None


def test_readable_says_why_not() -> None:
    own = process_vm.identity()
    process_vm.allow_reader(own.pid)
    assert process_vm.readable(own) is None
    kind = type(own)
    cases = {
        "another host": kind(own.pid, "elsewhere", own.probe_address, own.probe_value),
        "no such process": kind(2**22, own.host_id, own.probe_address, own.probe_value),
        "is not the peer": kind(own.pid, own.host_id, own.probe_address, bytes(16)),
        "Bad address": kind(own.pid, own.host_id, 4096, own.probe_value),
        "no probe": kind(own.pid, own.host_id, own.probe_address, b""),
    }
    for reason, identity in cases.items():
        assert reason in str(process_vm.readable(identity))


def test_scatter_advances_over_any_cut() -> None:
    length = np.array([3, 5, 1, 8], np.uint64)
    address = np.array([100, 200, 300, 400], np.uint64)
    whole = [a + i for a, n in zip(address.tolist(), length.tolist(), strict=True) for i in range(n)]
    for first in range(len(whole)):
        for second in range(len(whole) - first):
            data = Scatter(address, length)
            data.advance(first)
            data.advance(second)
            assert data.left == len(whole) - first - second
            rows = data._iov[data._at :].tolist()
            assert [a + i for a, n in rows for i in range(n)] == whole[first + second :]
            assert data.count == len(rows)
