"""How rails are opened, broken, fenced and made anew, also as NICs come and go: on faked rails."""

from collections.abc import Callable
from typing import Any

import pytest

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import insist
from mooncake_connector.kv_transfer.transport.base import Failure, Mark, Rail
from mooncake_connector.kv_transfer.transport.rdma import cards, initiator
from mooncake_connector.kv_transfer.transport.rdma.initiator import RdmaRails

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


class FakeRail:
    """A rail that ends its probe when told to, and breaks when told to."""

    path = "rdma"
    card = CARD

    def __init__(
        self, name: str, nic: FakeNic, *, penalty: float, on_broken: Callable[[str], None], **_: Any
    ) -> None:
        self.name, self.nic, self.penalty = name, nic, penalty
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
        monkeypatch.setattr(initiator, "later", self._later)
        monkeypatch.setattr(insist, "later", self._later)
        self.nic = FakeNic("a")
        self.log: list[str] = []
        self.rail: Any = None
        self.asked: list[tuple[str, bytes, Callable[[bytes | Failure], None]]] = []
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.nics: Any = [self.nic]
        self.penalties: dict[str, float] = {}
        self.rails = RdmaRails(
            "link",
            TOKEN,
            self.ask,
            self,
            lambda: self.nics,
            qps=1,
            penalty=lambda nic: self.penalties.get(nic, 1.0),
        )
        self.rails.open()

    def ask(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        self.asked.append((topic, body, on_answer))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        if seconds:
            self.due.append((seconds, call))
        else:
            call()

    def wait(self) -> float:
        """Time passes until the next thing is due: how much."""
        seconds, call = self.due.pop(0)
        call()
        return seconds

    def answer(self, topic: str, answer: bytes | Failure) -> bytes:
        """Answer the oldest question, which has to be this one; what was asked."""
        found, body, on_answer = self.asked.pop(0)
        assert found == topic
        on_answer(answer)
        return body

    def tell(self, *nics: str) -> None:
        """The target has these."""
        told = [cards.NicCard(nic, "::", 2e9, 1.5) for nic in nics]
        self.answer(cards.NICS, cards.encode(cards.Nics(told)))

    def opened(self) -> str:
        """The target opens its end of a rail, on this NIC."""
        body = self.answer(cards.OPEN, cards.encode(cards.Opened(CARD, [])))
        return cards.decode(body, cards.Open).nic

    def open(self) -> "World":
        self.tell("b")
        self.opened()
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
    for pause in (0.02, 0.04, 0.08):
        world.answer(cards.FENCE, BROKE)
        assert not world.asked
        assert world.wait() == pause
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


def test_a_nic_that_is_gone_takes_its_rails_along_until_it_is_back(world: World) -> None:
    world.open()
    world.nics = []
    world.rails.refresh()
    assert world.log == ["down rdma rdma-a-b-0: the NIC here was taken away"]
    assert not world.nic.listeners
    world.rails.restore("rdma-a-b-0")
    world.answer(cards.FENCE, b"")
    world.rails.restore("rdma-a-b-0")
    assert world.log[1:] == ["fenced"]
    assert not world.asked
    world.nics = [FakeNic("a")]
    world.rails.refresh()
    assert world.opened() == "b"
    assert world.log[2:] == ["up rdma-a-b-0"]
    assert world.rail.nic is world.nics[0]
    for listener in world.nics[0].listeners:
        listener("the port of a went down")
    assert world.log[3:] == ["down the port of a went down"]


def test_a_nic_that_was_opened_anew_gets_its_rails_after_their_fence(world: World) -> None:
    world.open()
    world.nics = [FakeNic("a")]
    world.rails.refresh()
    world.answer(cards.FENCE, b"")
    world.opened()
    assert [line.split()[0] for line in world.log] == ["down", "fenced", "up"]
    assert world.rail.nic is world.nics[0]


def test_a_nic_that_goes_while_its_rail_is_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeRail.__init__

    def slow(self: FakeRail, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        world.nics = []
        world.rails.refresh()

    monkeypatch.setattr(FakeRail, "__init__", slow)
    world.tell("b")
    assert world.log == ["down rdma rdma-a-b-0: the NIC here was taken away"]
    assert [topic for topic, _, _ in world.asked] == [cards.FENCE]


def test_a_nic_that_is_new_gets_rails_and_the_others_keep_theirs(world: World) -> None:
    world.open()
    first = world.rail
    world.nics = [FakeNic("c"), world.nic]
    world.penalties = {"c": 2.0}
    world.rails.refresh()
    assert not world.asked, "the target may be getting one at the same moment"
    world.wait()
    world.tell("b", "d")
    assert world.opened() == "d"
    assert world.log == ["up rdma-c-d-0"], "the nearest of both sides have met before"
    assert first.broken is None
    assert world.rail.penalty == 3.0


def test_a_port_that_came_up_is_used_at_once(world: World) -> None:
    world.open()
    world.nic.down = "the port of a is down"
    world.rail.fail(world.nic.down)
    world.answer(cards.FENCE, b"")
    world.rails.refresh()
    assert not world.asked
    assert world.log == ["down the port of a is down", "fenced"]
    world.nic.down = None
    world.rails.refresh()
    world.opened()
    assert world.log[2:] == ["up rdma-a-b-0"]


def test_a_nic_of_infinite_penalty_is_not_used(world: World) -> None:
    world.open()
    world.penalties = {"a": float("inf")}
    world.rails.refresh()
    assert world.log == ["down rdma rdma-a-b-0: the NIC here was taken away"]
    world.answer(cards.FENCE, b"")
    world.rails.restore("rdma-a-b-0")
    assert not world.asked


def test_rails_are_described_anew_when_memory_is_registered_elsewhere(world: World) -> None:
    world.open()
    world.rails.refresh()
    assert not world.log
    world.penalties = {"a": 4.0}
    world.rails.refresh()
    assert world.log == ["up rdma-a-b-0"]
    assert world.rail.penalty == 6.0


def test_a_target_that_has_other_nics_now_is_asked_for_them(world: World) -> None:
    world.open().rail.fail("broken")
    world.answer(cards.FENCE, b"")
    world.rails.restore("rdma-a-b-0")
    world.answer(cards.OPEN, Failure("the target has no NIC b; it has d", retry=False))
    world.answer(cards.FENCE, b"")
    assert not world.asked
    world.wait()
    world.tell("d")
    assert world.opened() == "d"
    assert world.log[-1] == "up rdma-a-d-0"
    assert not world.asked


def test_a_target_without_nics_is_asked_again(world: World) -> None:
    world.tell()
    world.wait()
    world.tell()
    world.wait()
    world.open()


def test_who_has_no_nic_asks_when_there_is_one(world: World) -> None:
    world.asked.clear()
    world.nics = []
    rails = RdmaRails("other", TOKEN, world.ask, world, lambda: world.nics)
    rails.open()
    assert not world.asked
    world.nics = [FakeNic("c")]
    rails.refresh()
    world.wait()
    world.tell("b")
    world.opened()
    assert world.log == ["up rdma-c-b-0"]


def test_abandoning_a_rail_that_broke_already_is_answered(world: World) -> None:
    world.open().rail.fail("broken")
    world.rails.abandon("rdma-a-b-0", "stuck")
    assert world.log == ["down broken", "down stuck"]
    world.answer(cards.FENCE, b"")
    world.rails.abandon("rdma-a-b-0", "stuck")
    assert world.log[2:] == ["fenced", "down stuck", "fenced"]
