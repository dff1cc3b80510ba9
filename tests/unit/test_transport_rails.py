"""One connection of a link breaks: its writes fail, it is fenced over another one, and it comes back."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import (
    PATHS,
    Failure,
    Receiver,
    SourceIdentity,
    identity,
    outgoing,
    wire,
)
from mooncake_connector.kv_transfer.transport.checksum import xxh3
from mooncake_connector.kv_transfer.transport.link import StreamLink
from mooncake_connector.kv_transfer.transport.stream import MAX_QUEUED
from tests.unit.transport_peer import (
    Done,
    Initiator,
    Process,
    Raw,
    Watched,
    copy,
    random_bytes,
    span,
    until,
)

KEY = 3
NBYTES = 4 << 20
BOTH = ("process_vm", "tcp")


class World:
    """A target and an initiator in this process."""

    def __init__(self, connections: int = 2, paths: tuple[str, ...] = BOTH, **options: object) -> None:
        self.told: list[tuple[str, ...]] = []
        self.receiver = Receiver(
            on_link_up=lambda peer: self.told.append(("up", peer)),
            on_link_down=lambda peer, reason: self.told.append(("down", peer)),
        )
        self.source = random_bytes(NBYTES, 1)
        self.memory = np.zeros(NBYTES, np.uint8)
        self.receiver.grant(KEY, "p", span(self.memory.ctypes.data, NBYTES))
        self.endpoint = self.receiver.admit("p")
        self.watched = Watched(paths, self.endpoint, connections, **options).up()
        until(lambda: self.told == [("up", "p")], 2, "the target knows that the link is up")

    @property
    def link(self) -> StreamLink:
        return self.watched.link

    def write(self, rail: str, at: int = 0, nbytes: int = 4096) -> Done:
        done = Done()
        plan = copy(self.source.ctypes.data + at, self.memory.ctypes.data + at, nbytes)
        self.watched.rails[rail].write(KEY, plan, done)
        return done

    def ask(self, topic: str, body: bytes) -> bytes | Failure:
        done = Done()
        self.link.ask(topic, body, done)
        answer: bytes | Failure = done.wait()
        return answer

    def heard(self, *kinds: tuple[str, ...], since: int = 0) -> None:
        """Wait until these were told, in this order, perhaps with others between them."""

        def told() -> bool:
            events = iter(self.watched.kinds()[since:])
            return all(kind in events for kind in kinds)

        until(told, 2, f"{kinds}, not only {self.watched.seen}")

    def close(self) -> None:
        self.watched.close()
        self.receiver.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def hang_up(world: World, index: int) -> None:
    """Cut a connection under the link's feet."""
    sock = world.link._slots[index].stream.sock
    assert sock is not None
    wire.hang_up(sock)


def hang_up_at_target(world: World, index: int) -> None:
    wire.hang_up(world.receiver._links["p"].inlets[index]._sock)


def abandon(world: World, index: int) -> None:
    world.link.abandon(f"tcp-{index}", "stuck")


cuts = pytest.mark.parametrize("cut", [hang_up, hang_up_at_target, abandon])


@cuts
def test_a_broken_connection_is_fenced_and_comes_back(
    world: World, cut: Callable[[World, int], None]
) -> None:
    rails = dict(world.watched.rails)
    cut(world, 1)
    for path in BOTH:
        world.heard(("down", f"{path}-1"), ("fenced", f"{path}-1"))
    assert sorted(world.watched.rails) == ["process_vm-0", "tcp-0"]
    dead = Done()
    rails["tcp-1"].write(KEY, copy(0, 0, 1), dead)
    assert dead.results[0].retry
    assert world.write("tcp-0").wait() is None
    assert world.write("process_vm-0").wait() is None
    world.link.restore("tcp-1")
    for path in BOTH:
        world.heard(("down", f"{path}-1"), ("fenced", f"{path}-1"), ("up", f"{path}-1"))
        assert world.write(f"{path}-1", at=8192).wait() is None
    assert np.array_equal(world.memory[8192:12288], world.source[8192:12288])
    assert world.told == [("up", "p")]
    assert len(world.watched.kinds()) == 4 + 4 + 2


@cuts
def test_it_breaks_and_comes_back_again_and_again(world: World, cut: Callable[[World, int], None]) -> None:
    for round in range(30):
        index = round % 2
        rail = f"tcp-{index}"
        before = len(world.watched.seen)
        cut(world, index)
        world.heard(("down", rail), *[("fenced", rail)] * (round % 3 > 0), since=before)
        world.link.restore(rail)  # which may have to wait for the fence
        until(lambda: len(world.watched.rails) == 4, 2, "up again")
        assert world.write(rail, at=round * 4096).wait() is None
    assert world.watched.downs() == []
    assert world.told == [("up", "p")]


@cuts
def test_the_last_connection_ends_the_link_once(world: World, cut: Callable[[World, int], None]) -> None:
    cut(world, 0)
    cut(world, 1)
    until(lambda: bool(world.watched.downs()), 2, "link down")
    until(lambda: world.told == [("up", "p"), ("down", "p")], 2, "the target knows")
    time.sleep(0.05)
    assert len(world.watched.downs()) == 1
    assert world.watched.kinds()[-1] == ("link",)
    assert world.ask("topic", b"") == Failure("no connection of the link is up", True)
    world.link.restore("tcp-0")
    world.link.abandon("tcp-0", "late")
    again = Watched("tcp", world.endpoint)
    until(lambda: bool(again.downs()), 2, "the token has been used up")


@pytest.mark.parametrize("path", PATHS)
def test_nothing_lands_after_the_fence(path: str) -> None:
    """The peer writes on after its rail went down: what its kernel still holds must not land."""
    process = Process(Initiator, NBYTES, 5)
    receiver = Receiver()
    memory = np.zeros(NBYTES, np.uint8)
    process.call("open", path, receiver.admit("p"), 2)
    for round in range(10):
        receiver.grant(round, "p", span(memory.ctypes.data, NBYTES))
        rail = f"{path}-{round % 2}"
        reasons = process.call("break_busy", round, memory.ctypes.data, rail, round / 2)
        memory[:] = 0
        time.sleep(0.02)
        assert not memory.any()
        assert "stuck" in reasons
        receiver.revoke(round)
        process.call("restore", rail)
    process.end()
    receiver.close()


def test_a_fence_holds_back_what_came_before_it() -> None:
    """One connection is in the middle of a frame, another has not even said hello."""
    receiver = Receiver()
    memory = np.zeros(NBYTES, np.uint8)
    receiver.grant(KEY, "p", span(memory.ctypes.data, NBYTES))
    endpoint = receiver.admit("p")
    first = Raw(endpoint, connections=3)
    second = Raw(endpoint, index=1, connections=3)
    second.send(KEY, 1, copy(0, memory.ctypes.data, NBYTES), b"\1" * 1000)
    until(lambda: np.count_nonzero(memory) == 1000, 2, "half of it has landed")
    for number, index in enumerate((1, 2)):
        first.sock.sendall(wire.question(number, wire.FENCE, wire.FENCED.pack(index, 0)))
        assert first.reply() == (number, wire.LANDED, b"")
    assert second.sock.recv(1) == b""
    with contextlib.suppress(OSError):  # the target has hung up
        second.sock.sendall(b"\1" * NBYTES)
    time.sleep(0.02)
    assert np.count_nonzero(memory) == 1000
    for index in (1, 2):
        assert "one link only" in str(Raw(endpoint, index=index, connections=3).welcome.refusal)
        assert Raw(endpoint, index=index, connections=3, incarnation=1).welcome == wire.Welcome()
    receiver.close()


def test_a_connection_comes_back_before_the_target_saw_it_break() -> None:
    receiver = Receiver()
    memory = np.zeros(NBYTES, np.uint8)
    receiver.grant(KEY, "p", span(memory.ctypes.data, NBYTES))
    endpoint = receiver.admit("p")
    first = Raw(endpoint)
    first.send(KEY, 1, copy(0, memory.ctypes.data, NBYTES), b"\1" * 1000)
    again = Raw(endpoint, incarnation=1)
    assert again.welcome == wire.Welcome()
    assert first.sock.recv(1) == b""
    again.send(KEY, 1, copy(0, memory.ctypes.data, 4), b"\2" * 4)
    assert again.reply() == (1, wire.LANDED, b"")
    receiver.close()


@pytest.mark.parametrize(
    "fields", [{"link": b"other"}, {"token": b"x" * 32}, {"connections": 3}, {"index": 2}]
)
def test_a_stranger_can_not_join_a_link(fields: dict[str, object]) -> None:
    receiver = Receiver()
    endpoint = receiver.admit("p")
    first = Raw(endpoint, connections=2)
    assert first.welcome == wire.Welcome()
    refusal = Raw(endpoint, **({"index": 1, "connections": 2, "incarnation": 9} | fields)).welcome.refusal
    assert "one link only" in str(refusal) or "token is unknown" in str(refusal)
    assert Raw(endpoint, index=1, connections=2).welcome == wire.Welcome()
    receiver.close()


@pytest.mark.parametrize("address", [-1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("field", ["challenge_address", "mailbox_address"])
def test_addresses_that_can_not_be_are_refused(field: str, address: int) -> None:
    receiver = Receiver()
    assert "malformed" in str(Raw(receiver.admit("p"), **{field: address}).welcome.refusal)
    receiver.close()


def test_fences_are_refused_for_oneself_and_for_connections_that_are_none() -> None:
    receiver = Receiver()
    raw = Raw(receiver.admit("p"))
    for number, body in enumerate([b"", wire.FENCED.pack(0, 0), wire.FENCED.pack(7, 0)]):
        raw.sock.sendall(wire.question(number, wire.FENCE, body))
        assert raw.reply()[1] == wire.REFUSED
    receiver.close()


def test_the_target_hears_of_a_link_that_never_gets_all_of_its_connections() -> None:
    told: list[str] = []
    receiver = Receiver(on_link_up=told.append)
    first = Raw(receiver.admit("p"), connections=2)
    time.sleep(0.05)
    assert told == []
    first.sock.sendall(wire.question(1, wire.FENCE, wire.FENCED.pack(1, 0)))
    assert first.reply()[1] == wire.LANDED
    assert told == ["p"]
    receiver.close()


# ---------------------------------------------------------------------- process_vm


def test_memory_that_can_not_be_read_costs_only_that_rail(world: World) -> None:
    nowhere = copy(4096, world.memory.ctypes.data, 64)
    dones = [Done() for _ in range(50)]
    rail = world.watched.rails["process_vm-0"]
    for done in dones:
        rail.write(KEY, nowhere, done)
    failures = [done.wait() for done in dones]
    assert all(failure.retry for failure in failures)
    assert "Bad address" in failures[0].reason
    world.heard(("down", "process_vm-0"), ("fenced", "process_vm-0"))
    assert sorted(world.watched.rails) == ["process_vm-1", "tcp-0", "tcp-1"]
    assert world.write("tcp-0").wait() is None
    world.link.restore("process_vm-0")
    world.heard(("fenced", "process_vm-0"), ("up", "process_vm-0"))
    assert world.write("process_vm-0", at=8192).wait() is None
    assert [len(done.results) for done in dones] == [1] * 50


def claim(**fields: object) -> SourceIdentity:
    own = identity()
    values = {name: getattr(own, name) for name in own.__struct_fields__} | fields
    return SourceIdentity(**values)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"host_id": "elsewhere"}, "another host"),
        ({"pid": 2**22}, "No such process"),
        ({"pid": 2**40}, "process 1099511627776"),
        ({"pid": -1}, "process -1"),
    ],
)
def test_an_unreadable_initiator_gets_tcp_alone(source: dict[str, object], reason: str) -> None:
    receiver = Receiver()
    watched = Watched(BOTH, receiver.admit("p"), 1, source=claim(**source))
    until(lambda: len(watched.seen) == 3, 2, "three events")
    assert watched.seen[0][:2] == ("down", "process_vm-0")
    assert reason in watched.seen[0][2]
    assert watched.kinds()[1:] == [("fenced", "process_vm-0"), ("up", "tcp-0")]
    watched.link.restore("process_vm-0")
    until(lambda: len(watched.seen) == 5, 2, "it can't be restored")
    assert watched.kinds()[3:] == [("down", "process_vm-0"), ("fenced", "process_vm-0")]
    watched.close()
    receiver.close()


def test_a_peer_can_not_have_another_process_read() -> None:
    """It knows what another process has in its memory, and claims to be that process."""
    victim = Process(Initiator, 4096, 1)
    own = victim.call("identity")
    receiver = Receiver()
    memory = np.zeros(64, np.uint8)
    receiver.grant(KEY, "p", span(memory.ctypes.data, 64))
    raw = Raw(receiver.admit("p"), source=own, challenge_address=own.probe_address)
    assert len(raw.welcome.challenge) == 32
    wire.put(raw.sock, wire.Ready())
    assert "is not the peer" in str(wire.get(raw.sock, wire.Welcome).unreadable)
    head = wire.frame_head(wire.REFERENCE, KEY, 1, copy(own.probe_address, memory.ctypes.data, 16))
    raw.sock.sendall(head)
    assert raw.reply()[1] == wire.UNREADABLE
    assert not memory.any()
    victim.end()
    receiver.close()


# ---------------------------------------------------------------------- checksums


@pytest.mark.parametrize("path", PATHS)
def test_checksums_of_scattered_writes_match(path: str) -> None:
    world = World(1, (path,), checksum=True)
    order = np.random.default_rng(4).permutation(NBYTES // 1000) * 1000
    src = world.source.ctypes.data + order
    dst = world.memory.ctypes.data + np.roll(order, 7)
    assert world.watched.write(KEY, CopyPlan.of(src, dst, np.full(order.size, 1000))) is None
    assert world.write(f"{path}-0", nbytes=0).wait() is None
    assert world.receiver.mismatches == 0
    world.close()


def test_bytes_that_are_not_those_sent_are_not_acknowledged() -> None:
    receiver = Receiver()
    memory, source = np.zeros(8192, np.uint8), random_bytes(8192, 2)
    receiver.grant(KEY, "p", span(memory.ctypes.data, 8192))
    raw = Raw(receiver.admit("p"))
    here, there = np.array([source.ctypes.data]), np.array([8192])
    checksum = xxh3(here.astype(np.uint64), there.astype(np.uint64))
    plan = copy(source.ctypes.data, memory.ctypes.data, 8192)
    raw.send(KEY, 1, plan, source.tobytes(), wire.LAST | wire.CHECKED, checksum)
    assert raw.reply() == (1, wire.LANDED, b"")
    source[4711] ^= 1
    raw.send(KEY, 2, plan, source.tobytes(), wire.LAST | wire.CHECKED, checksum)
    number, status, said = raw.reply()
    assert (number, status) == (2, wire.FAILED)
    assert b"checksum mismatch" in said
    assert receiver.mismatches == 1
    assert receiver.revoke(KEY).writes == 1
    receiver.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_mismatch_fails_the_write_and_may_be_tried_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(1, (path,), checksum=True)
    monkeypatch.setattr(outgoing, "xxh3", lambda address, length: 1)
    failure = world.write(f"{path}-0").wait()
    assert failure.retry
    assert "checksum mismatch" in failure.reason
    monkeypatch.undo()
    assert world.write(f"{path}-0").wait() is None
    world.close()


# ---------------------------------------------------------------------- questions


def test_questions_are_answered_by_their_handlers(world: World) -> None:
    world.receiver.serve("twice", lambda peer, body: peer.encode() + 2 * body)
    assert world.ask("twice", b"x") == b"pxx"
    large = random_bytes(wire.MAX_BODY_BYTES // 2 - 1, 1).tobytes()
    assert world.ask("twice", large) == b"p" + 2 * large
    with pytest.raises(TransportError, match="at most"):
        world.ask("twice", 3 * large)
    with pytest.raises(TransportError, match="has a handler"):
        world.receiver.serve("twice", lambda peer, body: body)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [(TransportError("planted"), "planted"), (ValueError("planted"), "the handler of 'bad' failed")],
)
def test_a_failing_handler_is_answered(world: World, fails: Exception, reason: str) -> None:
    def handler(peer: str, body: bytes) -> bytes:
        raise fails

    world.receiver.serve("bad", handler)
    world.receiver.serve("vast", lambda peer, body: bytes(wire.MAX_BODY_BYTES + 1))
    assert world.ask("bad", b"") == Failure(reason, False)
    assert "too many" in str(world.ask("vast", b""))
    assert "nobody answers" in str(world.ask("unknown", b""))
    assert world.write("tcp-0").wait() is None


def test_questions_that_the_connection_broke_under_end_once(world: World) -> None:
    go = threading.Event()
    world.receiver.serve("slow", lambda peer, body: bytes(go.wait(5)))
    dones = [Done() for _ in range(3)]
    for done in dones:
        world.link.ask("slow", b"", done)
    world.link.abandon("tcp-0", "stuck")
    assert [done.wait() for done in dones] == [Failure("stuck", True)] * 3
    world.heard(("fenced", "tcp-0"))  # although its thread is still busy
    go.set()
    time.sleep(0.05)
    assert [len(done.results) for done in dones] == [1] * 3


def test_a_target_that_does_not_read_blocks_senders_not_memory() -> None:
    world = World(connections=1, paths=("tcp",))
    stall, stalled = threading.Event(), threading.Event()

    def handler(peer: str, body: bytes) -> bytes:
        stalled.set()
        stall.wait(20)
        return b""

    world.receiver.serve("stall", handler)
    world.link.ask("stall", b"", Done())
    assert stalled.wait(2)
    dones = [world.write("tcp-0", nbytes=1 << 20) for _ in range(MAX_QUEUED + 50)]
    refused = [done for done in dones if done.results]
    assert len(refused) == 51  # the question waits, too
    assert all("frames wait already" in done.wait().reason and done.wait().retry for done in refused)
    world.link.abandon("tcp-0", "enough")
    assert all(done.wait().retry for done in dones)
    stall.set()
    world.close()


def test_bad_rails_are_named(world: World) -> None:
    for rail in ("tcp-2", "rdma-0", "tcp", "tcp-x"):
        with pytest.raises(TransportError, match="is unknown"):
            world.link.restore(rail)
    assert world.link.marks() == ()
