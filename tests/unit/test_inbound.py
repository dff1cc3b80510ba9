"""The target's fences where hardware writes without asking: a model of such rails, over a real receiver."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from mooncake_connector.kv_transfer.inbound import Inbound
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport.base import Mark
from mooncake_connector.kv_transfer.transport.receiver import Receiver

ANY = Ranges.of(np.array([4096], np.uint64), np.array([100], np.uint64))
PATIENCE = 1.0


class Hardware:
    """What `Inbound` asks of one-sided rails; like rdma it knows no grants."""

    path = "rdma"

    def __init__(self) -> None:
        self.fenced: list[str] = []
        self.awaited: list[tuple[str, tuple[Mark, ...], Callable[[], None]]] = []

    def admit(self, peer: str, token: bytes) -> None: ...

    def grant(self, key: int, peer: str) -> None: ...

    def revoke(self, key: int, peer: str) -> None: ...

    def fence(self, key: int, peer: str, on_fenced: Callable[[], None]) -> bool:
        return False

    def fence_peer(self, peer: str, on_fenced: Callable[[], None]) -> None:
        self.fenced.append(peer)
        on_fenced()

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        self.awaited.append((peer, tuple(marks), on_seen))

    def close(self) -> None: ...


class Gated:
    """Rails behind a gate, as cuda_ipc's: fences by itself, once those inside have left."""

    path = "cuda_ipc"

    def __init__(self) -> None:
        self.open: set[tuple[int, str]] = set()
        self.inside: list[Callable[[], None]] = []

    def admit(self, peer: str, token: bytes) -> None: ...

    def grant(self, key: int, peer: str) -> None:
        self.open.add((key, peer))

    def revoke(self, key: int, peer: str) -> None:
        self.open.discard((key, peer))

    def fence(self, key: int, peer: str, on_fenced: Callable[[], None]) -> bool:
        self.revoke(key, peer)
        self.inside.append(on_fenced)
        return True

    def fence_peer(self, peer: str, on_fenced: Callable[[], None]) -> None:
        self.open = {(key, other) for key, other in self.open if other != peer}
        self.inside.append(on_fenced)

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        raise AssertionError("it has no marks")

    def leave(self) -> None:
        inside, self.inside = self.inside, []
        for left in inside:
            left()

    def close(self) -> None: ...


class World:
    def __init__(self) -> None:
        self.hardware, self.gated = Hardware(), Gated()
        self.broken: list[str] = []
        self.fenced: list[int] = []
        self.receiver = Receiver()
        self.inbound = Inbound(
            self.receiver,
            [self.hardware, self.gated],
            wake=lambda due: None,
            on_link_broken=lambda peer, why: self.broken.append(peer),
        )

    def fence(self, key: int) -> None:
        self.inbound.fence(key, lambda: self.fenced.append(key), PATIENCE)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.inbound.close()


def test_streams_are_fenced_at_once(world: World) -> None:
    world.inbound.admit("p", paths=("tcp",))
    world.inbound.grant(1, "p", ANY)
    world.fence(1)
    assert world.fenced == [1]
    assert not world.hardware.fenced


def test_an_initiator_that_says_it_stopped_keeps_its_link(world: World) -> None:
    world.inbound.admit("p", paths=("rdma", "tcp"))
    world.inbound.grant(1, "p", ANY)
    world.fence(1)
    assert world.fenced == []
    world.inbound.revoke(1)
    world.inbound.tick(time.monotonic() + 2 * PATIENCE)
    assert world.fenced == []  # the caller knows already
    assert world.broken == []


def test_a_silent_initiator_loses_its_link_and_can_make_no_rail(world: World) -> None:
    world.inbound.admit("p", paths=("rdma", "tcp"))
    world.inbound.admit("other", paths=("rdma", "tcp"))
    for key, peer in ((1, "p"), (2, "p"), (3, "other")):
        world.inbound.grant(key, peer, ANY)
    world.fence(1)
    due = world.inbound.next_tick()
    assert due is not None
    assert abs(due - time.monotonic() - PATIENCE) < 0.1
    world.inbound.tick(due - 0.01)
    assert world.fenced == []
    world.inbound.tick(due)
    assert world.fenced == [1]
    assert world.hardware.fenced == ["p"]
    assert world.broken == ["p"]
    assert not world.inbound.may_write("p")
    assert world.inbound.may_write("other")
    assert world.inbound.next_tick() is None
    world.fence(2)  # nothing of that peer can land any more
    assert world.fenced == [1, 2]


@pytest.mark.parametrize("how", ["drop", "link_down", "admit"])
def test_the_end_of_a_link_is_a_fence(world: World, how: str) -> None:
    world.inbound.admit("p", paths=("rdma", "tcp"))
    world.inbound.grant(1, "p", ANY)
    world.fence(1)
    if how == "admit":
        world.inbound.admit("p", paths=("rdma", "tcp"))
    else:
        getattr(world.inbound, how)("p")
    assert world.hardware.fenced == ["p"]
    assert world.fenced == [1]


def test_a_gate_fences_by_itself(world: World) -> None:
    world.inbound.admit("p", paths=("cuda_ipc", "tcp"))
    world.inbound.grant(1, "p", ANY)
    assert world.gated.open == {(1, "p")}
    world.fence(1)
    assert world.fenced == []
    assert world.inbound.next_tick() is None  # no link has to end for it
    world.gated.leave()
    assert world.fenced == [1]
    assert world.inbound.may_write("p")
    world.inbound.grant(2, "p", ANY)
    world.inbound.revoke(2)
    assert not world.gated.open


def test_who_said_that_it_stopped_is_not_told_of_the_fence(world: World) -> None:
    world.inbound.admit("p", paths=("cuda_ipc", "tcp"))
    world.inbound.grant(1, "p", ANY)
    world.fence(1)
    world.inbound.revoke(1)
    world.gated.leave()
    assert world.fenced == []


def test_a_link_that_has_ended_fences_once_its_gate_is_empty(world: World) -> None:
    world.inbound.admit("p", paths=("cuda_ipc", "tcp"))
    for key in (1, 2, 3):
        world.inbound.grant(key, "p", ANY)
    world.fence(1)
    over: list[str] = []
    world.inbound.drop("p", lambda: over.append("p"))
    world.fence(2)  # the link is gone, but not who was inside
    assert (world.fenced, over) == ([], [])
    world.gated.leave()
    assert (sorted(world.fenced), over) == ([1, 2], ["p"])
    world.fence(3)
    assert sorted(world.fenced) == [1, 2, 3]


def test_both_kinds_of_rails_have_to_be_fenced(world: World) -> None:
    world.inbound.admit("p", paths=("cuda_ipc", "rdma", "tcp"))
    world.inbound.grant(1, "p", ANY)
    world.fence(1)
    world.gated.leave()
    assert world.fenced == []  # the NIC may still write
    due = world.inbound.next_tick()
    assert due is not None
    world.inbound.tick(due)
    assert world.fenced == []  # the link ends, its gate is looked at anew
    world.gated.leave()
    assert world.fenced == [1]


def test_marks_are_waited_for(world: World) -> None:
    seen: list[int] = []
    world.inbound.await_marks("p", [], lambda: seen.append(0))
    assert seen == [0]
    world.inbound.await_marks("p", [Mark(3, 7)], lambda: seen.append(1))
    assert seen == [0]
    peer, marks, on_seen = world.hardware.awaited[0]
    assert (peer, marks) == ("p", (Mark(3, 7),))
    on_seen()
    assert seen == [0, 1]
