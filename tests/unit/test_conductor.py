"""The conductor: from arrival to end, with nothing left over; who is let in, who waits, who is told to go."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.base import (
    Arrival,
    Copy,
    Instance,
    Placement,
    Rejected,
    Slo,
    Unserved,
    Verdict,
    Waiting,
)
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.estimators import (
    Estimators,
    Lengths,
    OutputLengths,
    PrefillCost,
    PrefillEstimator,
    StepCost,
    StepEstimator,
)
from mooncake_connector.scheduler.policy.estimators.output_length import BINS
from mooncake_connector.scheduler.policy.fairness import Demand
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.policy.scheduling import Admission, Scheduling, SloRule

KV = 10_000


class Longest(OutputLengths):
    """Every answer is as long as it may be."""

    def predict(self, arrival: Arrival) -> Lengths:
        return Lengths(np.append(np.ones(BINS), 0.0), arrival.max_tokens)


class World:
    """A conductor with its engines: 1 ms a computed token; a step takes 10 ms and 1 ms a request."""

    def __init__(
        self,
        prefills: int = 1,
        decodes: int = 1,
        kv_tokens: int = KV,
        per_token: float = 1e-3,
        longest: bool = False,
        **fields: Any,
    ) -> None:
        self.index = PrefixIndex(10)
        self.estimators = Estimators(
            prefill=PrefillEstimator(PrefillCost(base=0.0, per_token=per_token, per_pair=0.0), 1e6),
            step=StepEstimator(StepCost(base=0.01, per_request=1e-3, per_token=0.0), 1e6),
            lengths=Longest() if longest else OutputLengths(),
        )
        self.conductor = Conductor(
            Scheduling(**({"favour_cheap": 0.0} | fields)), self.index, self.estimators
        )
        for side, count in (("prefill", prefills), ("decode", decodes)):
            for number in range(count):
                own = Instance(name=f"{side[0]}{number}", side=side, kv_tokens=kv_tokens)  # type: ignore[arg-type]
                self.conductor.join(own, 0.0)
                self.index.join(own.name)

    def arrive(self, id: str, now: float = 0.0, **fields: Any) -> Verdict:
        return self.conductor.arrive(Arrival(**({"id": id, "tokens": 1000, "max_tokens": 100} | fields)), now)

    def decoding(self, id: str, now: float = 0.0, **fields: Any) -> None:
        assert isinstance(self.arrive(id, now, **fields), Placement)
        self.conductor.prefilled(id, now)
        self.conductor.first_token(id, now)

    def empty(self, now: float) -> bool:
        accounts = self.conductor.accounts(now)
        return not any(a.queue or a.prompts or a.answers or a.batch or a.committed for a in accounts)


def test_a_request_is_in_the_books_from_its_placement_to_its_end() -> None:
    world = World(admission="none")
    verdict = world.arrive("a")
    assert isinstance(verdict, Placement)
    assert (verdict.prefill, verdict.decode, verdict.ttft) == ("p0", "d0", pytest.approx(1.0, rel=0.05))
    prefill, decode = world.conductor.accounts(0.4)
    assert (prefill.prompts, prefill.tokens, prefill.queue) == (1, 1000, pytest.approx(0.6))
    assert (decode.answers, decode.batch) == (1, 0)
    assert world.conductor.prefilled("a", 1.0) is None
    world.conductor.first_token("a", 1.0)
    prefill, decode = world.conductor.accounts(1.5)
    assert (prefill.prompts, decode.batch) == (0, 1)
    world.conductor.ended("a", 2.0, 50)
    assert world.empty(2.0)


def test_what_engines_did_is_learned() -> None:
    world = World(admission="none")
    before = world.estimators.handover.seconds("p0", "d0", 1000)
    world.arrive("a")
    world.conductor.prefilled("a", 2.0, queued=0.1, computed=1.9, cached=500)
    world.conductor.first_token("a", 2.5)
    world.conductor.ended("a", 2.5 + 49 * 0.02, 50)
    calibration = world.estimators.calibration
    found = {name: calibration.ratio(name, 0.5) for name in calibration.quantities()}
    assert found["prefill"] == pytest.approx(1.9 / 0.5, rel=0.05)
    assert found["ttft"] == pytest.approx(2.5, rel=0.05)
    assert found["tbt"] == pytest.approx(0.02 / 0.011, rel=0.05)
    assert {"queue", "output"} <= set(found)
    assert world.estimators.handover.seconds("p0", "d0", 1000) > before


def test_a_prefix_is_used_and_copied() -> None:
    world = World(prefills=2, admission="none", replication_threshold=1.0)
    keys = world.index.keys(range(1000))
    world.index.store("p0", keys)
    first, second = world.arrive("a", keys=keys), None
    assert isinstance(first, Placement)
    # The last token of a prompt is computed, whatever is held.
    assert (first.prefill, first.cached, first.copy) == ("p0", 990, None)
    world.arrive("b", tokens=5000, avoid=frozenset({"p1"}))
    second = world.arrive("c", keys=keys)
    assert isinstance(second, Placement)
    assert (second.prefill, second.copy) == ("p1", Copy("p0", 990, 990))


def test_one_that_comes_again_gives_up_its_first_place() -> None:
    world = World(decodes=2, admission="none")
    first = world.arrive("a")
    assert isinstance(first, Placement)
    again = world.arrive("a", avoid=frozenset({first.decode}))
    assert isinstance(again, Placement)
    assert again.decode != first.decode
    assert sum(account.answers for account in world.conductor.accounts(0.0)) == 1


def test_without_a_decode_engine_nobody_is_served() -> None:
    assert isinstance(World(decodes=0).arrive("a"), Unserved)


def test_an_engine_that_goes_takes_its_books_with_it() -> None:
    world = World(admission="none")
    world.decoding("a")
    world.arrive("b")
    world.conductor.leave("d0", 1.0)
    world.conductor.leave("p0", 1.0)
    world.conductor.prefilled("b", 1.5)
    world.conductor.first_token("b", 1.5)
    world.conductor.progressed("a", 9, 1.5)
    for id in "ab":
        world.conductor.ended(id, 2.0, 10)
    world.conductor.join(Instance(name="d0", side="decode"), 2.0)
    assert world.empty(2.0)


def test_a_paused_engine_gets_nothing_and_keeps_its_books() -> None:
    world = World(2, 2, admission="none", longest=True)
    both = [world.arrive(id, max_tokens=2000) for id in "ab"]
    assert {verdict.decode for verdict in both} == {"d0", "d1"}
    assert {verdict.prefill for verdict in both} == {"p0", "p1"}
    before = {account.name: account for account in world.conductor.accounts(0.5)}
    for name in ("p0", "d0", "nobody"):
        world.conductor.pause(name, 0.5)
    assert {account.name: account for account in world.conductor.accounts(0.5)} == before
    for at in range(5):
        verdict = world.arrive(f"c{at}", 0.5)
        assert (verdict.prefill, verdict.decode) == ("p1", "d1")
        world.conductor.ended(f"c{at}", 0.5)
    for id in "ab":
        world.conductor.prefilled(id, 1.0)
        world.conductor.first_token(id, 1.0)
    world.conductor.ended("a" if both[0].decode == "d1" else "b", 1.5, 10)
    for name in ("p0", "d0"):
        world.conductor.resume(name, 1.5)
    # It still writes the answer that it had when it was paused: it is the other one that is idle.
    verdict = world.arrive("d", 1.5)
    assert isinstance(verdict, Placement)
    assert verdict.decode == "d1"
    for id in "abd":
        world.conductor.ended(id, 2.0, 10)
    assert world.empty(2.0)


def test_who_waits_when_the_last_decode_engine_is_paused_is_not_served() -> None:
    world = World(longest=True)
    full(world)
    assert isinstance(world.arrive("a", tokens=1500, slo=Slo(ttft=20.0)), Waiting)
    world.conductor.pause("d0", 1.0)
    assert world.conductor.wake(1.0) == [("a", Unserved())]


def test_the_room_of_a_paused_engine_is_nobodys() -> None:
    world = World(1, 2, admission="early", emergency_kv=0.8)
    full(world)
    (busy,) = (account.name for account in world.conductor.accounts(0.0) if account.batch)
    other = "d1" if busy == "d0" else "d0"
    world.conductor.pause(other, 0.0)
    verdict = world.arrive("a", slo=Slo(tbt=1.0))
    assert isinstance(verdict, Rejected)
    assert verdict.target == "overload"
    world.conductor.resume(other, 0.0)
    assert isinstance(world.arrive("a", slo=Slo(tbt=1.0)), Placement)


MODES: tuple[Admission, ...] = ("baseline", "early", "predicted", "per_request")


@pytest.mark.parametrize("admission", MODES)
def test_nobody_is_rejected_where_nothing_is_in_flight(admission: Admission) -> None:
    # Neither promise can be kept, nor is there room.
    world = World(admission=admission, kv_tokens=100)
    hopeless = Slo(ttft=0.1, tbt=0.001)
    assert isinstance(world.arrive("a", slo=hopeless), Placement)
    assert world.conductor.prefilled("a", 1.0) is None


@pytest.mark.parametrize("admission", MODES)
def test_who_would_wait_too_long_for_prefill_is_rejected_and_told_when_to_come_back(
    admission: Admission,
) -> None:
    world = World(admission=admission)
    assert isinstance(world.arrive("a", tokens=3000), Placement)
    verdict = world.arrive("b", slo=Slo(ttft=2.0))
    assert isinstance(verdict, Rejected)
    assert verdict.target == "ttft"
    assert verdict.predicted == pytest.approx(4.0, rel=0.05)
    assert (verdict.limit, verdict.retry_after) == (pytest.approx(2.0), pytest.approx(2.0, rel=0.05))
    world.conductor.ended("a", 1.0)
    assert isinstance(world.arrive("b", 1.0, slo=Slo(ttft=2.0)), Placement)


@pytest.mark.parametrize("admission", MODES)
def test_the_emergency_threshold_protects_engines_in_every_mode(admission: Admission) -> None:
    world = World(admission=admission, emergency_seconds=5.0, slo=Slo(ttft=100.0))
    assert isinstance(world.arrive("a", tokens=6000, slo=Slo(ttft=100.0)), Placement)
    verdict = world.arrive("b", slo=Slo(ttft=100.0))
    assert isinstance(verdict, Rejected)
    assert (verdict.target, verdict.limit) == ("overload", 5.0)


def test_mode_none_lets_everybody_in() -> None:
    world = World(admission="none", kv_tokens=100, emergency_seconds=1.0, emergency_kv=0.1)
    assert all(isinstance(world.arrive(str(n), slo=Slo(ttft=0.1, tbt=1e-4)), Placement) for n in range(50))


def crowd(world: World, count: int, now: float = 0.0) -> None:
    for number in range(count):
        world.decoding(f"crowd{number}", now, tokens=10, max_tokens=100_000, slo=Slo(tbt=1.0))


def test_baseline_looks_at_decode_only_when_the_prompt_is_computed() -> None:
    world = World(admission="baseline", kv_tokens=0)
    crowd(world, 20)
    strict = Slo(tbt=0.025)
    assert isinstance(world.arrive("a", slo=strict), Placement)
    verdict = world.conductor.prefilled("a", 1.0)
    assert isinstance(verdict, Rejected)
    assert (verdict.target, verdict.limit, verdict.predicted) == ("tbt", 0.025, pytest.approx(0.031))
    assert [a.answers for a in world.conductor.accounts(1.0) if a.side == "decode"] == [20]


def test_early_looks_at_decode_as_it_is_at_arrival() -> None:
    world = World(admission="early", kv_tokens=0)
    crowd(world, 20)
    assert isinstance(world.arrive("a", slo=Slo(tbt=0.025)), Rejected)
    # Those whose prompts are still computed are not there yet: this is what makes loads swing.
    other = World(admission="early", kv_tokens=0)
    for number in range(20):
        other.arrive(str(number), tokens=10, slo=Slo(tbt=1.0))
    assert isinstance(other.arrive("a", slo=Slo(tbt=0.025)), Placement)


def test_predicted_counts_those_whose_prompts_end_first_and_leaves_out_those_that_end() -> None:
    world = World(admission="predicted", kv_tokens=0)
    for number in range(20):
        world.arrive(str(number), tokens=10, slo=Slo(tbt=1.0))
    assert isinstance(world.arrive("a", slo=Slo(tbt=0.025)), Rejected)
    # This prompt takes longer than every answer is taken to last.
    assert isinstance(world.arrive("b", tokens=25_000, slo=Slo(tbt=0.025)), Placement)


def test_per_request_looks_at_the_lengths_of_others() -> None:
    # Both pools of answers are the same size now; those of one world end before this prompt is computed.
    short, long = World(kv_tokens=0), World(kv_tokens=0)
    for number in range(20):
        for world, most in ((short, 5), (long, 100_000)):
            world.decoding(str(number), tokens=10, max_tokens=most, slo=Slo(tbt=1.0))
    strict = Slo(tbt=0.025, ttft=1.5)
    assert isinstance(short.arrive("a", slo=strict), Placement)
    verdict = long.arrive("a", slo=strict)
    assert isinstance(verdict, Rejected)
    assert verdict.target == "tbt"
    assert verdict.predicted > 0.025
    assert verdict.retry_after >= 1.0


def test_per_request_keeps_what_was_promised_to_others() -> None:
    def rejected(first: Slo) -> list[str]:
        world = World(kv_tokens=0)
        world.decoding("first", tokens=10, max_tokens=100_000, slo=first)
        found = []
        for number in range(30):
            verdict = world.arrive(str(number), tokens=10, max_tokens=100_000, slo=Slo(tbt=1.0, ttft=0.4))
            if isinstance(verdict, Rejected):
                found.append(verdict.target)
            world.conductor.first_token(str(number), 0.0)
        return found

    assert rejected(Slo(tbt=1.0)) == []
    assert set(rejected(Slo(tbt=0.02))) == {"tbt"}


def test_per_request_takes_another_decode_engine_if_the_best_has_no_room() -> None:
    world = World(decodes=2, kv_tokens=2000)
    # d0 has one long answer, which takes all its KV in time; d1 has more answers, but room.
    world.decoding("a", tokens=1500, max_tokens=600)
    for number in range(3):
        world.decoding(f"b{number}", tokens=10, max_tokens=10)
    verdict = world.arrive("c", tokens=400, max_tokens=50)
    assert isinstance(verdict, Placement)
    assert verdict.decode == "d1"


def full(world: World) -> None:
    """All KV of the one decode engine is taken, for 5.5 s."""
    world.decoding("full", tokens=9000, max_tokens=500)


def test_a_rejection_says_what_it_may_come_to_and_that_is_too_much() -> None:
    world, slo = World(), Slo(ttft=1.5, tbt=10.0)
    for number in range(20):
        # Engines alone let everybody in; each is four times as late as predicted.
        now = 10.0 * number
        world.arrive(f"{number}", now, slo=slo)
        world.conductor.prefilled(f"{number}", now + 4, queued=3.0, computed=1.0)
        world.conductor.first_token(f"{number}", now + 4)
        world.conductor.ended(f"{number}", now + 5, 10)
    assert isinstance(world.arrive("other", 200.0, tokens=1000, slo=slo), Placement)
    verdict = world.arrive("late", 200.5, slo=slo)
    assert isinstance(verdict, Rejected)
    assert (verdict.target, verdict.limit) == ("ttft", 1.5)
    assert verdict.predicted > 3


def test_who_can_be_let_in_in_time_waits_and_is_let_in_when_there_is_room() -> None:
    world = World(longest=True)
    full(world)
    verdict = world.arrive("a", tokens=1500, slo=Slo(ttft=20.0))
    assert isinstance(verdict, Waiting)
    assert verdict.until == pytest.approx(18.5, rel=0.01)
    due = world.conductor.due()
    assert due is not None
    assert due <= verdict.until
    assert world.conductor.wake(0.5) == []
    assert world.conductor.waiting() == 1
    world.conductor.ended("full", 3.0, 200)
    due = world.conductor.due()
    assert due is not None
    assert due <= 3.0
    ((id, placed),) = world.conductor.wake(3.0)
    assert id == "a"
    assert isinstance(placed, Placement)
    # It has waited for 3 s.
    assert placed.ttft == pytest.approx(4.5, rel=0.05)
    assert world.conductor.due() is None


def test_who_waits_is_answered_by_the_promised_moment() -> None:
    world = World(longest=True)
    full(world)
    verdict = world.arrive("a", tokens=1500, slo=Slo(ttft=20.0))
    assert isinstance(verdict, Waiting)
    # The answer before it goes on and on.
    for second in range(1, 19):
        world.conductor.progressed("full", second, float(second))
    ((id, rejected),) = world.conductor.wake(verdict.until)
    assert id == "a"
    assert isinstance(rejected, Rejected)
    assert world.conductor.waiting() == 0


def test_looks_at_those_that_wait_are_rare() -> None:
    # Whatever ends elsewhere, and however often the caller wakes it: a look costs more than that.
    world = World(longest=True)
    full(world)
    verdict = world.arrive("a", tokens=1500, slo=Slo(ttft=20.0))
    assert isinstance(verdict, Waiting)
    looks, match = 0, world.index.match

    def counted(keys: Sequence[int]) -> Mapping[str, int]:
        nonlocal looks
        looks += 1
        return match(keys)

    world.index.match = counted  # type: ignore[method-assign]
    for moment in np.arange(0.0, verdict.until, 0.01).tolist():
        world.decoding(f"short{moment}", moment, tokens=1, priority=1, max_tokens=1)
        world.conductor.ended(f"short{moment}", moment, 1)
        looks -= 1
        # The answer before it goes on and on.
        world.conductor.progressed("full", int(moment) + 1, moment)
        assert world.conductor.wake(moment) == []
    assert 0 < looks <= verdict.until + 3
    assert [id for id, _ in world.conductor.wake(verdict.until)] == ["a"]


def test_who_waited_in_vain_is_told_so() -> None:
    world = World(longest=True)
    full(world)
    verdict = world.arrive("a", tokens=1500, slo=Slo(ttft=20.0))
    assert isinstance(verdict, Waiting)
    ((_, rejected),) = world.conductor.wake(verdict.until)
    assert isinstance(rejected, Rejected)
    assert rejected.waited == pytest.approx(verdict.until)


def test_prompts_of_those_that_wait_are_not_overtaken_for_ever() -> None:
    def second(first_waits: bool) -> Verdict:
        world = World(longest=True)
        full(world)
        if first_waits:
            assert isinstance(world.arrive("first", tokens=1500, slo=Slo(ttft=20.0)), Waiting)
        # Short enough for decode, but its prompt would take what the first one needs of prefill.
        return world.arrive("second", tokens=300, max_tokens=10, slo=Slo(ttft=1.0))

    assert isinstance(second(False), Placement)
    rejected = second(True)
    assert isinstance(rejected, Rejected)
    assert rejected.target == "ttft"


def test_what_no_engine_could_keep_is_served_by_one_that_has_nothing_to_do() -> None:
    # 120 s of prefill, 30 s promised; decode is busy all along.
    world = World(kv_tokens=0)
    world.decoding("other", tokens=10, max_tokens=100_000)
    first = world.arrive("a", tokens=120_000)
    assert isinstance(first, Placement)
    second = world.arrive("b", 20.0, tokens=120_000)
    assert isinstance(second, Rejected)
    assert (second.target, second.limit) == ("ttft", 30.0)
    assert second.predicted == pytest.approx(220.0, rel=0.05)
    assert second.retry_after == pytest.approx(100.0)
    world.conductor.prefilled("a", 119.0)
    assert isinstance(world.arrive("b", 20.0 + second.retry_after, tokens=120_000), Placement)


@pytest.mark.parametrize("admission", MODES)
def test_a_hopeless_promise_is_told_when_an_engine_will_have_nothing_to_do(admission: Admission) -> None:
    world = World(admission=admission, kv_tokens=0)
    assert isinstance(world.arrive("a", tokens=120_000), Placement)
    verdict = world.arrive("b", 100.0, tokens=120_000)
    assert isinstance(verdict, Rejected)
    assert verdict.retry_after == pytest.approx(20.0)


def test_who_needs_an_engine_for_itself_is_told_when_it_will_have_nothing_to_do() -> None:
    # Half of everything is kept for the urgent, so there is no room beside anybody.
    world = World(longest=True, per_token=1e-6, reserve=0.5)
    world.decoding("urgent", tokens=10, priority=1)
    world.conductor.ended("urgent", 0.0, 10)
    full(world)
    verdict = world.arrive("a", tokens=9000, slo=Slo(ttft=1.0))
    assert isinstance(verdict, Rejected)
    assert 5.5 <= verdict.retry_after < 10
    world.conductor.ended("full", 5.5, 500)
    assert isinstance(world.arrive("a", verdict.retry_after, tokens=9000, slo=Slo(ttft=1.0)), Placement)


def test_promises_are_kept_by_engines_that_are_slower_than_predicted() -> None:
    # Prompts take from half to five times what is predicted, and the estimator is not allowed to learn.
    world, chance = World(kv_tokens=0), random.Random(3)
    slo, free, kept, events = Slo(ttft=3.0, tbt=10.0), 0.0, [], []
    for number in range(3000):
        now = number / 10
        while events and events[0][0] <= now:
            moment, came, id = events.pop(0)
            world.conductor.prefilled(id, moment)
            world.conductor.first_token(id, moment)
            world.conductor.ended(id, moment, 1)
            kept.append(moment - came <= slo.ttft)
        if isinstance(world.arrive(f"{number}", now, tokens=200, slo=slo), Placement):
            free = max(free, now) + 0.2 * chance.choice([0.5, 1.0, 1.0, 2.0, 5.0])
            events.append((free, now, f"{number}"))
    assert len(kept) > 300
    assert sum(kept[200:]) >= 0.94 * len(kept[200:])


def test_who_waits_may_go() -> None:
    world = World(longest=True)
    full(world)
    assert isinstance(world.arrive("a", tokens=1500, slo=Slo(ttft=20.0)), Waiting)
    world.conductor.ended("a", 1.0)
    assert (world.conductor.waiting(), world.conductor.due()) == (0, None)


def test_who_waits_when_the_last_decode_engine_goes_is_not_served() -> None:
    world = World(longest=True)
    full(world)
    assert isinstance(world.arrive("a", tokens=1500, slo=Slo(ttft=20.0)), Waiting)
    world.conductor.leave("d0", 1.0)
    assert world.conductor.wake(1.0) == [("a", Unserved())]


def test_the_urgent_go_first_and_may_use_the_reserve() -> None:
    world = World(reserve=0.5)
    world.decoding("urgent", priority=1, tokens=10)
    world.arrive("a", tokens=3000)
    slo = Slo(ttft=5.0)
    ordinary, urgent = world.arrive("b", slo=slo), world.arrive("c", slo=slo, priority=1)
    assert isinstance(ordinary, Rejected)
    assert ordinary.limit < 5.0
    assert isinstance(urgent, Placement)


def test_a_tenant_that_floods_leaves_the_reserve_to_others() -> None:
    world = World(reserve=0.5)
    slo, kept = Slo(ttft=10.0), []
    assert isinstance(world.arrive("first", tenant="modest", tokens=100), Placement)
    for number in range(20):
        kept.append(isinstance(world.arrive(str(number), tenant="greedy", slo=slo), Placement))
    assert 0 < sum(kept) < 9
    assert isinstance(world.arrive("modest", tenant="modest", slo=slo), Placement)


def test_the_dear_make_room_when_it_is_tight() -> None:
    def served(favour: float) -> tuple[int, int]:
        world, counts = World(favour_cheap=favour, per_token=1e-6), [0, 0]
        for number in range(400):
            now, dear = number * 0.1, number % 4 == 0
            verdict = world.arrive(str(number), now, tokens=3000 if dear else 300, slo=Slo(ttft=1.0))
            counts[dear] += isinstance(verdict, Placement)
            world.conductor.prefilled(str(number), now)
            world.conductor.first_token(str(number), now)
            world.conductor.ended(str(number - 40), now, 100)
        return counts[0], counts[1]

    (cheap, dear), (more_cheap, less_dear) = served(0.0), served(0.5)
    assert cheap + dear < more_cheap + less_dear
    assert 0 < less_dear < dear


def test_the_dear_are_those_without_whom_engines_could_serve_the_others() -> None:
    def bound(rate: float, engines: int = 1) -> float:
        demand = Demand()
        for number in range(2000):
            demand.add(0.1 + number % 10 / 10, engines, number / rate)
        return demand.bound

    # Each takes 0.55 s on average.
    assert bound(1.5) == math.inf
    assert bound(2.2) == 1.0
    assert bound(2.2, engines=2) == math.inf
    assert bound(4.0) == pytest.approx(0.8, abs=0.11)
    assert bound(100.0) <= 0.2


def test_slos_are_found_by_model_and_class() -> None:
    fast, model = Slo(ttft=1.0), Slo(ttft=2.0)
    own = Scheduling(slos=(SloRule(slo=fast, service_class="gold"), SloRule(slo=model, model="m")))
    assert own.slo_of("m", "gold") == fast
    assert own.slo_of("m") == model
    assert own.slo_of("other") == Slo()


class Story:
    """A conductor under random load, woken when it wants to be; engines are about as fast as predicted."""

    def __init__(self, admission: Admission, routing: str, seed: int, requests: int, load: float) -> None:
        self.world = World(2, 2, 20_000, admission=admission, routing=routing, favour_cheap=0.5)
        self.random = random.Random(seed)
        self.log: list[tuple[str, Verdict]] = []
        self.events: list[tuple[float, str, str]] = []
        self.until: dict[str, float] = {}
        self.now = 0.0
        for number in range(requests):
            self.now += self.random.expovariate(load)
            self.catch_up(self.now)
            tokens = self.random.randint(1, 3000)
            keys = self.world.index.keys(range(self.random.randint(0, tokens)))
            self.decide(
                str(number),
                self.world.arrive(
                    str(number),
                    self.now,
                    tokens=tokens,
                    keys=keys,
                    tenant=self.random.choice("ab"),
                    priority=self.random.choice([0, 0, 1]),
                    max_tokens=self.random.randint(1, 400),
                    slo=Slo(ttft=5.0, tbt=0.03),
                ),
            )
        self.catch_up(float("inf"))

    def catch_up(self, until: float) -> None:
        conductor = self.world.conductor
        while True:
            event = min(self.events, default=None)
            due = conductor.due()
            if due is not None and due <= min(until, event[0] if event else until):
                self.now = max(self.now if until == float("inf") else 0.0, due)
                for id, verdict in conductor.wake(self.now):
                    self.decide(id, verdict)
                continue
            if event is None or event[0] > until:
                return
            self.events.remove(event)
            self.now, id, what = event
            if what == "prefilled":
                if isinstance(verdict := conductor.prefilled(id, self.now), Rejected):
                    self.events = [other for other in self.events if other[1] != id]
                    self.log.append((id, verdict))
            elif what == "first":
                conductor.first_token(id, self.now)
            else:
                conductor.ended(id, self.now, int(what))

    def decide(self, id: str, verdict: Verdict) -> None:
        self.log.append((id, verdict))
        if id in self.until:
            assert self.now <= self.until.pop(id) + 1e-6
        if isinstance(verdict, Waiting):
            assert verdict.until >= self.now
            self.until[id] = verdict.until
        elif isinstance(verdict, Placement):
            seconds = self.random.uniform(0.5, 1.5) * max(verdict.ttft, 1e-3)
            tokens = self.random.randint(1, 400)
            self.events.append((self.now + seconds, id, "prefilled"))
            self.events.append((self.now + seconds + 0.01, id, "first"))
            self.events.append((self.now + seconds + 0.02 + tokens * 0.02, id, str(tokens)))


@settings(max_examples=12, deadline=None)
@given(
    admission=st.sampled_from(["none", *MODES]),
    routing=st.sampled_from(["conductor", "local_cache", "least_loaded", "round_robin", "random"]),
    seed=st.integers(0, 1000),
    load=st.floats(0.5, 30.0),
)
def test_everybody_is_answered_in_time_nothing_is_left_over_and_the_same_seed_has_the_same_end(
    admission: Admission, routing: str, seed: int, load: float
) -> None:
    story = Story(admission, routing, seed, 60, load)
    assert story.until == {}
    assert story.world.conductor.waiting() == 0
    assert story.world.empty(story.now)
    final = [id for id, verdict in story.log if not isinstance(verdict, Waiting)]
    assert len(set(final)) == 60
    assert Story(admission, routing, seed, 60, load).log == story.log


@settings(max_examples=40, deadline=None)
@given(before=st.integers(0, 20), tokens=st.integers(1, 5000), admission=st.sampled_from(["none", *MODES]))
def test_ttft_never_falls_when_load_grows(before: int, tokens: int, admission: Admission) -> None:
    def ttft(others: int) -> float:
        world = World(2, 2, 0, admission=admission)
        for number in range(others):
            world.arrive(f"other{number}", tokens=100)
        verdict = world.arrive("a", tokens=tokens)
        assert isinstance(verdict, Placement)
        return verdict.ttft

    assert ttft(before + 1) >= ttft(before) - 1e-9


def test_a_store_may_stand_in_for_the_index() -> None:
    class Store:
        block_size = 100

        def match(self, keys: Sequence[int]) -> Mapping[str, int]:
            return {"p": len(keys)}

    conductor = Conductor(Scheduling(), Store(), Estimators())
    conductor.join(Instance(name="p", side="prefill"), 0.0)
    conductor.join(Instance(name="d", side="decode"), 0.0)
    verdict = conductor.arrive(Arrival(id="a", tokens=1000, keys=[1, 2, 3]), 0.0)
    assert isinstance(verdict, Placement)
    assert verdict.cached == 300
