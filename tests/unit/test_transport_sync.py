"""Small writes whose caller waits: by mailbox, by hand or the usual way, they land or end as any other."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import PATHS, Failure, Receiver, wire
from mooncake_connector.kv_transfer.transport.mailbox import Mailbox, Visitor
from mooncake_connector.kv_transfer.transport.stream_rail import StreamRail
from mooncake_connector.kv_transfer.transport.sync_write import SMALL_BYTES, SyncWriter
from tests.unit.transport_peer import (
    Done,
    HeldTarget,
    Initiator,
    Process,
    Watched,
    copy,
    random_bytes,
    span,
    until,
)

KEY = 1
NBYTES = 4 << 20


class World:
    """A target in another process, so that both ends run at the same time."""

    def __init__(self, path: str, connections: int = 2, **options: object) -> None:
        self.path = path
        self.target = Process(HeldTarget, NBYTES)
        self.endpoint, self.address = self.target.call("admit", "p", KEY)
        self.source = random_bytes(NBYTES, 1)
        self.link = Watched(path, self.endpoint, connections, **options).up()

    def rail(self, index: int = 0) -> StreamRail:
        rail = self.link.rails[f"{self.path}-{index}"]
        assert isinstance(rail, StreamRail)
        return rail

    def write(self, at: int, nbytes: int, index: int = 0, timeout: float = 5) -> Failure | None:
        plan = copy(self.source.ctypes.data + at, self.address + at, nbytes)
        return self.rail(index).write_sync(KEY, plan, timeout)

    def check(self, start: int, end: int) -> None:
        assert self.target.call("read", start, end - start) == self.source[start:end].tobytes()

    def close(self) -> None:
        self.link.close()
        self.target.end()


@pytest.fixture(params=PATHS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def test_writes_land_one_after_the_other(world: World) -> None:
    at = 0
    for nbytes in [1, 7, 4096, SMALL_BYTES, SMALL_BYTES + 1, 300_000, *[4096] * 300]:
        assert world.write(at, nbytes) is None
        at += nbytes
    world.check(0, at)
    assert world.target.call("revoke", KEY).writes == 306


def test_most_of_them_go_by_the_mailbox(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("process_vm")
    went: list[bool] = []
    by_mailbox = SyncWriter._by_mailbox

    def counted(*args: object) -> bool:
        went.append(by_mailbox(*args))  # type: ignore[arg-type]
        return went[-1]

    monkeypatch.setattr(SyncWriter, "_by_mailbox", counted)
    for number in range(500):
        assert world.write(number * 4096, 4096) is None
    world.check(0, 500 * 4096)
    assert sum(went) > 100
    world.close()


def test_scattered_and_empty_writes_take_the_usual_way(world: World) -> None:
    src = world.source.ctypes.data + np.arange(0, 80_000, 8000)
    dst = world.address + np.arange(0, 80_000, 8000)
    assert world.rail().write_sync(KEY, CopyPlan.of(src, dst, np.full(10, 4000))) is None
    assert world.rail().write_sync(KEY, CopyPlan.of(src[:0], dst[:0], src[:0])) is None
    world.check(8000, 12000)


@pytest.mark.parametrize("path", PATHS)
def test_with_checksums(path: str) -> None:
    world = World(path, checksum=True)
    for number in range(50):
        assert world.write(number * 4096, 4096) is None
    world.check(0, 50 * 4096)
    world.close()


def test_threads_and_ways_mixed(world: World) -> None:
    rows, size = 200, 4096
    failures: list[object] = []

    def run(first: int) -> None:
        for row in range(first, rows, 4):
            if row % 3:
                failures.append(world.write(row * size, size, row % 2))
            else:
                done = Done()
                plan = copy(world.source.ctypes.data + row * size, world.address + row * size, size)
                world.rail(row % 2).write(KEY, plan, done)
                failures.append(done.wait())

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [None] * rows
    world.check(0, rows * size)


def test_refusals_are_the_usual_ones(world: World) -> None:
    for _ in range(20):
        assert world.write(0, 4096) is None
    world.target.call("revoke", KEY)
    assert world.write(4096, 4096) == Failure(f"no grant {KEY}: it was revoked", False)
    assert world.target.call("read", 4096, 4096) == bytes(4096)
    outside = world.rail().write_sync(KEY + 1, copy(world.source.ctypes.data, world.address, 8))
    assert "ever this peer's" in str(outside)
    until(lambda: ("fenced", f"{world.path}-0") in world.link.kinds(), 2, "that cost the connection")


def test_memory_that_can_not_be_read() -> None:
    world = World("process_vm")
    for _ in range(20):
        assert world.write(0, 4096) is None
    failure = world.rail().write_sync(KEY, copy(4096, world.address, 64))
    assert "Bad address" in str(failure)
    until(lambda: ("fenced", "process_vm-0") in world.link.kinds(), 2, "the rail is down")
    assert world.write(0, 4096, 1) is None
    world.close()


def test_a_connection_that_breaks_meanwhile(world: World) -> None:
    results: list[Failure | None] = []

    def run() -> None:
        rail = world.rail()
        while not results or results[-1] is None:
            plan = copy(world.source.ctypes.data, world.address, 4096)
            results.append(rail.write_sync(KEY, plan))

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: len(results) > 50, 5, "writes land")
    world.link.link.abandon(f"{world.path}-0", "stuck")
    thread.join(5)
    assert results[-1] == Failure("stuck", True)
    assert world.rail(1).write_sync(KEY, copy(world.source.ctypes.data, world.address, 64)) is None


@pytest.mark.parametrize("resume", [True, False])
def test_a_target_that_is_stopped(world: World, resume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets its answer when nothing can land any more: after a fence, or the link's end."""
    monkeypatch.setattr(wire, "SILENCE_S", 1.0)
    for _ in range(20):
        assert world.write(0, 4096) is None
    world.target.signal(signal.SIGSTOP)
    time.sleep(0.05)
    if resume:
        threading.Timer(0.7, world.target.signal, (signal.SIGCONT,)).start()
    start = time.monotonic()
    failure = world.write(4096, 4096, timeout=0.3)
    took = time.monotonic() - start
    assert failure == Failure("no reply within 0.3 s", True)
    assert ("link",) not in world.link.kinds() or not resume
    assert (0.5 if resume else 1.2) < took < 3
    if not resume:
        until(lambda: bool(world.link.downs()), 1, "link down")
        assert "did not confirm a fence" in world.link.downs()[0]
        world.target.signal(signal.SIGCONT)


def test_nothing_of_a_mailbox_lands_after_the_fence() -> None:
    """The initiator dies to its link with a frame in the mailbox, and lives on."""
    process = Process(Initiator, NBYTES, 5)
    receiver = Receiver()
    memory = np.zeros(NBYTES, np.uint8)
    process.call("open", "process_vm", receiver.admit("p"), 2)
    for round in range(10):
        receiver.grant(round, "p", span(memory.ctypes.data, NBYTES))
        process.call("break_sync", round, memory.ctypes.data, "process_vm-0", 5.0 + round / 3)
        memory[:] = 0
        time.sleep(0.02)
        assert not memory.any()
        receiver.revoke(round)
        process.call("restore", "process_vm-0")
    process.end()
    receiver.close()


def test_a_mailbox_holds_one_frame_and_one_answer() -> None:
    box = Mailbox()
    visitor = Visitor(os.getpid(), box.address)
    assert visitor.look() is None
    for round in range(300):
        frame = bytes([round % 256]) * wire.HEAD_BYTES
        box.post(frame)
        assert box.answer() is None
        assert (visitor.look(), visitor.look()) == (frame, None)
        visitor.answer(round % 4)
        assert box.answer() == round % 4
