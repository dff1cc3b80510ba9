"""The target's end of rails: what it counts, what it refuses, what a fence destroys: on faked queue pairs."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import Mark
from mooncake_connector.kv_transfer.transport.rdma import cards, target, verbs
from mooncake_connector.kv_transfer.transport.rdma.target import RdmaTarget
from tests.unit.test_rdma_rails import CARD, TOKEN, FakeNic


class FakePair:
    card = CARD
    made: list["FakePair"] = []  # noqa: RUF012 - emptied for each test

    def __init__(self, nic: Any, depth: int, on_ready: Callable[[], None]) -> None:
        self.nic = nic
        self.connected = self.closed = False
        self.arrived = 0
        self._on_ready = on_ready
        FakePair.made.append(self)

    def connect(self, there: cards.PairCard) -> None:
        self.connected = True

    def arrive(self, writes: int) -> None:
        self.arrived += writes
        self._on_ready()

    def take(self) -> Sequence[Any]:
        taken, self.arrived = self.arrived, 0
        return [SimpleNamespace(status=0, opcode=7)] * taken

    def close(self) -> Sequence[Any]:
        self.closed = True
        return self.take()


class Asker:
    """A target with one NIC, and what a peer may ask it."""

    def __init__(self) -> None:
        self.nic = FakeNic("b")
        self._handlers: dict[str, Callable[[str, bytes], bytes]] = {}
        self.nics_now: Any = [self.nic]
        self.penalty = 2.0
        self.target = RdmaTarget(
            lambda: self.nics_now, self._handlers.__setitem__, penalty=lambda nic: self.penalty
        )

    def open(self, number: int, token: bytes = TOKEN, nic: str = "b") -> FakePair:
        question = cards.encode(cards.Open(token, number, nic, CARD))
        opened = cards.decode(self._handlers[cards.OPEN]("peer", question), cards.Opened)
        assert opened == cards.Opened(CARD, [(4096, 4096, 4096, 9)])
        return FakePair.made[-1]

    def fence(self, number: int, token: bytes = TOKEN) -> None:
        self._handlers[cards.FENCE]("peer", cards.encode(cards.Fence(token, number)))

    def nics(self, token: bytes = TOKEN) -> cards.Nics:
        answer = self._handlers[cards.NICS]("peer", cards.encode(cards.Hello(token)))
        return cards.decode(answer, cards.Nics)

    def waits(self, *marks: Mark) -> list[bool]:
        seen: list[bool] = []
        self.target.await_marks("peer", marks, lambda: seen.append(True))
        return seen


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Asker:
    FakePair.made.clear()
    monkeypatch.setattr(target, "QueuePair", FakePair)
    monkeypatch.setattr(verbs, "e", SimpleNamespace(IBV_WC_SUCCESS=0, IBV_WC_RECV_RDMA_WITH_IMM=7))
    asker = Asker()
    asker.target.admit("peer", TOKEN)
    return asker


def test_marks_are_seen_when_all_their_writes_are(asker: Asker) -> None:
    one, other = asker.open(1), asker.open(2)
    seen = asker.waits(Mark(1, 2), Mark(2, 1))
    one.arrive(1)
    other.arrive(1)
    assert not seen
    one.arrive(1)
    assert seen == [True]
    assert asker.waits(Mark(1, 2)) == [True]
    assert asker.waits(Mark(1, 3)) == []
    assert asker.waits() == [True]


def test_a_fence_counts_what_landed_then_stands(asker: Asker) -> None:
    pair = asker.open(1)
    seen = asker.waits(Mark(1, 2))
    asker.fence(1)
    assert pair.closed
    assert seen == [True], "what the initiator saw complete has landed"
    asker.fence(1)
    with pytest.raises(TransportError, match="rail 1 was there before"):
        asker.open(1)  # asked before the fence, over a stream that was slower
    assert FakePair.made[-1].closed
    assert not FakePair.made[-1].connected


def test_a_fence_may_come_before_its_rail(asker: Asker) -> None:
    asker.fence(1)
    with pytest.raises(TransportError, match="rail 1 was there before"):
        asker.open(1)


def test_no_rail_of_a_fenced_peer_or_an_earlier_link(asker: Asker) -> None:
    pairs = [asker.open(number) for number in (1, 2)]
    seen = asker.waits(Mark(1, 5), Mark(2, 5))
    asker.target.fence_peer("peer")
    assert all(pair.closed for pair in pairs)
    assert seen == [True]
    with pytest.raises(TransportError, match="not admitted any more"):
        asker.open(3)
    asker.target.admit("peer", b"another token")
    for ask in (lambda: asker.open(3), lambda: asker.fence(3), asker.nics):
        with pytest.raises(TransportError, match="not admitted any more"):
            ask()
    assert FakePair.made == pairs, "for none of these a queue pair was made"
    assert asker.open(1, b"another token").connected


def test_a_fence_that_comes_while_a_rail_is_made(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakePair.__init__

    def slow(self: FakePair, *args: Any) -> None:
        made(self, *args)
        asker.target.fence_peer("peer")

    monkeypatch.setattr(FakePair, "__init__", slow)
    with pytest.raises(TransportError, match="not admitted any more"):
        asker.open(1)
    assert FakePair.made[-1].closed
    assert not FakePair.made[-1].connected


def test_the_target_tells_its_nics_and_their_state(asker: Asker) -> None:
    assert asker.nics().nics == [cards.NicCard("b", "fe80::1", 1e9, 2.0)]
    with pytest.raises(TransportError, match="has no NIC c; it has b"):
        asker.open(1, nic="c")
    asker.nic.down = "the port of b is down"
    with pytest.raises(TransportError, match="the port of b is down"):
        asker.open(1)
    asker.penalty = float("inf")
    assert asker.nics().nics == []


def test_a_nic_that_is_gone_at_the_target_takes_its_rails_along(asker: Asker) -> None:
    one = asker.open(1)
    asker.nics_now = [FakeNic("c"), asker.nic]
    other = asker.open(2, nic="c")
    seen = asker.waits(Mark(1, 2), Mark(2, 1))
    other.arrive(1)
    asker.nics_now = asker.nics_now[:1]
    asker.target.refresh()
    assert one.closed
    assert not other.closed
    assert seen == [True], "what the initiator saw complete has landed"
    with pytest.raises(TransportError, match="has no NIC b; it has c"):
        asker.open(3)
    asker.fence(1)


def test_a_nic_that_goes_at_the_target_while_a_rail_is_made(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FakePair.__init__

    def slow(self: FakePair, *args: Any) -> None:
        made(self, *args)
        asker.nics_now = []
        asker.target.refresh()

    monkeypatch.setattr(FakePair, "__init__", slow)
    with pytest.raises(TransportError, match="b is gone"):
        asker.open(1)
    assert FakePair.made[-1].closed
