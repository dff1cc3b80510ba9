"""What the transports owe when a process is stopped or killed, above all: nothing lands after `revoke`."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import (
    PATHS,
    Endpoint,
    Receiver,
    SourceIdentity,
    open_link,
    process_vm,
    wire,
)
from tests.unit.transport_peer import Done, HeldTarget, Initiator, Process, random_bytes, span, until

NBYTES = 96 << 20
PAGE = 64 << 10


class Stutterer:
    """An initiator that sends a frame's head and half of its bytes, and the rest only when told."""

    def __init__(self) -> None:
        self._sock = socket.socket()
        self._rest = b""

    def half(self, endpoint: Endpoint, key: int, dst: int, nbytes: int) -> None:
        self._sock = socket.create_connection((endpoint.host, endpoint.port))
        wire.put(self._sock, wire.Hello(wire.VERSION, endpoint.token, "tcp", b"link", 0, 1))
        assert wire.get(self._sock, wire.Welcome).reason is None
        head = wire.frame_head(key, 1, 1, plan(0, dst, nbytes), False)
        self._sock.sendall(head + b"\x01" * (nbytes // 2))
        self._rest = b"\x02" * (nbytes - nbytes // 2)

    def rest(self) -> tuple[int, str | None]:
        self._sock.sendall(self._rest)
        return wire.get_ack(self._sock)

    def whole(self, key: int, dst: int, nbytes: int) -> tuple[int, str | None]:
        self._sock.sendall(wire.frame_head(key, 2, 1, plan(0, dst, nbytes), False) + b"\x03" * nbytes)
        return wire.get_ack(self._sock)


class Unprivileged:
    """A process of another user."""

    def __init__(self) -> None:
        os.setgid(65534)
        os.setuid(65534)

    def readable(self, source: SourceIdentity) -> str | None:
        return process_vm.readable(source)


def plan(src: int, dst: int, nbytes: int) -> CopyPlan:
    return CopyPlan.of(np.array([src]), np.array([dst]), np.array([nbytes]))


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
        reason = setup.initiator.result()
        assert np.array_equal(setup.memory[:half], fenced)
        assert np.count_nonzero(fenced) == landed.nbytes
        assert (reason is None) == (landed.nbytes == half) == (landed.writes == 1)
        caught += reason is not None
        assert setup.initiator.call("write", 2, [0], [base + half], [1 << 20]) is None
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
    assert peer.call("rest") == (1, "key 1 was revoked")
    assert set(np.unique(memory)) == {0, 1}
    assert np.count_nonzero(memory) == half // 2
    assert peer.call("whole", 2, memory.ctypes.data, 4096) == (2, None)
    assert (memory[:4096] == 3).all()
    peer.end()
    receiver.close()


def test_killed_initiator_is_noticed_at_once(setup: Setup) -> None:
    setup.receiver.grant(1, "p", span(setup.memory.ctypes.data, NBYTES))
    assert setup.initiator.call("write", 1, [0], [setup.memory.ctypes.data], [PAGE]) is None
    setup.initiator.begin("write", 1, *setup.pages())
    setup.initiator.signal(signal.SIGKILL)
    until(lambda: bool(setup.downs), 1, "link down")
    setup.receiver.revoke(1)
    fenced = setup.memory.copy()
    time.sleep(0.05)
    assert np.array_equal(setup.memory, fenced)
    assert [peer for peer, _ in setup.downs] == ["p"]


def test_killed_idle_initiator_is_noticed_and_its_successor_admitted(setup: Setup) -> None:
    assert "no grant" in setup.initiator.call("write", 1, [0], [setup.memory.ctypes.data], [PAGE])
    setup.initiator.signal(signal.SIGKILL)
    until(lambda: bool(setup.downs), 1, "link down")
    successor = Process(Initiator, PAGE, 6)
    setup.receiver.grant(1, "p", span(setup.memory.ctypes.data, PAGE))
    successor.call("open", "tcp", setup.receiver.admit("p"), 2)
    assert successor.call("write", 1, [0], [setup.memory.ctypes.data], [PAGE]) is None
    assert np.array_equal(setup.memory[:PAGE], random_bytes(PAGE, 6))
    successor.end()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("busy", [False, True])
def test_killed_target_is_noticed_at_once(path: str, busy: bool) -> None:
    target = Process(HeldTarget, NBYTES)
    endpoint, address = target.call("admit", "p", 1)
    source = random_bytes(NBYTES, 1)
    downs: list[str] = []
    link = open_link(path, endpoint, name="t", on_down=downs.append)
    first = Done()
    link.write(1, plan(source.ctypes.data, address, PAGE), first)
    assert first.wait() is None
    dones = [Done() for _ in range(20)]
    if busy:
        target.signal(signal.SIGSTOP)
        for done in dones:
            link.write(1, plan(source.ctypes.data, address, NBYTES), done)
    target.signal(signal.SIGKILL)
    until(lambda: bool(downs), 1, "link down")
    if busy:
        assert all(done.wait() for done in dones)
        assert all(len(done.reasons) == 1 for done in dones)
    time.sleep(0.05)
    assert len(downs) == 1
    target.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_another_users_memory_is_refused_with_the_mend() -> None:
    process = Process(Unprivileged)
    assert "CAP_SYS_PTRACE" in process.call("readable", process_vm.identity())
    process.end()
