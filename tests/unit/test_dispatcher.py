"""Stateful tests of the dispatcher: rails fail, hang and return while lost writes land as late as they may.

Asserted throughout: no byte lands after its transfer ended; slices cover what was asked for, never more and
never twice at once; bytes fail over a bounded number of times; foreground is behind one slice per rail at
most. In the end, once the adversary rests: every transfer has ended, once.
"""

from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mooncake_connector.kv_transfer.dispatcher import Action, Dispatcher, Priority
from mooncake_connector.kv_transfer.rails import Rails
from mooncake_connector.kv_transfer.transport.base import Failure
from tests.unit.dispatcher_world import Flight, World, WorldRail

Index = st.integers(0, 1_000)
Rare = st.integers(0, 5)


class Transfers(RuleBasedStateMachine):
    dispatcher: type[Dispatcher] = Dispatcher

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.dispatcher)

    def rails(self, *states: str) -> list[WorldRail]:
        return [r for r in self.world.rails.values() if r.state in states]

    def flying(self) -> list[tuple[WorldRail, Flight]]:
        return [(r, f) for r in self.world.rails.values() for f in r.flying]

    @initialize(up=st.integers(0, 4))
    def begin(self, up: int) -> None:
        for rail in list(self.world.rails.values())[:up]:
            self.world.answer(rail, up=True)

    @rule(
        lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
        priority=st.sampled_from([*Priority, Priority.FOREGROUND]),
        patience=st.sampled_from([None, None, None, 0.3, 2.0]),
    )
    def submit(self, lengths: list[int], priority: Priority, patience: float | None) -> None:
        self.world.submit(lengths, priority, patience)

    @precondition(lambda self: self.world.live)
    @rule(i=Index, rare=Rare)
    def cancel(self, i: int, rare: int) -> None:
        if not rare:
            self.world.cancel(self.world.live[i % len(self.world.live)])

    @precondition(lambda self: self.flying())
    @rule(i=Index, several=st.integers(1, 4), ms=st.integers(0, 3))
    def land(self, i: int, several: int, ms: int) -> None:
        for _ in range(several):
            if flying := self.flying():
                self.world.pass_time(ms / 1000)
                if (flight := flying[i % len(flying)])[1] in flight[0].flying:
                    self.world.land(*flight)

    @precondition(lambda self: self.flying())
    @rule(i=Index, retry=st.booleans())
    def fail(self, i: int, retry: bool) -> None:
        """The target refuses a write; or one fails although its rail seems to go on."""
        flying = self.flying()
        self.world.land(*flying[i % len(flying)], Failure("bad", retry))

    @precondition(lambda self: self.rails("up"))
    @rule(i=Index, told_before=st.integers(0, 3))
    def break_rail(self, i: int, told_before: int) -> None:
        rails = self.rails("up")
        self.world.break_rail(rails[i % len(rails)].spec.name, told_before)

    @precondition(lambda self: self.rails("up") and self.world.live)
    @rule(i=Index, times=st.integers(1, 6))
    def break_every_rail_that_carries_it(self, i: int, times: int) -> None:
        world = self.world
        copy = world.copies[world.live[i % len(world.live)]]
        for _ in range(times):
            for rail in self.rails("up"):
                if any(f.copy is copy for f in rail.flying):
                    world.break_rail(rail.spec.name, 0)
                    while rail.news:
                        world.tell(rail)
                    world.fence(rail)
            world.pass_time(1.1)
            for rail in self.rails("restoring"):
                world.answer(rail, up=True)

    @precondition(lambda self: any(r.news for r in self.world.rails.values()))
    @rule(i=Index)
    def tell(self, i: int) -> None:
        rails = [r for r in self.world.rails.values() if r.news]
        self.world.tell(rails[i % len(rails)])

    @precondition(lambda self: any(r.ghosts for r in self.world.rails.values()))
    @rule(i=Index, nbytes=st.integers(1, 16))
    def land_late(self, i: int, nbytes: int) -> None:
        ghosts = [f for r in self.world.rails.values() for f in r.ghosts]
        self.world.write(ghosts[i % len(ghosts)], nbytes)

    @precondition(lambda self: self.rails("unfenced"))
    @rule(i=Index)
    def fence(self, i: int) -> None:
        rails = self.rails("unfenced")
        self.world.fence(rails[i % len(rails)])

    @precondition(lambda self: self.rails("new", "restoring"))
    @rule(i=Index, up=st.sampled_from([True, True, False]))
    def answer(self, i: int, up: bool) -> None:
        rails = self.rails("new", "restoring")
        self.world.answer(rails[i % len(rails)], up)

    @precondition(lambda self: not self.world.link_is_down)
    @rule(rare=st.integers(0, 20))
    def break_link(self, rare: int) -> None:
        if rare == 20:
            self.world.break_link()

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.3, 0.6, 1.1, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    def teardown(self) -> None:
        for _ in range(100):
            if not self.world.live:
                break
            self.world.calm()
            self.world.pass_time(0.2)
        assert not self.world.live, f"never ended: {self.world.live}"
        for _ in range(3):
            self.world.calm()
        dispatcher = self.world.dispatcher
        held = (dispatcher._flying, *dispatcher._waiting, *dispatcher._owed.values())
        assert not any(held)
        assert not any(dispatcher._backlog)


SETTINGS = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    report_multiple_bugs=False,
)


def test_transfers() -> None:
    run_state_machine_as_test(Transfers, settings=SETTINGS)


class EndsWithoutFence(Dispatcher):
    def _owe_fence(self, *args: Any) -> None:
        pass


class ForgetsFailuresBeforeTheRailsEnd(Dispatcher):
    """Only what is in flight when the rail is reported down waits for its fence."""

    before = False

    def slice_ended(self, slice: int, failure: Failure | None, now: float) -> list[Action]:
        self.before = True
        actions = super().slice_ended(slice, failure, now)
        self.before = False
        return actions

    def _owe_fence(self, *args: Any) -> None:
        if not self.before:
            super()._owe_fence(*args)


class CancelsAtOnce(Dispatcher):
    def _settle(self, t: Any, actions: list[Action]) -> None:
        if t.error is not None:
            t.flying = 0
        super()._settle(t, actions)


class ForgetsLostSlices(Dispatcher):
    def _lost(self, s: Any, reason: str) -> None:
        self._owe_fence(s.transfer, s.rail.spec.name)


class FailsOverForEver(Dispatcher):
    def _lost(self, s: Any, reason: str) -> None:
        s.tried = ()
        super()._lost(s, reason)


class CountsLostSlices(Dispatcher):
    """What was lost and posted again counts when it lands late."""

    def _lost(self, s: Any, reason: str) -> None:
        super()._lost(s, reason)
        s.transfer.done += s.nbytes


class BackgroundOvertakes(Dispatcher):
    def _pump(self, now: float, actions: list[Action]) -> None:
        queues = self._waiting
        for priority in reversed(Priority):
            self._waiting = tuple(q if i == priority else deque() for i, q in enumerate(queues))
            super()._pump(now, actions)
        self._waiting = queues


class _Greedy(Rails):
    def choose(self, left: int, backlog: int, tried: Any, background: bool, now: float) -> Any:
        return super().choose(left, backlog, tried, False, now)


class FillsRailsWithBackground(Dispatcher):
    def __init__(self, *policies: Any) -> None:
        super().__init__(*policies)
        self.rails = _Greedy(policies[1], policies[0])


PLANTED = {
    EndsWithoutFence: "had ended",
    ForgetsFailuresBeforeTheRailsEnd: "had ended",
    CancelsAtOnce: "had ended",
    ForgetsLostSlices: "reported as landed",
    CountsLostSlices: "reported as landed|overtaken",
    FailsOverForEver: "fails over for ever",
    BackgroundOvertakes: "overtaken",
    FillsRailsWithBackground: "behind two slices",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_finds_planted_bugs(bug: type[Dispatcher]) -> None:
    """The test above can fail: each of these bugs is found, for what it is."""
    machine = type("Buggy", (Transfers,), {"dispatcher": bug})
    with pytest.raises(AssertionError, match=PLANTED[bug]):
        run_state_machine_as_test(machine, settings=settings(SETTINGS, phases=[Phase.generate]))
