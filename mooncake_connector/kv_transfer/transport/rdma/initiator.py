"""The initiator's rails of one link: which NICs meet, how rails are opened, fenced and made anew."""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Ask, Failure, LinkEvents, Mark
from mooncake_connector.kv_transfer.transport.insist import insist, later
from mooncake_connector.kv_transfer.transport.rdma import cards
from mooncake_connector.kv_transfer.transport.rdma.cards import NicCard
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.rail import RdmaRail
from mooncake_connector.kv_transfer.transport.rdma.wr import Keys

MEET_WAIT_S, LONELY_WAIT_S = 2.0, 30.0
"""Before the target is asked for its NICs again: when some have changed, as those of the other side may be
changing at the same moment; and when it had none at all."""

_NOTHING = np.zeros(0, np.uint64)
_PROBE = CopyPlan(_NOTHING, _NOTHING, _NOTHING)

log = logging.getLogger(__name__)


class _State(Enum):
    IDLE = auto()
    OPENING = auto()
    UP = auto()
    BROKEN = auto()
    """Down, and not fenced yet."""


class _Slot:
    """A place for a rail: which NICs it joins, and what has become of it.

    Attributes:
        here: label of our NIC, which may go and come back.
        nic: the one that the rail of now was made on.
        number: by which both ends know the rail of now; each rail made here gets a new one.
        rail: of now; after it broke, until it is fenced, for its mark.
        wanted: to be made anew as soon as it is fenced.
    """

    def __init__(self, name: str, here: str, there: NicCard) -> None:
        self.name, self.here, self.there = name, here, there
        self.nic: RdmaNic | None = None
        self.state = _State.IDLE
        self.number = 0
        self.rail: RdmaRail | None = None
        self.wanted = False


class RdmaRails:
    """All RDMA rails of one link, for a `Link` to offer beside its streams. Thread-safe.

    Args:
        name: of the link, for logs.
        token: of the target's endpoint: the target serves only the link that it admitted.
        ask: puts questions to the target over the link's streams.
        events: told of rails, as `LinkEvents` says; `link_down` never.
        nics: ours as they are now; `refresh` after they changed.
        qps: rails for each pair of NICs.
        penalty: from the memory of this process to a NIC, by label; 1 is near, infinite one not to be used.
    """

    def __init__(
        self,
        name: str,
        token: bytes,
        ask: Ask,
        events: LinkEvents,
        nics: Callable[[], Sequence[RdmaNic]],
        *,
        qps: int = 2,
        penalty: Callable[[str], float] = lambda nic: 1.0,
    ) -> None:
        self._name, self._token, self._ask, self._events = name, token, ask, events
        self._current, self._qps, self._penalty_of = nics, qps, penalty
        self._lock = threading.Lock()
        self._nics: dict[str, RdmaNic] = {}
        self._penalties: dict[str, float] = {}
        self._listeners: dict[RdmaNic, Callable[[str], None]] = {}
        self._slots: dict[str, _Slot] = {}
        self._numbers = itertools.count(1)
        self._wanted = self._closed = False

    def open(self) -> None:
        """Open all rails, as soon as a stream of the link carries the questions. Once."""
        self._wanted = True
        self.refresh(0.0)

    def refresh(self, wait: float = MEET_WAIT_S) -> None:
        """Our NICs or their penalties have changed. No effect before `open`.

        Rails of NICs that are gone break; those of NICs that are back are made anew; pairs of NICs that had
        no rails get some, `wait` seconds later. Other rails stay as they are, but for their penalties.
        """
        with self._lock:
            if self._closed or not self._wanted:
                return
            penalties = {nic: self._penalty_of(nic.label) for nic in self._current()}
            nics = sorted((nic for nic in penalties if penalties[nic] < math.inf), key=penalties.__getitem__)
            self._nics = {nic.label: nic for nic in nics}
            self._penalties = {nic.label: penalties[nic] for nic in nics}
            more = self._listen(nics)
            slots = list(self._slots.values())
            lost = [s.rail for s in slots if s.rail is not None and self._nics.get(s.here) is not s.nic]
        for rail in lost:
            rail.fail(f"rdma {rail.name}: the NIC here was taken away")
        ready = {nic.label for nic in nics if nic.problem() is None}
        for slot in slots:
            if slot.here in ready:
                self.restore(slot.name)
            self._weigh(slot)
        if more:
            later(wait, self._meet)

    def owns(self, rail: str) -> bool:
        """Whether it is one of ours."""
        return rail in self._slots

    def restore(self, rail: str) -> None:
        """Make a rail that is down anew; answered by `rail_up` or `rail_down`, after its fence.

        While our NIC is gone there is no answer: the rail comes up when the NIC is back.
        """
        slot = self._slots[rail]
        with self._lock:
            nic = None if self._closed else self._nics.get(slot.here)
            slot.wanted = slot.state is _State.BROKEN and nic is not None
            if slot.state is not _State.IDLE or nic is None:
                return
            slot.state, slot.nic = _State.OPENING, nic
        self._open(slot, nic)

    def abandon(self, rail: str, reason: str) -> None:
        """Break a rail that is stuck; `rail_down` and `rail_fenced` follow."""
        slot = self._slots[rail]
        with self._lock:
            live, state = slot.rail, slot.state
        if live is not None and state in (_State.OPENING, _State.UP):
            live.fail(reason)
            return
        # It broke in the moment when it was reported as up.
        self._events.rail_down(rail, reason)
        if state is _State.IDLE:
            self._events.rail_fenced(rail)

    def marks(self) -> tuple[Mark, ...]:
        """What the target has to see before it may use what has been written until now."""
        with self._lock:
            slots = self._slots.values()
            return tuple(Mark(s.number, s.rail.completed) for s in slots if s.rail is not None)

    def close(self) -> None:
        """Destroy all rails; writes not yet landed fail, no event follows. Also for a link that went down."""
        with self._lock:
            self._closed = True
            rails = [slot.rail for slot in self._slots.values() if slot.rail is not None]
            self._listen(())
        for rail in rails:
            rail.close()

    # ------------------------------------------------------------------ opening

    def _listen(self, nics: Sequence[RdmaNic]) -> bool:
        """Hear of what happens to these NICs, and to no others. Whether some are new."""
        for nic in [nic for nic in self._listeners if nic not in nics]:
            nic.listeners.remove(self._listeners.pop(nic))
        new = [nic for nic in nics if nic not in self._listeners]
        for nic in new:
            self._listeners[nic] = partial(self._nic_failed, nic)
            nic.listeners.append(self._listeners[nic])
        return bool(new)

    def _meet(self) -> None:
        """Ask for the target's NICs."""
        if self._nics and not self._closed:
            self._insist(cards.NICS, cards.encode(cards.Hello(self._token)), self._met)

    def _met(self, answer: bytes | Failure) -> None:
        try:
            there = cards.decode(_unless_failed(answer), cards.Nics).nics
        except TransportError as failed:
            log.warning("%s: no rdma: %s", self._name, failed)
            return
        with self._lock:
            if self._closed:
                return
            known = list(self._slots.values())
            by_label = {card.label: card for card in there}
            for slot in known:
                slot.there = by_label.get(slot.there.label, slot.there)
            slots = [
                _Slot(f"rdma-{here.label}-{card.label}-{i}", here.label, card)
                for here, card in pairs(list(self._nics.values()), there)
                for i in range(self._qps)
            ]
            new = {slot.name: slot for slot in slots if slot.name not in self._slots}
            self._slots = {**self._slots, **new}
        if not there and not known:
            log.info("%s: no rdma yet: the target has no NIC for it", self._name)
            later(LONELY_WAIT_S, self._meet)
        for slot in known:
            self._weigh(slot)
        for name in new:
            self.restore(name)

    def _penalty(self, slot: _Slot) -> float:
        return self._penalties.get(slot.here, 1.0) * slot.there.penalty

    def _weigh(self, slot: _Slot) -> None:
        """Describe a rail anew whose penalty has changed."""
        with self._lock:
            rail, penalty = slot.rail, self._penalty(slot)
            changed = rail is not None and slot.state is _State.UP and rail.penalty != penalty
        if changed:
            assert rail is not None
            rail.penalty = penalty
            self._events.rail_up(rail)

    def _open(self, slot: _Slot, here: RdmaNic) -> None:
        number = next(self._numbers)
        there = slot.there
        speeds = [speed for speed in (here.speed, there.speed) if speed]
        try:
            if (problem := here.problem()) is not None:
                raise TransportError(problem)
            rail = RdmaRail(
                slot.name,
                here,
                speed=min(speeds, default=0.0) / self._qps,
                penalty=self._penalty(slot),
                refresh=lambda then: self._refresh(rail, there.label, then),
                on_broken=lambda reason: self._broken(slot, number, reason),
            )
        except TransportError as refused:
            with self._lock:
                slot.state = _State.IDLE
            self._events.rail_down(slot.name, str(refused))
            return
        with self._lock:
            slot.number, slot.rail = number, rail
            closed, gone = self._closed, self._nics.get(slot.here) is not here
        if closed:
            rail.close()
            return
        if gone:
            rail.fail(f"rdma {rail.name}: the NIC here was taken away")
            return
        question = cards.Open(self._token, number, there.label, rail.card)
        self._ask(cards.OPEN, cards.encode(question), lambda answer: self._opened(slot, rail, answer))

    def _opened(self, slot: _Slot, rail: RdmaRail, answer: bytes | Failure) -> None:
        try:
            opened = cards.decode(_unless_failed(answer), cards.Opened)
            rail.there = Keys.of(opened.regions, remote=True)
            rail.connect(opened.card)
        except TransportError as failed:
            rail.fail(str(failed))
            if isinstance(answer, Failure) and not answer.retry:
                later(MEET_WAIT_S, self._meet)  # maybe the target has other NICs now
            return
        # A write of no bytes shows whether the two NICs reach each other, before anything depends on it.
        rail.write(0, _PROBE, lambda failure: self._probed(slot, rail, failure))

    def _probed(self, slot: _Slot, rail: RdmaRail, failure: Failure | None) -> None:
        if failure is not None:
            return  # the rail breaks, and says so
        with self._lock:
            up = slot.rail is rail and slot.state is _State.OPENING and not self._closed
            if up:
                slot.state = _State.UP
        if up:
            self._events.rail_up(rail)

    def _refresh(self, rail: RdmaRail, nic: str, then: Callable[[Failure | None], None]) -> None:
        def answered(answer: bytes | Failure) -> None:
            try:
                rows = cards.decode(_unless_failed(answer), cards.Regions).regions
                rail.there = Keys.of(rows, remote=True)
            except TransportError as failed:
                then(Failure(str(failed), retry=True))
            else:
                then(None)

        self._insist(cards.REGIONS, cards.encode(cards.Which(self._token, nic)), answered)

    # ------------------------------------------------------------------ breaking

    def _nic_failed(self, nic: RdmaNic, reason: str) -> None:
        """The port went down, or (no reason) some queue pair of this NIC failed."""
        with self._lock:
            rails = [slot.rail for slot in self._slots.values() if slot.nic is nic]
        for rail in rails:
            if rail is None:
                continue
            if reason:
                rail.fail(reason)
            else:
                rail.check()

    def _broken(self, slot: _Slot, number: int, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            slot.state = _State.BROKEN
        self._events.rail_down(slot.name, reason)
        self._fence(slot, number)

    def _fence(self, slot: _Slot, number: int) -> None:
        def answered(answer: bytes | Failure) -> None:
            if isinstance(answer, Failure):
                log.warning("%s: rail %s stays unfenced: %s", self._name, slot.name, answer.reason)
                return
            with self._lock:
                slot.rail = None
                slot.state = _State.IDLE
                again, slot.wanted = slot.wanted, False
            self._events.rail_fenced(slot.name)
            if again:
                self.restore(slot.name)

        self._insist(cards.FENCE, cards.encode(cards.Fence(self._token, number)), answered)

    def _insist(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        insist(self._ask, topic, body, on_answer, lambda: self._closed)


def pairs(here: Sequence[RdmaNic], there: Sequence[NicCard]) -> list[tuple[RdmaNic, NicCard]]:
    """Which NICs meet: each of either side at least once, the preferred of both with each other."""
    if not here or not there:
        return []
    n = max(len(here), len(there))
    return [(here[i % len(here)], there[i % len(there)]) for i in range(n)]


def _unless_failed(answer: bytes | Failure) -> bytes:
    if isinstance(answer, Failure):
        raise TransportError(answer.reason)
    return answer
