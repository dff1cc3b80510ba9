"""The transfer engine when NICs go and come back in the middle of transfers."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import TransferError
from mooncake_connector.kv_transfer.engine import TransferEngine
from mooncake_connector.kv_transfer.transfer import Transfer
from tests.rdma.nics import Cables, Nic, guest_only

SIZE = 64 << 20
MIB = 1 << 20
WRITES = 4
"""At once, so that there is something left to disturb on a machine of any speed."""


def until(what: Callable[[], bool], timeout: float) -> float:
    """Wait for it: seconds."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < timeout, f"not within {timeout} s"
        time.sleep(0.01)
    return time.monotonic() - begun


class Two:
    """A target with memory on offer and an initiator with a source, all rails up."""

    def __init__(self, path: str, nics: list[Nic]) -> None:
        self.target = TransferEngine(TransferConfig(path=path))
        self.initiator = TransferEngine(TransferConfig(path=path))
        self.memory = np.zeros(SIZE, np.uint8)
        self.source = np.random.default_rng(1).integers(1, 255, SIZE, np.uint8)
        self.initiator.register(self.source)
        self.peer = self.initiator.connect(self.target.offer([self.target.register(self.memory)]))
        until(lambda: all(self.up(nic) for nic in nics), 30)
        self.before = self.sent()

    def up(self, nic: Nic) -> bool:
        """Whether some rail of this NIC is."""
        return any(f"-{nic.device}-" in rail for rail in self.peer.outbound.rails)

    def sent(self) -> dict[str, int]:
        return dict(self.peer.outbound.sent)

    def over(self, name: str) -> int:
        """Bytes handed to rails of a NIC or transport since the rails came up."""
        sent = self.sent().items()
        return sum(n - self.before.get(rail, 0) for rail, n in sent if name in rail)

    def begin(self, landed: int = 8 * MIB) -> Transfer:
        """Write everything, several times; returns the last write when so much of the first has landed."""
        writes = [self.initiator.write(self.peer, self.source, deadline=120) for _ in range(WRITES)]
        until(lambda: writes[0].bytes_done >= landed, 60)
        assert not writes[-1].done, "over before it could be disturbed"
        return writes[-1]

    def finish(self, transfer: Transfer) -> None:
        transfer.wait(120)
        assert np.array_equal(self.memory, self.source)


@pytest.fixture(params=["rdma,tcp"])
def two(request: pytest.FixtureRequest, nics: list[Nic]) -> Iterator[Two]:
    made = Two(request.param, nics)
    yield made
    made.initiator.close()
    made.target.close()


@guest_only
@pytest.mark.parametrize("two", ["rdma"], indirect=True)  # where nothing else can finish it
def test_a_nic_goes_down_and_the_other_finishes(two: Two, nics: list[Nic], cables: Cables) -> None:
    transfer = two.begin()
    cables.pull(nics[0])
    until(lambda: not two.up(nics[0]), 10)
    carried = two.over(nics[0].device)
    two.finish(transfer)
    assert two.over(nics[0].device) == carried
    assert two.over(nics[1].device) > SIZE // 8


@guest_only
def test_both_go_down_and_tcp_finishes_then_they_are_used_again(
    two: Two, nics: list[Nic], cables: Cables
) -> None:
    transfer = two.begin()
    for nic in nics:
        cables.pull(nic)
    two.finish(transfer)
    assert two.over("tcp") > SIZE // 2
    for nic in nics:
        cables.plug(nic)
        # The cooldown began at half a second and doubles with each try while the port was down.
        waited = until(lambda: two.up(nic), 15)  # noqa: B023
        print(f"{nic.device} is used again {waited:.1f} s after its port came up")
    before = two.over("rdma")
    two.memory[:] = 0
    two.finish(two.initiator.write(two.peer, two.source, deadline=120))
    assert two.over("rdma") - before > SIZE // 2
    assert all(two.up(nic) for nic in nics)


@guest_only
@pytest.mark.parametrize("two", ["rdma"], indirect=True)
def test_without_tcp_a_transfer_waits_for_a_nic_to_come_back(
    two: Two, nics: list[Nic], cables: Cables
) -> None:
    transfer = two.begin()
    for nic in nics:
        cables.pull(nic)
    time.sleep(1)
    assert not transfer.done
    cables.plug(nics[1])
    two.finish(transfer)
    assert set(two.sent()) == {rail for rail in two.sent() if rail.startswith("rdma")}


def _target(pipe: Connection) -> None:
    memory = np.zeros(SIZE, np.uint8)
    engine = TransferEngine(TransferConfig(path="rdma,tcp"))
    pipe.send(engine.offer([engine.register(memory)]))
    pipe.recv()


@pytest.mark.parametrize("path", ["rdma,tcp", "rdma"])
def test_a_killed_peer_is_an_error_within_three_seconds(path: str) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_target, args=(there,), daemon=True)
    process.start()
    engine = TransferEngine(TransferConfig(path=path))
    source = np.ones(SIZE, np.uint8)
    engine.register(source)
    peer = engine.connect(here.recv())
    until(lambda: any("rdma" in rail for rail in peer.outbound.rails), 30)
    writes = [engine.write(peer, source, deadline=60) for _ in range(WRITES)]
    until(lambda: writes[0].bytes_done >= 4 * MIB, 60)
    assert process.pid is not None
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(TransferError):
        writes[-1].wait(10)
    assert time.monotonic() - begun < 3
    process.join()
    engine.close()
