"""How rails are opened, broken, fenced and made anew, and how the target counts: on faked queue pairs."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Failure, Mark, Rail
from mooncake_connector.kv_transfer.transport.rdma import cards, initiator, target, verbs
from mooncake_connector.kv_transfer.transport.rdma.initiator import RdmaRails
from mooncake_connector.kv_transfer.transport.rdma.target import RdmaTarget

TOKEN = b"token"
CARD = cards.PairCard("fe80::1", 0, 17, 5, 3)
BROKE = Failure("the stream broke", retry=True)


class FakeNic:
    def __init__(self, label: str) -> None:
        self.label, self.gid, self.speed = label, "fe80::1", 1e9
        self.listeners: list[Callable[[str], None]] = []
        self.down: str | None = None

    def problem(self) -> str | None:
        return self.down

    def rows(self) -> list[tuple[int, int, int, int]]:
        return [(4096, 4096, 4096, 9)]


# ---------------------------------------------------------------------- initiator


class FakeRail:
    """A rail that ends its probe when told to, and breaks when told to."""

    path = "rdma"
    card = CARD

    def __init__(self, name: str, nic: FakeNic, *, on_broken: Callable[[str], None], **_: Any) -> None:
        self.name = name
        self.completed = 0
        self.there: Any = None
        self.broken: str | None = None
        self._on_broken = on_broken

    def connect(self, there: cards.PairCard) -> None:
        assert there == CARD

    def write(self, key: int, plan: CopyPlan, on_done: Callable[[Failure | None], None]) -> None:
        assert not plan.nbytes
        self.completed += 1
        on_done(None)

    def fail(self, reason: str) -> None:
        if self.broken is None:
            self.broken = reason
            self._on_broken(reason)

    def close(self) -> None:
        self.broken = "closed"


class World:
    """A link with one NIC on each side, whose questions wait until they are answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(initiator, "RdmaRail", FakeRail)
        self.nic = FakeNic("a")
        self.log: list[str] = []
        self.rail: Any = None
        self.asked: list[tuple[str, bytes, Callable[[bytes | Failure], None]]] = []
        self._came = threading.Condition()
        nics: Any = [self.nic]
        self.rails = RdmaRails("link", TOKEN, self.ask, self, nics, qps=1)
        self.rails.open()

    def ask(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        with self._came:
            self.asked.append((topic, body, on_answer))
            self._came.notify_all()

    def answer(self, topic: str, answer: bytes | Failure) -> bytes:
        """Answer the oldest question, which has to be this one; what was asked."""
        with self._came:
            assert self._came.wait_for(lambda: self.asked, 5), f"nobody asked {topic}"
            found, body, on_answer = self.asked.pop(0)
        assert found == topic
        on_answer(answer)
        return body

    def open(self) -> "World":
        self.answer(cards.NICS, cards.encode(cards.Nics([cards.NicCard("b", "::", 2e9, 1.5)])))
        self.answer(cards.OPEN, cards.encode(cards.Opened(CARD, [])))
        assert self.log == ["up rdma-a-b-0"]
        self.log.clear()
        return self

    def rail_up(self, rail: Rail) -> None:
        self.rail = rail
        self.log.append(f"up {rail.name}")

    def rail_down(self, name: str, reason: str) -> None:
        self.log.append(f"down {reason}")

    def rail_fenced(self, name: str) -> None:
        self.log.append("fenced")

    def link_down(self, reason: str) -> None:
        raise AssertionError("rails never end a link")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_broken_rail_is_fenced_then_made_anew(world: World) -> None:
    world.open()
    assert world.rails.owns("rdma-a-b-0")
    assert world.rails.marks() == (Mark(1, 1),)
    world.rails.abandon("rdma-a-b-0", "stuck")
    assert world.log == ["down stuck"]
    assert world.rails.marks() == (Mark(1, 1),), "what landed over it still counts"
    world.rails.restore("rdma-a-b-0")
    assert [topic for topic, _, _ in world.asked] == [cards.FENCE], "nothing is opened before the fence"
    assert cards.decode(world.answer(cards.FENCE, b""), cards.Fence).number == 1
    assert world.log == ["down stuck", "fenced"]
    opened = world.answer(cards.OPEN, cards.encode(cards.Opened(CARD, [])))
    assert cards.decode(opened, cards.Open).number == 2
    assert world.log == ["down stuck", "fenced", "up rdma-a-b-0"]
    assert world.rails.marks() == (Mark(2, 1),)


def test_a_fence_is_asked_for_until_a_stream_carries_it(world: World) -> None:
    world.open().rail.fail("broken")
    for _ in range(4):
        world.answer(cards.FENCE, BROKE)
    assert world.log == ["down broken"]
    world.answer(cards.FENCE, b"")
    assert world.log == ["down broken", "fenced"]


def test_a_rail_that_cannot_be_opened_is_reported_down(world: World) -> None:
    world.answer(cards.NICS, cards.encode(cards.Nics([cards.NicCard("b", "::", 0.0, 1.0)])))
    world.answer(cards.OPEN, Failure("no such NIC", retry=False))
    assert world.log == ["down no such NIC"]
    world.answer(cards.FENCE, b"")  # the target may have made its end all the same
    world.nic.down = "the port of a is down"
    world.rails.restore("rdma-a-b-0")
    assert world.log == ["down no such NIC", "fenced", "down the port of a is down"]
    assert not world.asked
    world.nic.down = None
    world.rails.restore("rdma-a-b-0")
    world.answer(cards.OPEN, cards.encode(cards.Opened(CARD, [])))
    assert world.log[-1] == "up rdma-a-b-0"


def test_a_port_that_goes_down_breaks_its_rails(world: World) -> None:
    world.open()
    for listener in world.nic.listeners:
        listener("the port of a went down")
    assert world.log == ["down the port of a went down"]
    world.answer(cards.FENCE, b"")
    assert world.rails.marks() == (), "the target has counted what landed"


def test_nothing_follows_a_close(world: World) -> None:
    world.open()
    world.rails.close()
    assert world.rail.broken == "closed"
    assert not world.nic.listeners
    world.rails.restore("rdma-a-b-0")
    assert not world.log
    assert not world.asked


# ---------------------------------------------------------------------- target


class FakePair:
    card = CARD
    made: list["FakePair"] = []  # noqa: RUF012 - emptied for each test

    def __init__(self, nic: Any, depth: int, on_ready: Callable[[], None]) -> None:
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
        nics: Any = [self.nic]
        self.target = RdmaTarget(nics, self._handlers.__setitem__, penalty=lambda nic: 2.0)

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
