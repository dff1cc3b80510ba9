"""What a rail learns, and which rail is chosen."""

from math import inf
from typing import Any

import numpy as np
import pytest

from mooncake_connector.kv_transfer.dispatcher import Dispatcher, Post, Priority
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.rails import Health, RailPolicy, Rails, RailSpec, RailState
from mooncake_connector.kv_transfer.slicing import SlicePolicy

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 1e9


def rails_of(*specs: RailSpec) -> Rails:
    rails = Rails(RailPolicy(), SlicePolicy())
    for spec in specs:
        rails.up(spec, 0.0)
    return rails


def state(speed: float = 1 * GB) -> RailState:
    return RailState(RailSpec("a", "rdma", 0, speed=speed), RailPolicy(), SlicePolicy())


def choice(
    rails: Rails, left: int = 4 * KIB, tried: tuple[str, ...] = (), background: bool = False
) -> str | None:
    chosen = rails.choose(left, left, tried, background, 1.0)
    return None if chosen is None else chosen[0].spec.name


def break_rail(rails: Rails, name: str, now: float) -> RailState:
    """Down and fenced."""
    rails.down(name, "broken", now)
    rail = rails.get(name)
    assert rail is not None
    assert rail.fenced()
    return rail


# bandwidth


def test_slices_that_share_a_rail_count_for_its_speed_together() -> None:
    """Four slices of 1 MiB posted at once, one landing each millisecond: 1 MiB/ms, not a quarter of it."""
    rail = state(speed=100 * GB)
    for _ in range(4):
        rail.posted(MIB, False, 1.0)
    for i in range(1, 5):
        rail.ended(MIB, False, True, 1.0 + i * 1e-3)
    assert rail.bandwidth == pytest.approx(MIB / 1e-3)


def test_idle_time_does_not_count() -> None:
    rail = state()
    for start in (1.0, 5.0, 60.0):
        rail.posted(MIB, False, start)
        rail.ended(MIB, False, True, start + 1e-3)
    assert rail.bandwidth == pytest.approx(MIB / 1e-3)


def test_a_slice_that_waits_for_its_source_makes_no_rail_slow_or_stalled() -> None:
    rail = state(speed=100 * GB)
    rail.posted(MIB, False, 1.0, late=True)
    rail.posted(MIB, False, 1.0)  # behind it
    assert rail.due() == inf
    rail.ended(MIB, False, True, 9.0, late=True)
    assert rail.bandwidth == 100 * GB
    assert rail.due() == pytest.approx(12.0)
    rail.ended(MIB, False, True, 9.001)
    assert rail.bandwidth == pytest.approx(MIB / 1e-3)
    rail.posted(MIB, False, 20.0, late=True)
    rail.down("broken", 21.0)
    assert not rail.late


def test_slices_of_a_plan_that_waits_for_a_gpu_are_late() -> None:
    dispatcher = Dispatcher()
    dispatcher.rail_up(RailSpec("a", "tcp", 0), 0.0)
    rail = dispatcher.rails.get("a")
    assert rail is not None
    one = np.array([4 * MIB], np.uint64)
    event: Any = object()
    posted = dispatcher.submit(1, 9, CopyPlan(one, one, one, after=(event,)), Priority.FOREGROUND, None, 0.0)
    slices = [action.slice for action in posted if isinstance(action, Post)]
    assert rail.late == len(slices) == 2
    dispatcher.slice_ended(slices[0], None, 5.0)
    assert rail.late == 2  # the next one is on its way
    dispatcher.rail_down("a", "broken", 6.0)
    assert rail.late == 0


def test_acknowledgements_that_come_together_do_not_look_fast() -> None:
    rail = state()
    now = 1.0
    for _ in range(100):
        rail.posted(MIB, False, now)
        rail.posted(MIB, False, now)
        now += 2e-3
        rail.ended(MIB, False, True, now)
        now += 1e-6
        rail.ended(MIB, False, True, now)
    assert rail.bandwidth == pytest.approx(MIB / 1e-3, rel=0.2)


def test_small_writes_tell_nothing_of_bandwidth() -> None:
    rail = state(speed=10 * GB)
    for i in range(1000):
        rail.posted(4 * KIB, False, i * 1e-3)
        rail.ended(4 * KIB, False, True, i * 1e-3 + 20e-6)
    assert rail.bandwidth == 10 * GB


def test_lost_slices_tell_nothing_of_bandwidth() -> None:
    rail = state(speed=10 * GB)
    rail.posted(MIB, False, 1.0)
    rail.ended(MIB, False, False, 2.0)
    assert rail.bandwidth == 10 * GB
    assert rail.in_flight == rail.slices == 0


# choice


def test_less_busy_and_faster_rails_come_first() -> None:
    rails = rails_of(RailSpec("slow", "rdma", 0, speed=1 * GB), RailSpec("fast", "rdma", 0, speed=4 * GB))
    assert choice(rails, MIB) == "fast"
    fast = rails.get("fast")
    assert fast is not None
    fast.posted(8 * MIB, False, 1.0)
    assert choice(rails, MIB) == "slow"


def test_a_worse_rank_is_the_last_resort() -> None:
    rails = rails_of(RailSpec("tcp-0", "tcp", 1, speed=100 * GB), RailSpec("rdma-0", "rdma", 0, speed=1 * GB))
    assert choice(rails) == "rdma-0"
    break_rail(rails, "rdma-0", 1.0)
    assert choice(rails) == "tcp-0"


def test_rails_that_lost_a_slice_are_avoided_unless_there_is_no_other() -> None:
    rails = rails_of(RailSpec("a", "rdma", 0, speed=9 * GB), RailSpec("b", "rdma", 0, speed=1 * GB))
    assert choice(rails) == "a"
    assert choice(rails, tried=("a",)) == "b"
    assert choice(rails, tried=("a", "b")) == "a"


def test_at_least_two_slices_and_no_more_than_the_window() -> None:
    rails = rails_of(RailSpec("a", "rdma", 0, speed=1 * GB))
    rail = rails.get("a")
    assert rail is not None
    posted = []
    while (chosen := rails.choose(100 * MIB, 100 * MIB, (), False, 1.0)) is not None:
        rail.posted(chosen[1], False, 1.0)
        posted.append(chosen[1])
    assert len(posted) == 2  # its speed is a claim only
    rail.ended(posted.pop(), False, True, 1.0 + 1e-3)
    while (chosen := rails.choose(100 * MIB, 100 * MIB, (), False, 1.0)) is not None:
        rail.posted(chosen[1], False, 1.0)
    window = rail.bandwidth * RailPolicy().window_s
    assert window <= rail.in_flight < window + rail.slice_bytes


def test_many_small_writes_fit_in_flight_before_any_speed_is_known() -> None:
    rail = state()
    while rail.has_room(1.0):
        rail.posted(4 * KIB, False, 1.0)
    assert rail.slices == RailPolicy().max_slices


def test_a_far_rail_has_a_window_too_and_rests_when_it_is_done() -> None:
    rails = rails_of(RailSpec("near", "rdma", 0), RailSpec("far", "rdma", 0, penalty=2.0))
    near, far = rails.get("near"), rails.get("far")
    assert near is not None
    assert far is not None
    near.posted(GIB, False, 1.0)
    near.posted(GIB, False, 1.0)
    while (chosen := rails.choose(GIB, GIB, (), False, 1.0)) is not None:
        far.posted(chosen[1], False, 1.0)
    window = RailPolicy().window_s
    assert window <= 2 * far.in_flight / far.bandwidth < window + 2 * MIB / far.bandwidth
    while far.slices:
        far.ended(far.in_flight // far.slices, False, True, 1.0)
    assert rails.choose(GIB, GIB, (), False, 1.0) is None
    assert rails.choose(GIB, GIB, (), False, far.rested()) is not None


def test_one_background_slice_per_rail() -> None:
    rails = rails_of(RailSpec("a", "rdma", 0), RailSpec("b", "rdma", 0))
    for _ in range(2):
        name = choice(rails, background=True)
        assert name is not None
        rail = rails.get(name)
        assert rail is not None
        rail.posted(4 * KIB, True, 1.0)
    assert choice(rails, background=True) is None
    assert choice(rails) is not None


# health


def test_cooldown_doubles_up_to_its_cap_and_is_forgiven() -> None:
    rails = rails_of(spec := RailSpec("a", "rdma", 0))
    now, rests = 0.0, []
    for _ in range(14):
        rail = break_rail(rails, "a", now)
        rests.append(rail.due() - now)
        now = rail.due()
        rails.up(spec, now)
        now += 1.0
    assert rests[:4] == pytest.approx([0.5, 1.0, 2.0, 4.0])
    assert rests[-1] == pytest.approx(300.0)
    now += RailPolicy().settle_s
    rail.suspect("a write failed", now)
    assert break_rail(rails, "a", now).due() - now == pytest.approx(0.5)


def test_a_rail_that_can_not_be_restored_cools_on() -> None:
    rails = rails_of(RailSpec("a", "rdma", 0))
    rail = break_rail(rails, "a", 1.0)
    rail.restore()
    rails.down("a", "still broken", 2.0)
    assert rail.health is Health.COOLING
    assert rail.due() == pytest.approx(3.0)


def test_a_restored_rail_carries_one_slice_until_one_has_landed() -> None:
    rails = rails_of(a := RailSpec("a", "rdma", 0), RailSpec("b", "tcp", 1))
    rail = break_rail(rails, "a", 1.0)
    rails.up(a, 2.0)
    assert rail.health is Health.PROBATION
    chosen = rails.choose(100 * MIB, 100 * MIB, (), False, 2.0)
    assert chosen is not None
    assert chosen == (rail, 64 * KIB)
    rail.posted(chosen[1], False, 2.0)
    assert choice(rails, MIB) == "b"
    rails.ended(rail, chosen[1], False, None, 2.1)
    assert rail.health is Health.UP
    assert choice(rails, MIB) == "a"


def test_a_worse_rail_on_probation_waits_until_it_is_needed() -> None:
    rails = rails_of(RailSpec("a", "rdma", 0), tcp := RailSpec("tcp-0", "tcp", 1))
    break_rail(rails, "tcp-0", 1.0)
    rails.up(tcp, 2.0)
    assert choice(rails) == "a"
    break_rail(rails, "a", 3.0)
    assert choice(rails) == "tcp-0"


def test_an_unfenced_rail_does_not_come_up() -> None:
    rails = rails_of(spec := RailSpec("a", "rdma", 0))
    rails.down("a", "broken", 1.0)
    rails.up(spec, 2.0)
    assert choice(rails) is None


def test_a_rail_that_never_came_up_is_restored_too() -> None:
    rails = rails_of()
    rails.down("a", "no route", 1.0)
    rail = rails.get("a")
    assert rail is not None
    assert rail.due() == pytest.approx(1.5)
    rail.restore()
    rails.up(RailSpec("a", "rdma", 0, speed=25 * GB), 2.0)
    assert rail.bandwidth == 25 * GB
    assert choice(rails) == "a"


def test_patience_grows_with_what_is_in_flight_on_a_slow_rail() -> None:
    rail = state(speed=1e6)
    rail.posted(MIB, False, 1.0)
    assert rail.due() == pytest.approx(1.0 + 16 * MIB / 1e6)
    quick = state(speed=1 * GB)
    quick.posted(MIB, False, 1.0)
    assert quick.due() == pytest.approx(4.0)
    quick.posted(MIB, False, 1.0)
    quick.ended(MIB, False, True, 1.001)
    assert quick.due() == pytest.approx(4.001)  # it goes on: patience begins anew
