"""What the transports owe when a process is stopped or killed, above all: nothing lands after `revoke`."""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from mooncake_connector.kv_transfer.transport import (
    PATHS,
    Endpoint,
    Receiver,
    SourceIdentity,
    process_vm,
    wire,
)
from tests.unit.transport_peer import (
    Done,
    HeldTarget,
    Initiator,
    Process,
    Raw,
    Watched,
    copy,
    random_bytes,
    span,
    until,
)

NBYTES = 96 << 20
PAGE = 64 << 10


class Stutterer:
    """An initiator that sends a frame's head and half of its bytes, and the rest only when told."""

    def __init__(self) -> None:
        self._raw: Raw
        self._rest = b""

    def half(self, endpoint: Endpoint, key: int, dst: int, nbytes: int) -> None:
        self._raw = Raw(endpoint)
        self._raw.send(key, 1, copy(0, dst, nbytes), b"\x01" * (nbytes // 2))
        self._rest = b"\x02" * (nbytes - nbytes // 2)

    def rest(self) -> tuple[int, int, bytes]:
        self._raw.sock.sendall(self._rest)
        return self._raw.reply()

    def whole(self, key: int, dst: int, nbytes: int) -> tuple[int, int, bytes]:
        self._raw.send(key, 2, copy(0, dst, nbytes), b"\x03" * nbytes)
        return self._raw.reply()


class Unprivileged:
    """A process of another user."""

    def __init__(self) -> None:
        os.setgid(65534)
        os.setuid(65534)

    def readable(self, source: SourceIdentity) -> str | None:
        return process_vm.readable(source)


@dataclass
class Setup:
    """A target here, an initiator in another process."""

    initiator: Process
    receiver: Receiver
    memory: np.ndarray
    downs: list[tuple[str, str]] = field(default_factory=list)

    def pages(self) -> tuple[list[int], list[int], list[int]]:
        """A large write: every page of the lower half, in random order."""
        count = NBYTES // 2 // PAGE
        order = np.random.default_rng(1).permutation(count)
        base = self.memory.ctypes.data
        return [i * PAGE for i in range(count)], [int(base + i * PAGE) for i in order], [PAGE] * count


@pytest.fixture(params=PATHS)
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    downs: list[tuple[str, str]] = []
    receiver = Receiver(on_link_down=lambda peer, reason: downs.append((peer, reason)))
    setup = Setup(Process(Initiator, NBYTES, 5), receiver, np.zeros(NBYTES, np.uint8), downs)
    setup.initiator.call("open", request.param, receiver.admit("p"), 2)
    yield setup
    setup.initiator.end()
    receiver.close()


def test_revoke_fences_a_running_and_a_stopped_initiator(setup: Setup) -> None:
    half = NBYTES // 2
    base = setup.memory.ctypes.data
    setup.receiver.grant(2, "p", span(base + half, half))
    chance = random.Random(4)
    caught = 0
    for round in range(8):
        setup.memory[:half] = 0
        setup.receiver.grant(1, "p", span(base, half))
        setup.initiator.begin("write", 1, *setup.pages())
        until(lambda: bool(setup.memory[:half:PAGE].any()), 5, "the write has begun")
        stop = round % 2 == 0
        if stop:
            setup.initiator.signal(signal.SIGSTOP)
        time.sleep(chance.random() * 0.004)
        start = time.monotonic()
        landed = setup.receiver.revoke(1)
        took = time.monotonic() - start
        fenced = setup.memory[:half].copy()
        assert took < 0.25
        if stop:
            time.sleep(0.05)
            assert np.array_equal(setup.memory[:half], fenced)
            setup.initiator.signal(signal.SIGCONT)
        reasons = setup.initiator.result()
        assert np.array_equal(setup.memory[:half], fenced)
        assert np.count_nonzero(fenced) == landed.nbytes
        assert (not reasons) == (landed.nbytes == half) == (landed.writes == half >> 20)
        assert all("revoked" in reason for reason in reasons)
        caught += bool(reasons)
        assert setup.initiator.call("write", 2, [0], [base + half], [1 << 20]) == []
    assert caught >= 2, "revoke never met a write under way: the test shows nothing"
    assert setup.downs == []


def test_revoke_while_a_stopped_initiator_owes_half_a_frame() -> None:
    receiver = Receiver()
    memory = np.zeros(4 << 20, np.uint8)
    half = memory.size // 2
    peer = Process(Stutterer)
    receiver.grant(1, "p", span(memory.ctypes.data, half))
    peer.call("half", receiver.admit("p"), 1, memory.ctypes.data, half)
    until(lambda: np.count_nonzero(memory) == half // 2, 5, "half of the frame has landed")
    peer.signal(signal.SIGSTOP)
    start = time.monotonic()
    assert receiver.revoke(1).nbytes == half // 2
    assert time.monotonic() - start < 0.25
    receiver.grant(2, "p", span(memory.ctypes.data, memory.size))
    peer.signal(signal.SIGCONT)
    assert peer.call("rest") == (1, wire.REFUSED, b"key 1 was revoked")
    assert set(np.unique(memory)) == {0, 1}
    assert np.count_nonzero(memory) == half // 2
    assert peer.call("whole", 2, memory.ctypes.data, 4096) == (2, wire.LANDED, b"")
    assert (memory[:4096] == 3).all()
    peer.end()
    receiver.close()


def test_killed_initiator_is_noticed_at_once(setup: Setup) -> None:
    setup.receiver.grant(1, "p", span(setup.memory.ctypes.data, NBYTES))
    assert setup.initiator.call("write", 1, [0], [setup.memory.ctypes.data], [PAGE]) == []
    setup.initiator.begin("write", 1, *setup.pages())
    setup.initiator.signal(signal.SIGKILL)
    until(lambda: bool(setup.downs), 1, "link down")
    setup.receiver.revoke(1)
    fenced = setup.memory.copy()
    time.sleep(0.05)
    assert np.array_equal(setup.memory, fenced)
    assert [peer for peer, _ in setup.downs] == ["p"]


def test_killed_idle_initiator_is_noticed_and_its_successor_admitted(setup: Setup) -> None:
    setup.initiator.signal(signal.SIGKILL)
    until(lambda: bool(setup.downs), 1, "link down")
    successor = Process(Initiator, PAGE, 6)
    setup.receiver.grant(1, "p", span(setup.memory.ctypes.data, PAGE))
    successor.call("open", "tcp", setup.receiver.admit("p"), 2)
    assert successor.call("write", 1, [0], [setup.memory.ctypes.data], [PAGE]) == []
    assert np.array_equal(setup.memory[:PAGE], random_bytes(PAGE, 6))
    successor.end()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("busy", [False, True])
def test_killed_target_is_noticed_at_once(path: str, busy: bool) -> None:
    target = Process(HeldTarget, NBYTES)
    endpoint, address = target.call("admit", "p", 1)
    source = random_bytes(NBYTES, 1)
    link = Watched(path, endpoint).up()
    assert link.write(1, copy(source.ctypes.data, address, PAGE)) is None
    rails = list(link.rails.values())
    dones = [Done() for _ in range(20)]
    if busy:
        target.signal(signal.SIGSTOP)
        for number, done in enumerate(dones):
            rails[number % 2].write(1, copy(source.ctypes.data, address, NBYTES), done)
    target.signal(signal.SIGKILL)
    until(lambda: bool(link.downs()), 1, "link down")
    if busy:
        assert all(done.wait().retry for done in dones)
        assert all(len(done.results) == 1 for done in dones)
    time.sleep(0.05)
    assert len(link.downs()) == 1
    assert link.kinds()[-1] == ("link",)
    assert sorted(kind for kind in link.kinds() if kind[0] == "down") == [
        ("down", f"{path}-0"),
        ("down", f"{path}-1"),
    ]
    target.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_another_users_memory_is_refused_with_the_mend() -> None:
    process = Process(Unprivileged)
    assert "CAP_SYS_PTRACE" in process.call("readable", process_vm.identity())
    process.end()
